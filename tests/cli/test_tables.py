from __future__ import annotations

import json

import pytest

from capfilt.cli.tables import print_estimate, print_rounds, print_status, print_verified, watch_status


def test_the_table_has_a_dash_for_what_was_not_measured(capsys: pytest.CaptureFixture[str]) -> None:
    measured = {
        "round": 1,
        "seconds": 61.7,
        "kept": {"web": 30, "synthetic": 0},
        "noise_ratio": {"web": 0.25, "synthetic": 1.0},
        "filter": {"auc": 0.98765, "precision": 0.9},
        "retrieval": {"tr@1": 12.34, "ir@1": 5.0},
        "captioning": {"cider": 40.06},
    }
    print_rounds({"rounds": [{"round": 0, "seconds": 9.0}, measured]})
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    cells = [[cell.strip() for cell in row.strip("│").split("│")] for row in rows]
    assert cells == [
        ["0", *"--------", "9"],
        ["1", "30 (75%)", "0 (0%)", "0.988", "0.900", "-", "12.3", "5.0", "40.1", "62"],
    ]


def test_tasks_have_a_table_of_their_own(capsys: pytest.CaptureFixture[str]) -> None:
    first = {"vqa": {"accuracy": 40.0, "prior_by_question_type": 35.64}, "classification": {"top1": 20.04}}
    last = {"vqa": {"accuracy": 51.26, "prior_by_question_type": 35.64}, "grounding": {"accuracy": 60.0}}
    rounds = [{"round": r, "seconds": 1.0, "tasks": tasks} for r, tasks in enumerate((first, last))]
    print_rounds({"rounds": rounds})
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("│")][2:]
    assert [[cell.strip() for cell in row.strip("│").split("│")] for row in rows] == [
        ["VQA accuracy", "35.6", "40.0", "51.3", "+11.3"],
        ["grounding IoU ≥ 0.5", "-", "-", "60.0", "-"],
        ["zero-shot top-1", "-", "20.0", "-", "-"],
    ]


def test_status_shows_the_rate_and_why_things_failed(capsys: pytest.CaptureFixture[str]) -> None:
    running = {"label": "annotate", "unit": "shards", "done": 30, "total": 90, "samples": {"in": 99, "failed": 4}}
    running |= {"failed": {"no image": 4}, "errors": {"killed its worker": 1}, "per_second": 0.5, "seconds_left": 120}
    over = {"label": "round 0 pretrain", "unit": "steps", "done": 9, "total": 9, "samples": {}}
    over |= {"failed": {}, "errors": {}, "per_second": 1.0, "seconds_left": 0}
    print_status({"run": "runs/a", "state": "died", "stages": [over, running]})
    out = capsys.readouterr().out
    rows = [line for line in out.splitlines() if line.startswith("│")]
    assert [[cell.strip() for cell in row.strip("│").split("│")] for row in rows] == [
        ["round 0 pretrain", "9/9 steps", "60.0", "-", "0"],
        ["annotate", "30/90 shards", "30.0", "2 min", "4"],
    ]
    assert "annotate: 1 shards failed: killed its worker\nannotate: 4 samples failed: no image\n" in out


def test_verify_names_twenty_and_says_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    piece = {"folder": ".", "stage": "annotate", "shard": "00000", "why": "it is gone"}
    answer = {"run": "runs/a", "shards": 30, "files": 40, "bytes": 50, "undone": 2, "withdrawn": 0, "members": {}}
    print_verified({**answer, "broken": [piece] * 23})
    out = capsys.readouterr().out
    assert out.count("annotate, shard 00000: it is gone") == 20
    assert "and 3 more; --json names all" in out
    assert "23 are not as committed: `capfilt verify runs/a --mend`, then the same command" in out
    assert "2 shards are not done yet" in out
    print_verified({**answer, "broken": [piece], "withdrawn": 1})
    assert "1 withdrawn: run the command that made them again" in capsys.readouterr().out
    print_verified({**answer, "broken": []})
    assert "everything is as it was committed" in capsys.readouterr().out


def test_without_a_terminal_what_goes_on_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    stage = {"folder": ".", "stage": "annotate", "label": "annotate", "unit": "shards", "total": 90}
    stage |= {"samples": {"failed": 4}, "failed": {}, "errors": {}, "per_second": 0.5, "seconds_left": 120}
    looks = [
        {"run": "runs/a", "state": state, "stages": [{**stage, "done": done}]}
        for state, done in (("working", 30), ("working", 30), ("working", 31), ("stopped", 31))
    ]
    watch_status(looks, as_json=False)
    assert capsys.readouterr().out.splitlines() == [
        "annotate                 30/90 shards  30.0 per minute  2 min left  4 samples failed",
        "runs/a: working",
        "annotate                 31/90 shards  30.0 per minute  2 min left  4 samples failed",
        "runs/a: stopped",
    ]
    watch_status(looks[:2], as_json=True)
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == looks[:2]


def test_an_estimate_says_the_ends_that_it_knows(capsys: pytest.CaptureFixture[str]) -> None:
    rate = "images_per_second_per_worker"
    record = {
        "drawn": {"drawn": 100, "shards_read": 1, "shards": 1, "seed": 0}, "workers": 4, "report": "r.html",
        f"{rate}.annotate": {"value": 104.4, "low": 39.3}, f"{rate}.select": {"value": 8.0},
        "samples": {"value": 200, "low": 200, "high": 200}, "hours": {"value": 2.0, "low": 1.0, "high": 3.0},
        "start_up_seconds": {"annotate": 4.1},
    }  # fmt: skip
    print_estimate(record)
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[1:5] == [
        f"{rate}.annotate 104.4 (at least 39.3)",
        f"{rate}.select 8.0",
        "samples 200 (exactly)",
        "hours 2 h (1 h to 3 h)",
    ]
