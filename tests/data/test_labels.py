from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

import pytest

from capfilt.data import labels
from capfilt.data.labels import Label
from capfilt.errors import RunError
from capfilt.storage.remote_path import RemotePath


def label(text: str = "a dog", verdict: str = "right", uid: str = "u1", at_random: bool = True) -> Label:
    return Label(uid, text, "web", verdict, at_random)


def test_the_newest_label_of_a_text_counts_and_can_be_taken_back(tmp_path: Path) -> None:
    assert labels.read(tmp_path) == {}
    for given in (label(), label("a cat", "wrong"), label(verdict="wrong"), label("a cat", "none")):
        labels.append(tmp_path, given)
    assert labels.read(tmp_path) == {("u1", "a dog"): label(verdict="wrong")}
    assert len((tmp_path / labels.FILE).read_bytes().splitlines()) == 4


@pytest.mark.parametrize("text", ["line\nbreak", '"quotes"', "\u202eevil", "\ud800", "x" * 10_000, ""])
def test_whatever_a_text_says_is_one_line(tmp_path: Path, text: str) -> None:
    labels.append(tmp_path, label(text))
    (line,) = (tmp_path / labels.FILE).read_bytes().splitlines()
    assert json.loads(line)["text"] == text.encode("utf-8", "replace").decode()


def test_a_line_that_a_kill_cut_short_takes_no_other_with_it(tmp_path: Path) -> None:
    labels.append(tmp_path, label())
    with (tmp_path / labels.FILE).open("ab") as file:
        file.write(b'{"uid": "u2", "text": "a b')
    labels.append(tmp_path, label("a cat"))
    assert set(labels.read(tmp_path)) == {("u1", "a dog"), ("u1", "a cat")}


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    labels.append(tmp_path, label())
    with (tmp_path / labels.FILE).open("ab") as file:
        file.write(b'{"uid": "u2", "verdict": "rigth"}\n')
    with pytest.raises(RunError, match=r"labels\.jsonl, line 2 is no label"):
        labels.read(tmp_path)


def test_no_such_verdict(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="right, wrong, none, not 'maybe'"):
        labels.append(tmp_path, label(verdict="maybe"))
    assert not (tmp_path / labels.FILE).exists()


def write_many(folder: Path, who: int) -> None:
    for number in range(50):
        labels.append(folder, label("x" * 500 + f" {number}", uid=f"u{who}"))


def test_several_writers_do_not_mix_their_lines(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("spawn")
    writers = [fork.Process(target=write_many, args=(tmp_path, who)) for who in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert len(labels.read(tmp_path)) == 100


def test_labels_lie_in_the_run_folder_that_a_round_belongs_to(tmp_path: Path) -> None:
    run, round_1 = tmp_path / "run", tmp_path / "run/round-1"
    round_1.mkdir(parents=True)
    (run / "plan.json").write_text("{}")
    assert labels.run_folder_of(round_1) == run
    assert labels.run_folder_of(run) == run


@pytest.mark.parametrize(
    # Newcombe, "Two-sided confidence intervals for the single proportion", 1998, Table I, method 3.
    ("hits", "total", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_s_intervals_are_the_published_ones(hits: int, total: int, low: float, high: float) -> None:
    assert labels.wilson_interval(hits, total) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))
    mirrored = labels.wilson_interval(total - hits, total)
    assert mirrored == (pytest.approx(1 - high, abs=5e-5), pytest.approx(1 - low, abs=5e-5))


def test_without_labels_the_interval_is_all() -> None:
    assert labels.wilson_interval(0, 0) == (0, 1)
    assert labels.precision_and_recall([], 0.5) == {"labels": 0, "right": 0}


def test_precision_and_recall_of_labelled_texts() -> None:
    judged = [(0.9, True), (0.5, True), (0.7, False), (0.4, True), (0.1, False)]
    found = labels.precision_and_recall(judged, 0.5)
    assert (found["labels"], found["right"]) == (5, 3)
    assert found["precision"] == pytest.approx(2 / 3)
    assert found["recall"] == pytest.approx(2 / 3)
    assert found["precision_interval"] == list(labels.wilson_interval(2, 3))
    assert "precision" not in labels.precision_and_recall(judged, 0.95), "nothing is kept"


def test_labels_on_a_store(store: RemotePath) -> None:
    assert labels.read(store) == {}
    given = Label("u1", "a dog", "web", "right", True)
    labels.append(store, given)
    labels.append(store, Label("u2", "a cat", "web", "wrong", False))
    assert labels.read(store)["u1", "a dog"] == given
    assert len(labels.read(store)) == 2
