from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import pydantic
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from capfilt import config, presets
from capfilt.config import Config
from capfilt.errors import CapfiltError, RecipeError
from capfilt.yaml_loader import load_yaml


class Optimizer(Config):
    lr: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.999)


class Linear(Config):
    kind: Literal["linear"] = "linear"
    steps: int = 1


class Cosine(Config):
    kind: Literal["cosine"] = "cosine"
    warmup: int = 1


class Recipe(Config):
    name: str
    optimizer: Optimizer = Optimizer()
    schedule: Annotated[Linear | Cosine, pydantic.Field(discriminator="kind")] = Linear()
    device: Literal["auto", "cpu", "cuda"] = "auto"
    stages: list[Optimizer] = []
    by_name: dict[str, Optimizer] = {}
    threshold: float | None = None
    share: float | Literal["all"] = 1.0

    @pydantic.model_validator(mode="after")
    def _meets(self) -> Recipe:
        if self.name == "unmeetable":
            raise ValueError("a captioner needs a model that can decode; 'clip' cannot.")
        return self


class Model(Config):
    shelf: ClassVar[presets.Shelf] = "models"
    width: int


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def refusal(path: Path, *sets: str) -> str:
    with pytest.raises(RecipeError) as caught:
        config.read(path, Recipe, sets)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_yaml_becomes_a_frozen_config(tmp_path: Path) -> None:
    got = config.read(write(tmp_path / "r.yaml", "name: a\noptimizer: {lr: 1e-4}\n"), Recipe)
    assert got == Recipe(name="a", optimizer=Optimizer(lr=0.0001))
    with pytest.raises(pydantic.ValidationError):
        got.name = "b"  # type: ignore[misc]


def test_numbers_with_exponents_are_numbers_and_quoted_ones_text(tmp_path: Path) -> None:
    file = write(tmp_path / "r.yaml", "a: 1e-4\nb: -2E+3\nc: '1e-4'\nd: .5e1\ne: e4\nf: 1.5e-3\n")
    assert load_yaml(file) == {"a": 1e-4, "b": -2e3, "c": "1e-4", "d": 5.0, "e": "e4", "f": 1.5e-3}


def test_extends_merges_one_level_deep(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", "name: base\noptimizer: {lr: 0.1, betas: [0.5, 0.6]}\nstages: [{lr: 1}]\n")
    child = write(tmp_path / "r.yaml", "extends: base.yaml\nname: child\noptimizer: {lr: 0.2}\nstages: []\n")
    got = config.read(child, Recipe)
    assert got == Recipe(name="child", optimizer=Optimizer(lr=0.2, betas=(0.5, 0.6)))


def test_extends_takes_preset_names_of_the_kind_s_shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presets, "PACKED", tmp_path)
    write(tmp_path / "models/blip/base.yaml", "width: 768\n")
    write(tmp_path / "pipelines/bootstrap/base.yaml", "name: base\nthreshold: 0.5\n")
    by_name = write(tmp_path / "mine.yaml", "extends: blip/base\n")
    assert config.read(by_name, Model) == Model(width=768)
    sibling = write(tmp_path / "pipelines/bootstrap/demo.yaml", "extends: base\nname: demo\n")
    assert config.read(sibling, Recipe) == Recipe(name="demo", threshold=0.5)
    assert "no preset 'blip/base'" in refusal(by_name)


def test_extends_of_an_extension_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.yaml", "name: a\n")
    write(tmp_path / "b.yaml", "extends: a.yaml\n")
    assert "one level is allowed" in refusal(write(tmp_path / "c.yaml", "extends: b.yaml\n"))
    assert "one preset name" in refusal(write(tmp_path / "d.yaml", "extends: [a.yaml, b.yaml]\n"))


class Drink(Config):
    """Two sections that are each brewed, as `cups` says, or bought."""

    alternatives: ClassVar[frozenset[str]] = frozenset({"bought"})

    tea: dict[str, int]
    coffee: dict[str, int] = {}


def test_a_section_of_another_kind_replaces_what_it_extends(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", "tea: {cups: 2, minutes: 4}\ncoffee: {bought: 1, price: 3}\n")
    child = write(tmp_path / "r.yaml", "extends: base.yaml\ntea: {bought: 5}\ncoffee: {cups: 6}\n")
    assert config.read(child, Drink) == Drink(tea={"bought": 5}, coffee={"cups": 6})
    child = write(tmp_path / "r.yaml", "extends: base.yaml\ntea: {cups: 3}\ncoffee: {}\n")
    got = config.read(child, Drink, ["coffee.bought=2"])
    assert got == Drink(tea={"cups": 3, "minutes": 4}, coffee={"bought": 2, "price": 3})
    assert config.read(child, Drink, ["tea.bought=7"]).tea == {"bought": 7}
    assert config.build(Drink, ["tea.cups=1", "tea.bought=7"]).tea == {"bought": 7}


def test_set_changes_one_of_two_sections_that_are_an_anchor_and_its_alias(tmp_path: Path) -> None:
    file = write(tmp_path / "r.yaml", "tea: &hot {cups: 2}\ncoffee: *hot\n")
    assert config.read(file, Drink, ["coffee.cups=3"]) == Drink(tea={"cups": 2}, coffee={"cups": 3})
    assert config.read(file, Drink, ["coffee.bought=3"]) == Drink(tea={"cups": 2}, coffee={"bought": 3})


def test_set_overrides_with_yaml_values(tmp_path: Path) -> None:
    file = write(tmp_path / "r.yaml", "name: a\nthreshold: 0.5\n")
    sets = ["optimizer.lr=1e-5", "stages=[{lr: 2}]", "threshold=", "by_name.x.lr=3", "name=a=b"]
    got = config.read(file, Recipe, sets)
    expected = {
        "optimizer": Optimizer(lr=1e-5),
        "stages": [Optimizer(lr=2)],
        "by_name": {"x": Optimizer(lr=3)},
    }
    assert got == Recipe(name="a=b", threshold=None, **expected)  # type: ignore[arg-type]


MEANT = {
    **{word: word for word in ("no", "yes", "on", "off", "y", "N", "Off", "tRue", "1:30", "0b11", "2026-11-24", "=")},
    "true": True,
    "True": True,
    "FALSE": False,
    "null": None,
    "~": None,
    "": None,
    "010": 10,
    "00012": 12,
    "08": 8,
    "0o17": 15,
    "0x1F": 31,
    "-3": -3,
    "+3": 3,
    "1_000": 1000,
    "1e5": 1e5,
    "1e-4": 1e-4,
    ".5": 0.5,
    "5.": 5.0,
    "1.5E+3": 1500.0,
    "-.inf": -math.inf,
    "1_0.5": 10.5,
    "'no'": "no",
    '"1e5"': "1e5",
    "!!bool no": False,
    "1.5.2": "1.5.2",
    "-": [None],
}


def test_plain_words_mean_what_yaml_1_2_says_in_files_and_sets(tmp_path: Path) -> None:
    class Anything(Config):
        x: dict[str, Any]

    lines = "".join(f"  {json.dumps(text)}: {text}\n" for text in MEANT if text != "-")
    read = config.read(write(tmp_path / "r.yaml", f"x:\n{lines}  NO: off\n"), Anything).x
    assert read == {text: value for text, value in MEANT.items() if text != "-"} | {"NO": "off"}
    assert [type(read[text]) for text in read if text != "NO"] == [type(MEANT[text]) for text in read if text != "NO"]
    for text, value in MEANT.items():
        got = config.build(Anything, [f"x.a={text}"]).x["a"]
        assert (got, type(got)) == (value, type(value)), text


@pytest.mark.parametrize(("word", "meant"), [("no", False), ("off", False), ("yes", True), ("on", True), ("y", True)])
def test_a_switch_may_still_be_said_in_words(word: str, meant: bool) -> None:
    class Switch(Config):
        on: bool
        cache: bool | Path = False

    assert config.build(Switch, [f"on={word}"]).on is meant


@pytest.mark.parametrize("bad", ["!!int cat", "!!float x", "!!bool x", "!!timestamp x", "9" * 5000])
def test_a_value_that_is_not_what_its_tag_says_is_one_line(tmp_path: Path, bad: str) -> None:
    assert " is no " in refusal(write(tmp_path / "r.yaml", "name: a\n"), f"threshold={bad}")


@pytest.mark.parametrize("bad", ["lr", "=3", "a..b=3", ".a=3", "optimizer.lr=[1", "name.first=x"])
def test_a_set_that_cannot_be_meant_is_refused(tmp_path: Path, bad: str) -> None:
    assert "--set" in refusal(write(tmp_path / "r.yaml", "name: a\n"), bad)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name: a\nnmae: b", "unknown key 'nmae'. Did you mean 'name'? Allowed here: by_name, device,"),
        (
            "name: a\noptimizer: {lrr: 1}",
            "unknown key 'optimizer.lrr'. Did you mean 'lr'? Allowed here: betas, lr.",
        ),
        ("name: a\nstages: [{}, {x: 1}]", "unknown key 'stages.1.x'. Allowed here: betas, lr."),
        ("name: a\nby_name: {lr: {x: 1}}", "unknown key 'by_name.lr.x'. Allowed here: betas, lr."),
        (
            "name: a\nschedule: {kind: cosine, steps: 3}",
            "unknown key 'schedule.steps'. Allowed here: kind, warmup.",
        ),
        ("device: cpu", "key 'name' is missing"),
        (
            "name: a\ndevice: cdua",
            "'device' is 'cdua': Input should be 'auto', 'cpu' or 'cuda'. Did you mean 'cuda'?",
        ),
        ("name: a\noptimizer: {lr: fast}", "'optimizer.lr' is 'fast': Input should be a valid number"),
        ("name: a\nshare: al", "'share' is 'al': Input should be a valid number"),
        ("name: a\nshare: al", "'share' is 'al': Input should be 'all'. Did you mean 'all'?"),
        ("name: unmeetable", "the recipe: a captioner needs a model that can decode; 'clip' cannot."),
        ("name: a\nschedule: {kind: cosin}", "Did you mean 'cosine'?"),
        ("- a\n- b", "holds a list; a recipe is a mapping"),
        ("name: [a", "is no YAML"),
        ("name: a\nname: b", "key 'name' twice at line 2"),
        ("name: !!python/object/apply:os.getcwd []", "is no YAML"),
    ],
)
def test_errors_are_one_line_with_key_and_choice(tmp_path: Path, text: str, said: str) -> None:
    message = refusal(write(tmp_path / "r.yaml", text))
    assert said in message
    assert "r.yaml" in message


def test_many_faults_are_counted(tmp_path: Path) -> None:
    message = refusal(write(tmp_path / "r.yaml", "{a: 1, b: 1, c: 1, d: 1}"))
    assert "(and 2 more)" in message


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    assert "there is no file" in refusal(tmp_path / "absent.yaml")
    assert "cannot be read" in refusal(tmp_path)
    binary = tmp_path / "b.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    assert "cannot be read" in refusal(binary)


def test_an_error_of_a_validator_keeps_its_own_class(tmp_path: Path) -> None:
    class Picky(Config):
        @pydantic.model_validator(mode="after")
        def _never(self) -> Any:
            raise CapfiltError("never")

    with pytest.raises(CapfiltError, match=r"^never$"):
        config.read(write(tmp_path / "r.yaml", ""), Picky)


TEXT = st.text(st.characters(blacklist_categories=["Cs"]), max_size=12)
NUMBER = st.floats(allow_nan=False)


@example(name="\x85", lr=0.0, key="")  # PyYAML writes it raw and reads it as the end of a line
@given(
    name=TEXT | st.sampled_from(["1e-4", "no", "null", "1_0e5", "~", "0x1", "08", "0o7", "1:30"]), lr=NUMBER, key=TEXT
)
def test_to_yaml_reads_back_equal(tmp_path_factory: pytest.TempPathFactory, name: str, lr: float, key: str) -> None:
    recipe = Recipe(name="x" + name, optimizer=Optimizer(lr=lr), by_name={key: Optimizer(betas=(lr, 0))})
    again = config.read(write(tmp_path_factory.mktemp("y") / "r.yaml", config.to_yaml(recipe)), Recipe)
    assert again == recipe
    assert config.digest(again) == config.digest(recipe)
    plain = Recipe(name=name)
    if name != "unmeetable":
        back = config.read(write(tmp_path_factory.mktemp("z") / "r.yaml", config.to_yaml(plain)), Recipe)
        assert back == plain


def test_to_yaml_keeps_the_order_of_the_fields() -> None:
    lines = config.to_yaml(Recipe(name="a")).splitlines()
    assert [line.split(":")[0] for line in lines if not line.startswith((" ", "-"))] == list(Recipe.model_fields)


def test_digest_differs_between_configs(tmp_path: Path) -> None:
    a = config.read(write(tmp_path / "a.yaml", "name: a\noptimizer: {lr: 1}\n"), Recipe)
    b = config.read(write(tmp_path / "b.yaml", "optimizer:\n  lr: 1.0\nname: a  # same\n"), Recipe)
    assert config.digest(a) == config.digest(b)
    assert config.digest(a) != config.digest(Recipe(name="a"))
    assert len(config.digest(a)) == 64


class Grown(config.Config):
    old: int = 1
    new: int = config.added(2, ge=0)


def test_an_added_field_at_its_default_leaves_the_fingerprint_alone() -> None:
    class Before(config.Config):
        old: int = 1

    assert config.digest(Grown()) == config.digest(Before())
    assert config.digest(Grown(new=3)) != config.digest(Before())


def test_an_added_field_reads_back() -> None:
    assert config.validate(Grown, Grown(new=3).model_dump(), "here") == Grown(new=3)
    with pytest.raises(RecipeError, match="'new' is -1"):
        config.validate(Grown, {"new": -1}, "here")


# ---- sections that are the name of a preset, or laid over one ----


class Tower(Config):
    depth: int = 2
    width: int = 4


class Architecture(Config):
    shelf: ClassVar[presets.Shelf] = "models"
    extends_levels: ClassVar[int] = 2

    family: Literal["plain"] = "plain"
    vision: Tower
    text: Tower = Tower()


class Run(Config):
    named_sections: ClassVar[frozenset[str]] = frozenset({"model"})

    model: Annotated[
        str | Architecture,
        pydantic.BeforeValidator(config.OpenSection("family", lambda: {"plain": Architecture}, "plain", Architecture)),
    ]
    seed: int = 0


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(presets, "PACKED", tmp_path)
    write(tmp_path / "models/plain/tiny.yaml", "vision: {depth: 3}\ntext: {depth: 5}\n")
    write(tmp_path / "models/plain/wide.yaml", "extends: tiny\ntext: {width: 9}\n")
    write(tmp_path / "pipelines/demo.yaml", "model: plain/tiny\n")
    return tmp_path


TINY, WIDE = Tower(depth=5), Tower(depth=5, width=9)


@pytest.mark.parametrize(
    ("text", "sets", "expected"),
    [
        ("model: plain/tiny", [], "plain/tiny"),
        ("model: plain/tiny", ["model.text.width=9"], WIDE),
        ("extends: demo", ["model.text.width=9"], WIDE),
        ("extends: demo\nmodel: {text: {width: 9}}", [], WIDE),
        ("extends: demo\nmodel: {extends: plain/wide, text: {depth: 1}}", [], Tower(depth=1, width=9)),
        ("model: {extends: plain/wide}", ["model=plain/tiny"], "plain/tiny"),
        ("model: {extends: plain/wide}", ["model=plain/tiny", "model.text.width=9"], WIDE),
        ("model: {vision: {}}", [], Tower()),
        ("model: {vision: {}}", ["model.text.width=1", "model.extends=plain/tiny"], Tower(depth=5, width=1)),
        ("model: {extends: plain/tiny}", [], TINY),
    ],
)
def test_a_section_is_a_name_or_laid_over_one(shelf: Path, text: str, sets: list[str], expected: Tower | str) -> None:
    model = config.read(write(shelf / "mine.yaml", text), Run, sets).model
    assert (model if isinstance(model, str) else model.text) == expected


def test_a_section_that_was_laid_over_a_preset_is_dumped_whole(shelf: Path) -> None:
    run = config.read(write(shelf / "mine.yaml", "model: {extends: plain/wide}"), Run)
    assert run.model_dump()["model"]["text"] == {"depth": 5, "width": 9}
    (shelf / "again.yaml").write_text(config.to_yaml(run))
    assert config.read(shelf / "again.yaml", Run) == run


def test_an_architecture_may_extend_a_preset_that_extends_one(shelf: Path) -> None:
    assert config.read(write(shelf / "mine.yaml", "extends: plain/wide"), Architecture).text == WIDE
    write(shelf / "a.yaml", "extends: plain/wide")
    with pytest.raises(RecipeError, match="2 levels are allowed"):
        config.read(write(shelf / "b.yaml", "extends: a.yaml"), Architecture)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model: {extends: plain/tin}", "there is no preset 'plain/tin' in models/. Did you mean 'plain/tiny'?"),
        ("model: {extends: [a]}", "'extends' is ['a']; it takes one preset name"),
        ("model: {extends: plain/tiny, text: {depht: 3}}", "unknown key 'model.text.depht'. Did you mean 'depth'?"),
        ("model: {extends: plain/tiny, text: {depth: x}}", "'model.text.depth' is 'x'"),
        ("model: {family: bert}", "there is no family 'bert'; there are: plain"),
    ],
)
def test_what_is_wrong_with_a_section_is_said_by_its_key(shelf: Path, text: str, said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        config.read(write(shelf / "mine.yaml", text), Run)
    assert said in str(caught.value)


def test_a_config_is_changed_and_validated_again() -> None:
    assert config.changed(Recipe(name="a"), ["optimizer.lr=1"], "here").optimizer == Optimizer(lr=1)
    with pytest.raises(RecipeError, match=r"^here: 'optimizer.lr' is 'x'"):
        config.changed(Recipe(name="a"), ["optimizer.lr=x"], "here")
