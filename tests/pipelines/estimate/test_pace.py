from __future__ import annotations

import json
from pathlib import Path

import pytest

from capfilt.errors import RunError
from capfilt.pipelines.estimate.intervals import Figure
from capfilt.pipelines.estimate.pace import Times
from capfilt.runs.progress import Progress


def test_the_first_piece_of_a_worker_is_start_up() -> None:
    pieces = [(5.0, 10, 9.0), *((1.0, 10, 10.0 + number) for number in range(4))]
    times = Times(pieces, parallel=1, took=13.5)
    assert times.per_image == Figure(0.1, 0.1, 0.1)
    assert times.startup == pytest.approx(4 + 0.5 + 4), "before the work, after it, and what the first one took beyond"
    whole = times.whole(Figure.of(1000), 100, 4)
    assert whole.value == pytest.approx(1000 * 0.1 / 4 + 8.5)


def test_the_last_turn_takes_as_long_as_the_others() -> None:
    times = Times([(1.0, 10, 1.0)] * 5, parallel=1, took=1.0)
    assert times.whole(Figure.of(100), 10, 8).value == pytest.approx(2.0 * 10 * 0.1, abs=0.01)
    assert times.whole(Figure.of(100), 10, 1000).value == pytest.approx(1.0, abs=0.01), (
        "more workers have nothing to do"
    )


def test_one_piece_has_no_interval() -> None:
    times = Times([(2.0, 10, 3.0)], parallel=1, took=3.0)
    assert times.per_image.value == pytest.approx(0.2)
    assert times.per_image.low != times.per_image.low


def test_times_are_kept_and_found_again(tmp_path: Path) -> None:
    def work(show: Progress) -> None:
        with show.stage("annotate", 2) as line:
            line.resume(0)
            for done, seconds in ((1, 0.5), (2, 0.25)):
                line.start_clock(seconds)
                line.update(done, "", {"in": 10 * done})

    def nothing(show: Progress) -> None:
        with show.stage("annotate", 2) as line:
            line.resume(2, {"in": 20})

    path = tmp_path / "annotate.json"
    first = Times.measure(work, "annotate", path, Progress(quiet=True))
    (busy, *_), second = first.pieces
    assert busy == pytest.approx(0.5)
    assert second == (pytest.approx(0, abs=0.1), 10, pytest.approx(0, abs=0.1)), "from the end of the one before"
    assert Times.measure(nothing, "annotate", path, Progress(quiet=True)) == Times(
        [tuple(piece) for piece in json.loads(path.read_text())["pieces"]], first.parallel, first.took
    )
    path.unlink()
    with pytest.raises(RunError, match="give another --out"):
        Times.measure(nothing, "annotate", path, Progress(quiet=True))
