"""What a verb's end says to do next is pasted here, as a person would."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from capfilt.cli import next_steps
from capfilt.cli.next_steps import beside, first_policy
from capfilt.data import annotations

QUICK = ["--set", "train.steps=2", "--set", "train.loader.batch_size=8"]


def steps_of(done: Any) -> list[list[str]]:
    """The commands that a verb has printed at its end, in words."""
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    found = []
    for above, what, line in zip(lines, lines[1:], lines[2:], strict=False):
        if not above and what.endswith(":") and line.startswith("  "):
            found.append(shlex.split(line))
    return found


@pytest.fixture
def paste(capfilt: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Any]:
    """Run a command as it was printed, with words added at its end; in the folder where it was printed."""
    monkeypatch.chdir(tmp_path)

    def run(words: list[str], *more: str) -> Any:
        assert words[0] == "capfilt"
        done = capfilt(*words[1:], *more, address=None)
        assert done.code == 0, (words, done.err)
        return done

    return run


@pytest.fixture
def models(finished_run: Path) -> list[str]:
    home = finished_run / "round-1"
    return ["--captioner", f"{home}/captioner/checkpoint", "--filter", f"{home}/filter/checkpoint"]


def test_from_annotate_to_a_page(paste: Any, finished_run: Path, models: list[str], tmp_path: Path) -> None:
    shutil.copy(finished_run / "data/web/00000.tar", tmp_path / "my shard.tar")
    words = ["capfilt", "annotate", "my shard.tar", *models, "--out", "runs/a", "--address", "local"]
    select, report = steps_of(paste(words))
    assert select[:6] == ["capfilt", "select", "my shard.tar", "--annotations", "runs/a", "--out"]
    assert select[-2:] == ["--address", "local"], "as the command before"
    assert report == ["capfilt", "report", "runs/a"]
    report_again, pretrain = steps_of(paste(select))
    assert report_again == ["capfilt", "report", "runs/a-clean"]
    assert pretrain[:4] == ["capfilt", "pretrain", "blip-tiny", "--out"]
    for page in (report, report_again):
        paste(page)
    paste(pretrain, *QUICK)
    assert (tmp_path / "runs/a-clean-tiny/pretrain/checkpoint").is_dir()


def test_from_pretrain_to_transformers(paste: Any, finished_run: Path, models: list[str], tmp_path: Path) -> None:
    words = ["capfilt", "pretrain", "blip-tiny", "--out", "runs/p", "--set", f"data={finished_run}/data/web", *QUICK]
    evaluate, report, export = steps_of(paste([*words, "--address", "local"]))
    assert evaluate[1:4] == ["evaluate", "runs/p/pretrain/checkpoint", f"{finished_run}/data/web/00000.tar"]
    annotate, export_too = steps_of(paste(evaluate))
    assert export == export_too
    assert export == ["capfilt", "export", "runs/p/pretrain/checkpoint", "--as", "hf", "--out", "runs/p-hf"]
    read = steps_of(paste(export))
    assert read == [["cat", "runs/p-hf/captioner/README.md", "runs/p-hf/filter/README.md"]]
    assert all((tmp_path / name).is_file() for name in read[0][1:])
    paste(annotate)
    assert list((tmp_path / "runs/p-annotated/annotations").glob("*.parquet"))
    paste(report)
    assert (tmp_path / "runs/p/report.html").is_file()


def test_of_an_evaluation_that_is_kept_there_is_a_page(paste: Any, finished_run: Path, models: list[str]) -> None:
    words = ["capfilt", "evaluate", models[1], f"{finished_run}/data/test", "--address", "local"]
    assert [step[1] for step in steps_of(paste(words))] == ["annotate", "export"]
    annotate, report, _ = steps_of(paste([*words, "--out", "runs/e"]))
    paste(report)
    assert annotate[annotate.index("--filter") + 1] == next_steps.FILTER, "it is a captioner alone"


def test_from_download_to_a_model(paste: Any, hostile: Any, url_list: Any, models: list[str], tmp_path: Path) -> None:
    path = url_list(tmp_path, [*(hostile.url(f"/ok?seed={i}") for i in range(8)), hostile.url("/status/404")])
    at_home = ["--allow-private", "127.0.0.0/8", "--host-rate", "0"]
    words = ["capfilt", "download", path.name, "--out", "shards", "--caption-col", "text", *at_home]
    annotate, again, pretrain = steps_of(paste([*words, "--address", "local"]))
    steps_of(paste(again))
    assert len([asked for asked in hostile.paths() if asked.endswith("/status/404")]) == 2
    public = {next_steps.CAPTIONER: models[1], next_steps.FILTER: models[3]}
    assert set(public) <= set(annotate), "there is no network here: models of the tests stand in for them"
    paste([public.get(word, word) for word in annotate])
    paste(pretrain, *QUICK)


def test_what_is_printed_for_machines_has_none(
    capfilt: Any, finished_run: Path, models: list[str], tmp_path: Path
) -> None:
    done = capfilt("annotate", finished_run / "data/web/00000.tar", *models, "--out", tmp_path / "a", "--json")
    assert done.out.rstrip().endswith("}")


def test_the_public_models_are_those_of_the_documentation() -> None:
    root = Path(__file__).parents[2]
    for page in ("README.md", "docs/models.md"):
        text = (root / page).read_text()
        assert next_steps.CAPTIONER in text, page
        assert next_steps.FILTER in text, page


# ---- the policy that is proposed ----


def write(folder: Path, *scores: tuple[float | None, float | None]) -> Path:
    """Annotations of one shard with these (itm, itc)."""
    rows = [
        annotations.Annotation(f"{i:03d}", "u" * 32, "", "web", 0, "a text", itm, itc, "", "f", 0, 0)
        for i, (itm, itc) in enumerate(scores)
    ]
    annotations.write(folder / "annotations/00000.parquet", rows)
    return folder


def test_the_policy_that_is_proposed_keeps_something(tmp_path: Path) -> None:
    what, words = first_policy(write(tmp_path / "a", (0.9, 0.1), (0.6, 0.1), (0.1, 0.1), (0.2, 0.1), (None, None)))
    assert "50% of the first shard's" in what
    assert words == ["--threshold", "0.5"]
    what, words = first_policy(write(tmp_path / "b", (0.4, 0.1), (0.1, 0.3)))
    assert "no text of the first shard has itm >= 0.5" in what
    assert words == ["--score", "itc", "--keep-rate", "0.5"]
    what, words = first_policy(write(tmp_path / "c", (None, 0.1), (None, 0.3)))
    assert "this filter gives no itm" in what
    assert words == ["--score", "itc", "--keep-rate", "0.5"]


def test_a_folder_that_is_there_is_not_proposed(tmp_path: Path) -> None:
    assert beside(tmp_path / "a", "clean") == tmp_path / "a-clean"
    (tmp_path / "a-clean").mkdir()
    assert beside(tmp_path / "a", "clean") == tmp_path / "a-clean-2"
    assert str(beside("memory://bucket/runs/a", "clean")) == "a-clean"
