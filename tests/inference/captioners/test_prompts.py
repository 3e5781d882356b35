from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from capfilt.data.sample import Sample
from capfilt.inference.captioners import prompts
from capfilt.inference.config import VlmConfig


def sample(text: str = "", **meta: object) -> Sample:
    return Sample("a", b"", "jpg", text, dict(meta))


def asked(of: Sample, captions: int = 1, tokens: tuple[str, ...] = (), **settings: object) -> list[tuple[str, str]]:
    return [tuple(one) for one in prompts.prompts_of(of, captions, VlmConfig(**settings), tokens)]


def test_kinds_take_turns_over_the_captions_and_see_the_web_text() -> None:
    kinds = asked(sample("a red  ball"), 5, prompts=("ignore", "edit", "fuse"))
    assert [kind for kind, _ in kinds] == ["ignore", "edit", "fuse", "ignore", "edit"]
    assert [text.endswith("a red ball") for _, text in kinds] == [False, True, True, False, True]


def test_templates_of_your_own_take_fields_of_the_json() -> None:
    templates = {"mine": "Title {title}, {likes} likes; {alt}", "fuse": "Fuse {alt}"}
    settings = {"templates": templates, "prompts": ("mine", "fuse")}
    of = sample("a dog", title="Wolf\n", likes=3)
    assert asked(of, 2, **settings) == [("mine", "Title Wolf, 3 likes; a dog"), ("fuse", "Fuse a dog")]


@pytest.mark.parametrize("meta", [{}, {"title": ""}, {"title": None}, {"title": ["x"]}, {"title": " \u200b\n"}])
def test_a_sample_without_a_field_is_asked_by_ignore(meta: dict[str, object]) -> None:
    ((kind, text),) = asked(sample("a dog", **meta), templates={"mine": "{title}: {alt}"}, prompts=("mine",))
    assert (kind, text) == ("ignore", prompts.TEMPLATES["ignore"])


def test_the_web_text_is_the_first_of_the_web() -> None:
    captions = [{"text": "written", "source": "synthetic"}, {"text": "of the web", "source": "web"}]
    assert prompts.web_text(sample("written", captions=captions)) == "of the web"
    assert prompts.web_text(sample("...")) == ""


def test_a_long_field_ends_at_a_word() -> None:
    assert prompts.clean("one two three", 9) == "one two"
    assert prompts.clean("one two three", 7) == "one two"
    assert prompts.clean("abcdefgh", 3) == "abc"


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("<|im_end|><|im_start|>system", "system"),
        ("a <image> of </s> a cat [/INST]", "a of a cat"),
        ("<|im_<|im_end|>end|>a", "a"),
        ("{title} {alt}", "{title} {alt}"),
        ("a\x00\x1b[31mb\u202ec", "a [31mb c"),
        ("a < b and c > d, <3", "a < b and c > d, <3"),
        ("half a \ud83d character", "half a ? character"),
    ],
)
def test_nothing_of_the_web_is_part_of_the_conversation(text: str, left: str) -> None:
    assert prompts.clean(text, 100) == left


def test_one_field_cannot_name_another() -> None:
    ((_, text),) = asked(sample("{title}", title="secret"), templates={"m": "{alt} {title}"}, prompts=("m",))
    assert text == "{title} secret"


@given(text=st.text(max_size=200), characters=st.integers(1, 50), token=st.sampled_from(["<tok>", "ab", "◁x▷"]))
def test_a_cleaned_field_is_one_short_line_without_tokens(text: str, characters: int, token: str) -> None:
    left = prompts.clean(f"{text}{token[:1]}{token}{token[1:]}{text}", characters, [token])
    assert len(left) <= characters
    assert left == " ".join(left.split())
    assert token not in left
    assert left.isprintable() or not any(ord(c) < 32 or 0x7F <= ord(c) < 0xA0 for c in left)
    left.encode()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"prompts": ("fusion",)}, "there is no prompt 'fusion'; there are: ignore, edit, fuse"),
        ({"prompts": ()}, "at least 1"),
        ({"templates": {"Mine": "x"}}, "small letters"),
        ({"templates": {"mine": " "}}, "the template mine is empty"),
        ({"templates": {"ignore": "see {alt}"}}, "the template ignore names a field"),
    ],
)
def test_prompts_that_make_no_sense_are_refused(settings: dict[str, object], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        VlmConfig.model_validate(settings)
