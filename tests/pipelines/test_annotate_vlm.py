"""`capfilt annotate --captioner hf:FOLDER`: a vision-language model writes, a small BLIP scores."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import vlms

import capfilt as library
from capfilt.data import shards
from capfilt.inference.captioners.vlm.captioner import VlmCaptioner
from capfilt.runs.tally import no_text

SETTINGS = ("--captions", "2", "--set", "vlm.prompts=[ignore, fuse]", "--set", "vlm.max_new_tokens=6")


@pytest.fixture(scope="module")
def web(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two shards of six pictures; one of them has no text, one is none."""
    folder = tmp_path_factory.mktemp("web")
    samples = list(shards.read(str(finished_run / "data/web/00000.tar")))[:12]
    broken = [
        sample if i != 4 else type(sample)(sample.key, b"no picture", "jpg", "a text", {})
        for i, sample in enumerate(samples)
    ]
    bare = [
        sample if i != 2 else type(sample)(sample.key, sample.image, sample.extension, "", {})
        for i, sample in enumerate(broken)
    ]
    for number in range(2):
        shards.write(folder / f"{number:05d}.tar", bare[6 * number : 6 * number + 6])
    return str(folder)


def tables(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (run / "annotations").glob("*.parquet")}


@pytest.mark.parametrize("kind", vlms.KINDS)
def test_a_shard_from_end_to_end(kind: str, web: str, finished_run: Path, tmp_path: Path, capfilt: Any) -> None:
    model, filter_ = vlms.save(kind, tmp_path / kind), finished_run / "round-1/filter"
    words = ("annotate", web, "--captioner", f"hf:{model}", "--filter", filter_, *SETTINGS, "--address", "local")
    done = capfilt(*words, "--out", tmp_path / "a", "--json")
    assert done.code == 0, done.err
    answer, rows = json.loads(done.out), [*library.read_annotations(tmp_path / "a")]
    assert answer["samples"] == {"in": 12, "kept": 11, "dropped": 0, "failed": 1}
    texts = [row for row in rows if row.status == "ok" and not no_text(row.reason)]
    assert answer["texts"]["kept"] == Counter(row.source for row in texts)
    assert answer["texts"]["in"] == {"web": 11, "synthetic": 22}
    prompts = Counter(row.prompt for row in rows if row.source == "synthetic")
    assert prompts == {"ignore": 12, "fuse": 10}, "without a web text there is nothing to fuse"
    assert {row.prompt for row in rows if row.source == "web"} == {None}
    assert {row.captioner[: len(kind)] for row in rows if row.source == "synthetic"} == {kind}
    said = [part for row in texts for part in row.reason.split("; ") if part.startswith("cut: ")]
    assert answer.get("remarks", {}).items() >= Counter(said).items()
    words = ("--annotations", tmp_path / "a", "--out", tmp_path / "b", "--threshold", "0.01", "--json")
    selected = capfilt("select", web, *words)
    assert selected.code == 0, selected.err
    verdicts = pq.read_table(tmp_path / "b/dataset/00000.parquet")
    assert verdicts.column_names[-3:] == ["prompt", "verdict", "why"]
    assert len([*library.read_annotations(tmp_path / "b").verdicts()]) == len(rows)
    explained = capfilt("explain", tmp_path / "b", rows[0].key)
    assert "prompt ignore" in explained.out or "prompt fuse" in explained.out
    for verb in ("report", "status", "verify"):
        for run in ("a", "b"):
            assert capfilt(verb, tmp_path / run).code == 0


def test_a_run_that_ends_in_the_middle_goes_on_to_the_same_bytes(
    web: str, finished_run: Path, tmp_path: Path, capfilt: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, filter_ = vlms.save("llava", tmp_path / "llava"), finished_run / "round-1/filter"
    words = ("annotate", web, "--captioner", f"hf:{model}", "--filter", filter_, *SETTINGS, "--address", "local")
    words = (*words, "--set", "batch_size=2")
    assert capfilt(*words, "--out", tmp_path / "a").code == 0
    calls, caption = [], VlmCaptioner.caption

    def dies(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) >= 4:
            raise MemoryError("the machine goes")
        return caption(*arguments)

    monkeypatch.setattr(VlmCaptioner, "caption", dies)
    assert capfilt(*words, "--out", tmp_path / "b").code == 1
    assert len(tables(tmp_path / "b")) == 1
    monkeypatch.undo()
    assert capfilt(*words, "--out", tmp_path / "b").code == 0
    assert tables(tmp_path / "a") == tables(tmp_path / "b")


@pytest.mark.slow
def test_kill_9_at_ten_moments_changes_no_byte(web: str, finished_run: Path, tmp_path: Path, capfilt: Any) -> None:
    model, filter_ = vlms.save("llava", tmp_path / "llava"), finished_run / "round-1/filter"
    words = ["annotate", web, "--captioner", f"hf:{model}", "--filter", str(filter_), *SETTINGS, "--address", "local"]
    words += ["--set", "batch_size=2"]
    assert capfilt(*words, "--out", tmp_path / "a").code == 0
    command = [sys.executable, "-m", "capfilt", *words, "--out", str(tmp_path / "b")]
    done = tmp_path / "b/ledger/annotate"
    for moment in range(10):  # once its models are being loaded, at work, or with a shard committed
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        while not (tmp_path / "b/plan.json").exists():
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        time.sleep(0.3 * moment)
        process.kill()
        process.communicate()
        if len([*done.glob("*.json")]) == 2:
            break
    assert capfilt(*words, "--out", tmp_path / "b").code == 0
    assert tables(tmp_path / "a") == tables(tmp_path / "b")
