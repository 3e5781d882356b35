from __future__ import annotations

import gc
import json
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from capfilt.data import shards
from capfilt.data.sample import Sample
from capfilt.errors import RunError
from capfilt.models.checkpoints import store
from capfilt.pipelines.bootstrap import rounds

MADE_ANEW = {"summary.json", "report.html"}
"""What counts the seconds, and is written whenever something was done."""


def summary(run: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((run / "summary.json").read_text())
    return result


def samples(folder: Path) -> dict[str, Sample]:
    """Every sample of a folder of shards by key; nothing in them may be unreadable."""
    result = {}
    for url in shards.expand(str(folder)):
        for item in shards.read(url):
            assert isinstance(item, Sample), item
            result[item.key] = item
    return result


def rows(run: Path, kind: str = "annotations") -> list[dict[str, Any]]:
    files = sorted((run / "round-1" / kind).glob("*.parquet"))
    return [row for file in files for row in pq.read_table(file).to_pylist()]


def results(run: Path, *parts: str) -> dict[str, bytes]:
    """The bytes of what a run made: weights, annotations, cleaned shards, figures."""
    return {
        str(path.relative_to(run)): path.read_bytes()
        for part in parts or ("round-0", "round-1")
        for path in (run / part).rglob("*")
        if path.is_file() and "ledger" not in path.parts and path.name != "log.jsonl"
    }


class TestAFinishedRun:
    """The files of its run folder, and whether its counts add up."""

    def test_the_summary_has_the_figures_of_every_round(self, finished_run: Path) -> None:
        answer = summary(finished_run)
        assert answer["command"] == "bootstrap"
        assert answer["recipe"] == "recipe.yaml"
        assert answer["seconds"] >= sum(entry["seconds"] for entry in answer["rounds"]) - 0.2 > 0
        first, second = answer["rounds"]
        assert (first["round"], second["round"]) == (0, 1)
        for entry in (first, second):
            assert set(entry["retrieval"]) == {f"{way}@{k}" for way in ("tr", "ir") for k in (1, 5, 10)}
            assert {"cider", "bleu4"} <= set(entry["captioning"])
            assert all(0 <= value <= 100 for value in entry["retrieval"].values())
        # What was not measured is absent: round 0 cleans nothing.
        assert not {"kept", "dropped", "filter", "samples_in", "noise_ratio"} & set(first)
        assert set(second["kept"]) == set(second["noise_ratio"]) == {"web", "synthetic"}
        assert {"threshold", "auc", "auc_by_kind", "precision", "recall"} <= set(second["filter"])

    def test_in_equals_kept_plus_dropped_plus_failed(self, finished_run: Path) -> None:
        entry = summary(finished_run)["rounds"][1]
        assert entry["samples_in"] == 60 == sum(entry["samples"].values())
        for source in ("web", "synthetic"):
            dropped = sum(n for reason, n in entry["dropped"].items() if reason.startswith(f"{source}: "))
            assert entry["kept"][source] + dropped == 60
            assert entry["noise_ratio"][source] == pytest.approx(dropped / 60, abs=1e-4)
        assert sum(entry["kept"].values()) == 60, "half of 120 texts, as keep-rate was asked"
        for stage in ("annotate", "select"):
            tallies = [
                json.loads(p.read_text())["tally"] for p in (finished_run / f"round-1/ledger/{stage}").glob("*.json")
            ]
            assert len(tallies) == 3
            for tally in tallies:
                of = tally["samples"]
                assert of["in"] == of["kept"] + of["dropped"] + of["failed"] == 20

    def test_every_image_has_its_web_text_and_one_synthetic_text_with_scores(self, finished_run: Path) -> None:
        web = samples(finished_run / "data/web")
        result = Counter((row["key"], row["source"]) for row in rows(finished_run))
        assert result == {(key, source): 1 for key in web for source in ("web", "synthetic")}
        for row in rows(finished_run):
            sample = web[row["key"]]
            assert (row["uid"], row["sha256"], row["round"]) == (sample.uid, sample.sha256, 1)
            assert 0 <= row["itm"] <= 1
            assert -1 <= row["itc"] <= 1
            assert row["source"] == "synthetic" or row["text"] == sample.text
            assert bool(row["captioner"]) == (row["source"] == "synthetic")
        captioners = {row["captioner"] for row in rows(finished_run)} - {""}
        assert captioners == {store.fingerprint(finished_run / "round-1/captioner/checkpoint")}
        assert {row["filter"] for row in rows(finished_run)} == {
            store.fingerprint(finished_run / "round-1/filter/checkpoint")
        }

    def test_the_cleaned_shards_hold_what_reached_the_threshold(self, finished_run: Path) -> None:
        threshold = summary(finished_run)["rounds"][1]["filter"]["threshold"]
        expected: dict[str, list[dict[str, Any]]] = {}
        for row in rows(finished_run):
            if row["itm"] >= threshold and row["text"].strip():
                caption = {name: row[name] for name in ("text", "source", "itm", "itc", "round")}
                expected.setdefault(row["key"], []).append(caption)
        web, clean = samples(finished_run / "data/web"), samples(finished_run / "round-1/dataset")
        assert 0 < len(clean) < 60
        assert {key: sorted(s.meta["captions"], key=str) for key, s in clean.items()} == {
            key: sorted(captions, key=str) for key, captions in expected.items()
        }
        for key, sample in clean.items():
            assert (sample.image, sample.extension) == (web[key].image, web[key].extension)
            assert sample.text == max(sample.meta["captions"], key=lambda c: (c["itm"], c["source"]))["text"]
            came = web[key].meta
            assert {name: value for name, value in sample.meta.items() if name != "captions"} == came
        verdicts = Counter((row["source"], row["verdict"]) for row in rows(finished_run, "dataset"))
        kept = summary(finished_run)["rounds"][1]["kept"]
        assert {source: verdicts[source, "kept"] for source in kept} == kept
        assert verdicts.total() == 120

    def test_the_cleaned_shards_open_with_plain_webdataset(self, finished_run: Path) -> None:
        import webdataset

        tars = sorted((finished_run / "round-1/dataset").glob("*.tar"))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)  # it leaves closing the tars to the garbage collector
            result = list(webdataset.WebDataset([str(tar) for tar in tars], shardshuffle=False))
            gc.collect()
        clean = samples(finished_run / "round-1/dataset")
        assert [row["__key__"] for row in result] == list(clean)
        for row in result:
            sample = clean[row["__key__"]]
            assert row[sample.extension] == sample.image
            assert json.loads(row["json"]) == sample.meta
        sizes = json.loads((finished_run / "round-1/dataset/sizes.json").read_text())
        counts = Counter(Path(row["__url__"]).name for row in result)
        assert sizes == {tar.name: counts[tar.name] for tar in tars}

    def test_each_model_has_the_parts_of_its_role(self, finished_run: Path) -> None:
        roles = {
            part: store.architecture(finished_run / part / "checkpoint").text.roles
            for part in ("round-0/pretrain", "round-1/captioner", "round-1/filter", "round-1/pretrain")
        }
        assert list(roles.values()) == [("encoder", "decoder"), ("decoder",), ("encoder",), ("encoder", "decoder")]
        assert len({store.fingerprint(finished_run / part / "checkpoint") for part in roles}) == 4

    def test_nothing_half_written_is_left(self, finished_run: Path) -> None:
        assert not list(finished_run.rglob(".capfilt-part-*"))
        assert not list(finished_run.rglob("states"))

    def test_the_recipe_in_the_run_folder_has_every_default(self, finished_run: Path) -> None:
        tree = yaml.safe_load((finished_run / "recipe.yaml").read_text())
        assert tree["pretrain"]["optimizer"]["weight_decay"] == 0.05, "a default, spelled out"
        assert tree["rounds"] == 1


class TestResuming:
    """The same command on the same folder."""

    def test_a_rerun_touches_nothing_even_where_the_folder_was_moved(
        self, run_copy: Path, finished_run: Path, capfilt: Any, snapshot: Any
    ) -> None:
        before = snapshot(run_copy)
        done = capfilt("bootstrap", finished_run.parent / "mine.yaml", "--out", run_copy, "--json")
        assert done.code == 0
        assert snapshot(run_copy) == before
        assert json.loads(done.out) == summary(finished_run)
        assert done.err == ""

    def test_the_terminal_shows_a_line_per_stage_and_a_table(
        self, run_copy: Path, finished_run: Path, capfilt: Any
    ) -> None:
        done = capfilt("bootstrap", finished_run.parent / "mine.yaml", "--out", run_copy)
        said = [line for line in done.err.splitlines() if not line.endswith(" ...")]  # a slow machine says more
        lines = [line.split("  ")[0] for line in said]
        one = [f"round 1 {name}" for name in ("captioner", "filter", "annotate", "select", "pretrain", "evaluate")]
        checked = ["held-out pictures", "check held-out"]
        assert lines == ["write the world", *checked, "round 0 pretrain", "round 0 evaluate", *one]
        assert all("resumed" in line for line in said)
        table = [line for line in done.out.splitlines() if line.startswith("│")]
        assert [line.split("│")[1].strip() for line in table] == ["0", "1"]
        assert f"summary     {run_copy}/summary.json" in done.out
        assert f"run folder  {run_copy}" in done.out

    @pytest.mark.parametrize(
        ("gone", "redone"),
        [
            ("round-1/annotations/00001.parquet", {"round-1/ledger/annotate/00001.json"}),
            ("round-1/dataset/00002.tar", {"round-1/ledger/select/00002.json", "round-1/dataset/00002.parquet"}),
            ("round-1/ledger/annotate/00000.json", {"round-1/annotations/00000.parquet"}),
        ],
    )
    def test_what_is_gone_is_made_again_alike_and_nothing_else(
        self, run_copy: Path, finished_run: Path, capfilt: Any, snapshot: Any, gone: str, redone: set[str]
    ) -> None:
        before = snapshot(run_copy)
        (run_copy / gone).unlink()
        assert capfilt("bootstrap", finished_run.parent / "mine.yaml", "--out", run_copy).code == 0
        after = snapshot(run_copy)
        again = {name for name in after if after[name] != before[name]} - MADE_ANEW
        assert again == {gone, *redone}
        for name in again:
            assert (run_copy / name).read_bytes() == (finished_run / name).read_bytes()

    def test_a_model_that_is_gone_is_trained_again_to_the_same_weights(
        self, run_copy: Path, finished_run: Path, capfilt: Any, snapshot: Any
    ) -> None:
        before = snapshot(run_copy)
        (run_copy / "round-1/filter/checkpoint/model.safetensors").unlink()
        assert capfilt("bootstrap", finished_run.parent / "mine.yaml", "--out", run_copy).code == 0
        again = {name for name, stat in snapshot(run_copy).items() if stat != before[name]} - MADE_ANEW
        # Whatever rests on the filter knows it by its weights, and those are the same.
        assert all(name.startswith(("round-1/filter/", "round-1/ledger/filter/")) for name in again), again
        assert results(run_copy) == results(finished_run)

    def test_another_round_is_added(self, run_copy: Path, finished_run: Path, capfilt: Any, snapshot: Any) -> None:
        before = snapshot(run_copy)
        done = capfilt("bootstrap", finished_run.parent / "mine.yaml", "--out", run_copy, "--rounds", 2)
        assert done.code == 0, done.err
        after = snapshot(run_copy)
        again = {name for name in before if after[name] != before[name]}
        assert again == {"summary.json", "report.html", "recipe.yaml"}
        assert summary(run_copy)["rounds"][:2] == summary(finished_run)["rounds"]
        assert summary(run_copy)["rounds"][2]["samples_in"] == 60
        made = {name.partition("/")[2] for name in after if name.startswith("round-2/")}
        assert made == {name.partition("/")[2] for name in before if name.startswith("round-1/")}
        # Another model, other draws: the texts are new.
        texts = [pq.read_table(run_copy / f"round-{r}/annotations/00000.parquet").column("text") for r in (1, 2)]
        assert texts[0] != texts[1]

    def test_another_recipe_is_refused_by_its_key(
        self, run_copy: Path, finished_run: Path, capfilt: Any, snapshot: Any
    ) -> None:
        before = snapshot(run_copy)
        done = capfilt("bootstrap", finished_run.parent / "mine.yaml", "--out", run_copy, "--set", "pretrain.steps=5")
        assert done.code == 1
        assert "pretrain.steps: 4 -> 5" in done.line
        assert "another --out" in done.line
        assert snapshot(run_copy) == before

    def test_another_architecture_under_the_same_name_is_refused(
        self, tmp_path: Path, recipe: Any, model_yaml: Path, capfilt: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        own = tmp_path / "mite.yaml"
        own.write_text(model_yaml.read_text())
        mine = recipe(tmp_path, model=str(own))

        def stop(*_: object) -> None:
            raise RunError("stopped here")

        with monkeypatch.context() as patch:
            patch.setattr(rounds, "run_rounds", stop)
            assert "stopped here" in capfilt("bootstrap", mine, "--out", tmp_path / "run").line
        own.write_text(own.read_text().replace("projection: 16", "projection: 24"))
        done = capfilt("bootstrap", mine, "--out", tmp_path / "run")
        assert done.code == 1
        assert "architecture.projection: 16 -> 24" in done.line


def tensors(run: Path, r: int) -> np.ndarray:
    result = store.read(run / f"round-{r}/pretrain/checkpoint")[1]
    return np.concatenate([result[name].numpy().ravel() for name in sorted(result)])


@pytest.mark.slow
def test_continue_trains_the_newest_model_further(tmp_path: Path, recipe: Any, capfilt: Any) -> None:
    mine = recipe(tmp_path, start="continue", select={"threshold": 0.001})
    still = ("--set", "pretrain.optimizer.lr=1e-9", "--set", "pretrain.optimizer.min_lr=1e-9")
    for start in ("scratch", "continue"):
        done = capfilt("bootstrap", mine, "--out", tmp_path / start, *still, "--set", f"start={start}")
        assert done.code == 0, done.err
        assert summary(tmp_path / start)["rounds"][1]["filter"]["threshold"] == 0.001
    assert np.allclose(tensors(tmp_path / "continue", 1), tensors(tmp_path / "continue", 0), atol=1e-6)
    assert not np.allclose(tensors(tmp_path / "scratch", 1), tensors(tmp_path / "scratch", 0), atol=0.1)


def test_a_calibrated_filter_cleans_the_web(colours: Path) -> None:
    """Four colours are learned in seconds, and then the wrong half of the web's texts is dropped."""
    calibration = json.loads((colours / "round-1/calibration.json").read_text())
    assert calibration["recall"] >= 0.7
    judged = summary(colours)["rounds"][1]["filter"]
    assert judged["threshold"] == calibration["threshold"]
    assert judged["auc"] > 0.8
    assert judged["precision"] > 0.75, "of the texts that came, half were right"
    assert judged["recall"] > 0.3


def test_a_policy_may_rank_alone(tmp_path: Path, recipe: Any, capfilt: Any) -> None:
    """BLIP-2's policy in a recipe: no threshold, so none is told; one text of each image stays."""
    done = capfilt("bootstrap", recipe(tmp_path, select={"top_k": 1}), "--out", tmp_path / "run")
    assert done.code == 0, done.err
    answer = summary(tmp_path / "run")["rounds"][1]
    assert sum(answer["kept"].values()) == answer["samples"]["kept"] == 60
    assert answer["filter"].keys() == {"auc", "auc_by_kind"}


@pytest.mark.slow
def test_the_known_truth_of_the_world_changes_nothing(
    tmp_path: Path, finished_run: Path, recipe: Any, capfilt: Any
) -> None:
    """The same shards without `truth` in their json: all that is trained, written or kept is the same."""
    for url in shards.expand(str(finished_run / "data/web")):
        blank = []
        for item in shards.read(url):
            assert isinstance(item, Sample)
            assert item.meta.pop("truth")
            blank.append(item)
        shards.write(tmp_path / "web" / f"{shards.name(url)}.tar", blank)
    named = {split: str(finished_run / "data" / split) for split in ("human", "val", "test")}
    mine = recipe(tmp_path, data={**named, "web": str(tmp_path / "web")})
    done = capfilt("bootstrap", mine, "--out", tmp_path / "run")
    assert done.code == 0, done.err
    answer, known = summary(tmp_path / "run")["rounds"][1], summary(finished_run)["rounds"][1]
    assert answer["filter"] == {"threshold": known["filter"]["threshold"]}
    assert answer.pop("human_pairs")["images"] == 16, "measured where no truth is known"
    assert {**answer, "filter": 0, "seconds": 0} == {**known, "filter": 0, "seconds": 0}
    mine_made, made = results(tmp_path / "run"), results(finished_run)
    assert mine_made.keys() - {"round-1/human_pairs.json"} == made.keys()
    for name in made.keys() - {name for name in made if name.endswith(".tar")}:
        assert mine_made[name] == made[name], name
    blank_clean, clean = samples(tmp_path / "run/round-1/dataset"), samples(finished_run / "round-1/dataset")
    assert list(blank_clean) == list(clean)
    for key, sample in clean.items():
        assert sample.meta.pop("truth")
        assert sample == blank_clean[key]


# ---- odd, broken and empty inputs ----


def test_odd_and_broken_inputs_are_accounted_for(
    tmp_path: Path, finished_run: Path, recipe: Any, capfilt: Any, picture: Callable[..., bytes]
) -> None:
    web, long = tmp_path / "web", "a red circle " * 800
    odd = {
        "dot": (picture("PNG", size=1), "png"),
        "ink": (picture("JPEG", mode="CMYK"), "jpg"),
        "deep": (picture("PNG", mode="I;16"), "png"),
        "long": (picture("PNG"), "png"),
        "half": (picture("PNG"), "png"),
        "torn": (picture("JPEG")[:300], "jpg"),
        "text": (b"this is no picture", "jpg"),
    }
    texts = {"long": long[:10_000]}
    metas = {"half": {"captions": [{"text": "half a \ud83d face", "source": "web"}]}}
    shards.write(
        web / "odd.tar",
        [Sample(key, image, ext, texts.get(key, key), metas.get(key, {})) for key, (image, ext) in odd.items()],
    )
    whole = (finished_run / "data/web/00000.tar").read_bytes()
    (web / "cut.tar").write_bytes(whole[: len(whole) // 2])
    (web / "noise.tar").write_bytes(b"not a tar at all" * 1000)
    shards.write(web / "none.tar", [])
    named = {split: str(finished_run / "data" / split) for split in ("human", "test")}
    mine = recipe(tmp_path, data={**named, "web": str(web)}, select={"threshold": 0})
    done = capfilt("bootstrap", mine, "--out", tmp_path / "run")
    assert done.code == 0, done.err
    entry = summary(tmp_path / "run")["rounds"][1]
    before_the_cut = sum(isinstance(item, Sample) for item in shards.read(str(web / "cut.tar")))
    assert 5 < before_the_cut < 20
    assert entry["failed"] == {"truncated image": 1, "not an image": 1, "shard cut": 1, "unreadable shard": 1}
    assert entry["samples_in"] == len(odd) + before_the_cut + 2
    assert entry["samples"] == {"kept": len(odd) - 2 + before_the_cut, "dropped": 0, "failed": 4}
    clean = samples(tmp_path / "run/round-1/dataset")
    for key in ("dot", "ink", "deep", "long", "half"):
        assert clean[key].image == odd[key][0]
    assert clean["long"].text == texts["long"] or clean["long"].meta["captions"][1]["text"] == texts["long"]
    assert "half a ? face" in [caption["text"] for caption in clean["half"].meta["captions"]]


def test_a_web_of_which_no_picture_can_be_decoded_ends_a_bootstrap_there(
    tmp_path: Path, finished_run: Path, recipe: Any, capfilt: Any
) -> None:
    shards.write(tmp_path / "web/00000.tar", [Sample(f"{i}", b"this is no picture", "jpg", "a text") for i in range(3)])
    mine = recipe(tmp_path, data={"web": str(tmp_path / "web"), "human": str(finished_run / "data/human")})
    done = capfilt("bootstrap", mine, "--out", tmp_path / "run")
    assert done.code == 1
    assert (
        "round 1 annotate: 0 of 3 samples succeeded; 3 failed by: not an image. What is committed stays." in done.line
    )
    assert (tmp_path / "run/round-1/annotations/00000.parquet").is_file()
    assert not (tmp_path / "run/round-1/dataset").exists()


@pytest.mark.parametrize(
    ("web", "code", "said"),
    [
        (None, 2, "no shard found at"),
        ([], 1, "data.web is empty: none of its 1 shards"),
        (b"garbage" * 999, 1, "first fault: 00000: unreadable shard"),
    ],
)
def test_an_empty_corpus_is_refused_before_anything_is_trained(
    tmp_path: Path,
    finished_run: Path,
    recipe: Any,
    capfilt: Any,
    web: list[Sample] | bytes | None,
    code: int,
    said: str,
) -> None:
    tar = tmp_path / "web/00000.tar"
    tar.parent.mkdir()
    if isinstance(web, bytes):
        tar.write_bytes(web)
    elif web is not None:
        shards.write(tar, web)
    mine = recipe(tmp_path, data={"web": str(tar.parent), "human": str(finished_run / "data/human")})
    done = capfilt("bootstrap", mine, "--out", tmp_path / "run")
    assert done.code == code
    assert said in done.line
    assert not list(tmp_path.glob("run/round-*"))
