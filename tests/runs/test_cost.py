from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from capfilt.errors import UsageError
from capfilt.runs import cost
from capfilt.runs.cost import Price, run_cost, stage_figures
from capfilt.runs.ledger import Ledger
from capfilt.runs.stage_status import StagePlan, StageStatus
from capfilt.runs.tally import Tally
from capfilt.runs.usage import Usage

HOUR = 3600.0


def stand(stage: str, done: int, total: int, used: Usage | None, samples: int = 0, kept: int = 0) -> StageStatus:
    tally = Tally(samples=Counter({"in": samples, "kept": samples}))
    tally.texts["kept"]["web"] = kept
    return StageStatus(Ledger(Path(), stage), StagePlan(stage, total), done, tally, usage=used)


@pytest.mark.parametrize("given", ["gpu=3,cpu=0.05", "cpu=.05, gpu=3.0", {"gpu": 3.0, "cpu": 0.05}])
def test_a_price_is_of_an_hour_of_each_kind(given: str | dict[str, float]) -> None:
    price = Price.of(given)
    assert (price.gpu, price.cpu) == (3.0, 0.05)
    assert price.usd(Usage(cpu_reserved=10 * HOUR, gpu_reserved=2 * HOUR)) == pytest.approx(6.5)
    assert Price.of("gpu=0").usd(Usage()) == 0


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("", "--price names ''"),
        ({}, "names no price"),
        ("3.0", "--price names '3.0'"),
        ("gpus=3", "Did you mean 'gpu'?"),
        ("gpu=3,gpu=4", "has gpu twice"),
        ("gpu=", "gpu is ''"),
        ("gpu=3 USD", "gpu is '3 USD'"),
        ("cpu=-1", "0 or more"),
        ("cpu=nan", "0 or more"),
        ("cpu=inf", "0 or more"),
        ({"cpu": None}, "cpu is None"),
    ],
)
def test_what_is_no_price_is_refused(given: object, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        Price.of(given)  # type: ignore[arg-type]
    assert said in str(caught.value)
    assert "gpu=3.0,cpu=0.05" in str(caught.value)


def test_a_stage_costs_what_was_reserved_and_what_is_left_at_the_same_rate() -> None:
    used = Usage(done=2, samples=500, busy=100, cpu_busy=200, cpu_reserved=2 * HOUR, gpu_busy=100, gpu_reserved=HOUR)
    figures = stage_figures(stand("annotate", 2, 8, used, samples=500), Price(cpu=0.05, gpu=3))
    assert figures == {
        "usage": {
            "images_per_second_per_worker": 5.0,
            "cpu_seconds": {"busy": 200, "reserved": 7200},
            "gpu_seconds": {"busy": 100, "reserved": 3600},
        },
        "cost": {"usd": 3.1, "usd_expected": 12.4, "usd_per_million_images": 6200},
    }


def test_what_was_not_measured_is_absent() -> None:
    price = Price(cpu=1)
    assert stage_figures(stand("annotate", 2, 2, None, samples=9), price) == {}
    nothing_done = stage_figures(stand("annotate", 0, 2, Usage(cpu_reserved=HOUR)), price)
    assert nothing_done["cost"] == {"usd": 1}
    assert "images_per_second_per_worker" not in nothing_done["usage"]
    on_gpu = Usage(done=1, gpu_reserved=1)
    assert "cost" not in stage_figures(stand("annotate", 1, 2, on_gpu), price), "GPUs have no price"
    assert run_cost([stand("annotate", 1, 2, on_gpu)], price) == {"price": {"cpu": 1}, "unpriced": ["gpu"]}
    assert run_cost([], price) == {"price": {"cpu": 1}}


def test_a_run_costs_what_its_stages_do_together() -> None:
    annotated = stand("annotate", 4, 4, Usage(done=4, samples=1000, cpu_reserved=3 * HOUR), samples=1000)
    trained = stand("pretrain", 10, 40, Usage(done=10, samples=640, cpu_reserved=HOUR))
    selected = stand("select", 4, 4, Usage(done=4, samples=1000, cpu_reserved=HOUR), samples=1000, kept=500)
    assert run_cost([annotated, selected, trained], Price(cpu=1)) == {
        "price": {"cpu": 1},
        "usd": 5,
        "usd_expected": 8,
        "usd_per_million_images": 5000,
        "usd_per_million_kept_texts": 10000,
    }


def test_a_fork_pays_for_what_it_did_and_its_rates_are_of_what_it_measured() -> None:
    """Three quarters of the annotations were taken over: they are not paid again, and a million would cost the same."""
    annotated = stand("annotate", 4, 4, Usage(done=1, samples=250, cpu_reserved=HOUR), samples=1000)
    assert run_cost([annotated], Price(cpu=1)) == {
        "price": {"cpu": 1}, "usd": 1, "usd_expected": 1, "usd_per_million_images": 4000,
    }  # fmt: skip
    taken_over = stand("select", 4, 4, None, samples=1000, kept=10)
    assert run_cost([annotated, taken_over], Price(cpu=1)) == {"price": {"cpu": 1}, "usd": 1, "usd_expected": 1}


def test_what_the_driver_commits_by_itself_hides_no_figure() -> None:
    annotated = stand("annotate", 1, 1, Usage(done=1, samples=100, cpu_reserved=HOUR), samples=100)
    alone = stand("contaminated", 1, 1, None)
    assert run_cost([annotated, alone], Price(cpu=1))["usd_per_million_images"] == 10000


def test_an_image_that_was_done_twice_counts_once_in_what_a_million_cost() -> None:
    again = stand("annotate", 4, 4, Usage(done=8, samples=2000, cpu_reserved=HOUR), samples=1000)
    assert stage_figures(again, Price(cpu=1))["cost"]["usd_per_million_images"] == 1000


def test_a_person_reads_the_cost_in_a_line() -> None:
    (line,) = cost.lines(run_cost([stand("annotate", 1, 2, Usage(1, 10, cpu_reserved=HOUR), 10)], Price(cpu=1)))
    assert line == (
        "cost        1.00 USD so far; 2.00 USD in all, of the stages that have begun; 100,000.00 USD per million images"
        " (at 1 USD a CPU-hour, reserved)"
    )
    (line,) = cost.lines({"price": {"cpu": 1.0}, "unpriced": ["gpu"]})
    assert line == "no cost: GPU time was used, and --price does not say what an hour of it costs"
    (line,) = cost.lines({"price": {"cpu": 1.0}})
    assert line == "no cost: nothing that was used has been measured"


def test_a_table_has_the_columns_that_say_something() -> None:
    used = {
        "images_per_second_per_worker": 12.34,
        "cpu_seconds": {"busy": 5.0, "reserved": 8.0},
        "gpu_seconds": {"busy": 0.0, "reserved": 0.0},
    }
    rest = {name: used[name] for name in ("cpu_seconds", "gpu_seconds")}
    headings, rows = cost.table_of_usage([{"label": "annotate", "usage": used}, {"label": "train", "usage": rest}])
    assert headings == ["stage", "images/s per worker", "CPU-seconds reserved", "CPU-seconds busy"]
    assert rows == [["annotate", "12.3", "8", "5"], ["train", "–", "8", "5"]]
    assert cost.table_of_usage([]) == ([], [])
