"""Two ranks, whole weights (DDP) or shared ones (FSDP2), in one piece or in several: the same steps as one process."""

from __future__ import annotations

import copy
import importlib.util
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from capfilt.models import Blip, Blip2
from capfilt.objectives.config import ObjectivesConfig
from capfilt.objectives.tasks import build_task
from capfilt.training.config import ExecutionConfig

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]  # two processes start, perhaps on a busy machine

SCRIPT = Path(__file__).with_name("ranks_of_a_step.py")
spec = importlib.util.spec_from_file_location("ranks_of_a_step", SCRIPT)
assert spec is not None
assert spec.loader is not None
script = importlib.util.module_from_spec(spec)
sys.modules["ranks_of_a_step"] = script
spec.loader.exec_module(script)

OBJECTIVES = {
    "itc": ("blip", {"losses": {"itc": 1.0}}),
    "itm": ("blip", {"losses": {"itm": 2.0}, "negatives": "all"}),
    "lm": ("blip", {"losses": {"lm": 1.0}}),
    "all three": ("blip", {"losses": {"itc": 1.0, "itm": 1.0, "lm": 1.0}, "negatives": "all"}),
    "a filter": (
        "blip",
        {"losses": {"itc": 1.0, "itm": 1.0}, "itc_targets": "image", "negatives": "all", "negatives_by": "online"},
    ),
    "first stage": ("blip2", {"losses": {"itc": 1.0, "itm": 1.0, "lm": 1.0}}),
    "second stage": ("opt", {"losses": {"lm": 1.0}}),
}
EXECUTIONS = {
    "ddp": ExecutionConfig(),
    "fsdp": ExecutionConfig(parallel="fsdp"),
    "ddp in pieces": ExecutionConfig(micro_batches=2),
    "fsdp in pieces": ExecutionConfig(parallel="fsdp", micro_batches=2),
}
IN_PIECES = ("itc", "lm", "second stage")
"""Those whose answer does not depend on which rank has which pairs, and that can be cut."""

TOLERANCE = math.sqrt(8 * 5 * 32) * 2.0**-24
"""Relative, 2.1e-6. A weight's gradient adds a product for each of 8 images' 5 tokens, and each of these was a sum over
a width of 32: roundings of fp32 (2^-24 each) in another order grow with the root of how many there are. Which order it
is depends on the ranks and on the instructions of the CPU."""
MOVED = 1e-2 * script.OPTIMIZER.lr
"""What may differ after a step of AdamW, which divides a gradient by its own size: roundings of small gradients
weigh as much as large gradients do."""

CASES = [
    (objectives, execution)
    for objectives in OBJECTIVES
    for execution in EXECUTIONS
    if "pieces" not in execution or objectives in IN_PIECES
]


@pytest.fixture(scope="module")
def cases(small_blip: Callable[..., Blip], small_blip2: Callable[..., Blip2]) -> dict[str, Any]:
    """One untrained learner for each objective, with eight pairs of six images and texts of unequal lengths."""
    made = {}
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(4, 190, (8, 7), generator=generator)
    for row, length in enumerate((7, 4, 5, 6, 3, 7, 4, 5)):
        ids[row, length:] = 0
    image_ids = torch.tensor([0, 1, 2, 3, 4, 0, 5, 2])
    batch = [torch.randn(8, 3, 16, 16, generator=generator), ids, (ids != 0).long(), image_ids]
    for name, (family, settings) in OBJECTIVES.items():
        model: Any = small_blip(init_std=0.1) if family == "blip" else small_blip2(family.removeprefix("blip2"))
        queue = 16 if family == "blip" else 0
        smoothing = {"smoothing": 0.0} if family == "opt" else {}
        config = ObjectivesConfig(**settings, **smoothing, queue=queue, momentum=0.5, mean_over="all")
        torch.manual_seed(0)
        made[name] = script.Case(build_task(model, config), batch, ExecutionConfig())
    return made


@pytest.fixture(scope="module")
def alone(cases: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one process makes of them, and the folder in which its states are."""
    folder = tmp_path_factory.mktemp("alone")
    found = {name: script.take(copy.deepcopy(case), 0, 1, folder / name) for name, case in cases.items()}
    return {"found": found, "folder": folder}


@pytest.fixture(scope="module")
def together(
    cases: dict[str, Any], alone: dict[str, Any], rank_pair: Any, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    """What each of two gloo ranks makes of them, and of the states of one process and of each other."""
    folder = tmp_path_factory.mktemp("together")

    def of(objectives: str, execution: str) -> Any:
        case = copy.deepcopy(cases[objectives])
        case.execution = EXECUTIONS[execution]
        return case

    task = {f"{objectives}, {execution}": of(objectives, execution) for objectives, execution in CASES}
    for execution in ("ddp", "fsdp"):
        task[f"in bf16, {execution}"] = replace(of("all three", execution), dtype=torch.bfloat16)
    resumed = {
        "fsdp from one process": (of("all three", "fsdp"), alone["folder"] / "all three"),
        "ddp from fsdp": (of("all three", "ddp"), folder / "all three, fsdp"),
        "fsdp from ddp": (of("all three", "fsdp"), folder / "all three, ddp"),
        "first stage, fsdp from one process": (of("first stage", "fsdp"), alone["folder"] / "first stage"),
    }
    torch.save({"cases": task, "resumed": resumed}, folder / "task.pt")
    rank_pair.run(SCRIPT, folder)
    found = [torch.load(folder / f"steps-{rank}.pt", weights_only=False) for rank in range(2)]
    return [{**one, "folder": folder} for one in found]


def close(found: dict[str, Tensor], wanted: dict[str, Tensor], atol: float = TOLERANCE) -> None:
    assert found.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(
            found[name], wanted[name], atol=atol, rtol=TOLERANCE, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize(("objectives", "execution"), CASES)
def test_losses_and_gradients_are_those_of_one_process(
    alone: dict[str, Any], together: list[dict[str, Any]], objectives: str, execution: str
) -> None:
    wanted = alone["found"][objectives]
    ranks = [one["taken"][f"{objectives}, {execution}"] for one in together]
    mean = {name: (ranks[0]["losses"][name] + ranks[1]["losses"][name]) / 2 for name in ranks[0]["losses"]}
    mean.pop("itm_accuracy", None)
    close(mean, {name: loss for name, loss in wanted["losses"].items() if name != "itm_accuracy"})
    scale = float(wanted["norm"])
    for found in ranks:
        close(found["gradients"], wanted["gradients"], atol=TOLERANCE * max(1.0, scale))
        torch.testing.assert_close(found["norm"], wanted["norm"], atol=0, rtol=TOLERANCE)
        assert found["clipped"] == pytest.approx(wanted["clipped"], rel=1e-5)
        queues = {name: t for name, t in found["after"].items() if "queue" in name or name.endswith("pointer")}
        close(queues, {name: wanted["after"][name] for name in queues}, atol=MOVED)


def test_autocast_computes_the_same_with_shared_weights(together: list[dict[str, Any]]) -> None:
    for one in together:
        whole, shared = (one["taken"][f"in bf16, {execution}"] for execution in ("ddp", "fsdp"))
        close(shared["losses"], whole["losses"])
        assert all(gradient.dtype == torch.float32 for gradient in shared["gradients"].values())
        exact = one["taken"]["all three, fsdp"]
        assert shared["losses"]["lm"] != exact["losses"]["lm"]
        assert float(shared["norm"]) == pytest.approx(float(exact["norm"]), rel=0.05)


@pytest.mark.parametrize("execution", ["ddp", "fsdp"])
def test_the_momentum_copy_follows_its_share(
    alone: dict[str, Any], together: list[dict[str, Any]], execution: str
) -> None:
    wanted = {n: t for n, t in alone["found"]["all three"]["after"].items() if n.startswith("momentum.model")}
    for one in together:
        after = one["taken"][f"all three, {execution}"]["after"]
        # A key's bias has no gradient but rounding, of which AdamW makes whole steps.
        steady = {name for name in wanted if ".key." not in name}
        close({n: after[n] for n in steady}, {n: wanted[n] for n in steady}, atol=2e-4)


@pytest.mark.parametrize(
    ("name", "execution", "objectives"),
    [
        ("fsdp from one process", "", "all three"),
        ("ddp from fsdp", "fsdp", "all three"),
        ("fsdp from ddp", "ddp", "all three"),
        ("first stage, fsdp from one process", "", "first stage"),
    ],
)
def test_states_are_taken_up_by_other_ranks_in_the_other_way(
    alone: dict[str, Any], together: list[dict[str, Any]], name: str, execution: str, objectives: str
) -> None:
    for one in together:
        back = one["resumed"][name]
        source = one["taken"][f"{objectives}, {execution}"] if execution else alone["found"][objectives]
        assert back["done"] == 2
        assert back["learner"].keys() == source["after"].keys()
        assert all(torch.equal(back["learner"][n], t) for n, t in source["after"].items())


def test_one_process_takes_up_the_state_of_two(cases: dict[str, Any], together: list[dict[str, Any]]) -> None:
    found = script.resumed(copy.deepcopy(cases["all three"]), together[0]["folder"] / "all three, fsdp")
    after = together[0]["taken"]["all three, fsdp"]["after"]
    assert all(torch.equal(found["learner"][name], tensor) for name, tensor in after.items())
    back = together[0]["resumed"]["ddp from fsdp"]["moments"]
    assert found["moments"].keys() == back.keys()
    for name, own in back.items():
        assert all(torch.equal(found["moments"][name][moment], tensor) for moment, tensor in own.items())
        assert float(own["step"]) == 2
