"""What the plan of a bootstrap holds, and how each of its stages is to compute: what its recipe says, without what
changes no outcome.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from capfilt.errors import RecipeError
from capfilt.evaluation import evaluate
from capfilt.pipelines.bootstrap.blip2_stages import name
from capfilt.pipelines.bootstrap.data import inputs
from capfilt.stages import annotate
from capfilt.stages.compute import ComputeRequest
from capfilt.training.config import EXECUTION_FIELDS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from capfilt.models import Architecture
    from capfilt.pipelines.bootstrap.rounds import BootstrapConfig


def plan_of(config: BootstrapConfig, architecture: Architecture, final: Sequence[Architecture]) -> dict[str, Any]:
    """What makes two runs the same. More rounds may be asked of the same folder, and whatever else decides only how
    its contents are computed.
    """
    exclude: dict[str, Any] = {
        "rounds": True,
        "cluster": True,
        "data": {"download": {"manners": True, "thread_count": True}},
        **dict.fromkeys(("pretrain", "captioner", "filter"), EXECUTION_FIELDS),
        "final": {"__all__": {"train": EXECUTION_FIELDS}},
        "annotate": annotate.EXECUTION_FIELDS,
        "evaluate": evaluate.EXECUTION_FIELDS,
    }
    plan = config.model_dump(mode="json", exclude=exclude)
    for train in (plan["pretrain"], plan["captioner"], plan["filter"], *(stage["train"] for stage in plan["final"])):
        train["features"] = bool(train["features"])  # not where they lie
    plan |= {"architecture": architecture.model_dump(mode="json"), "inputs": inputs(config.data)}
    for stage, own in zip(plan["final"], final, strict=True):
        stage["architecture"] = own.model_dump(mode="json")
    return plan


def wanted(config: BootstrapConfig) -> dict[str, ComputeRequest]:
    """What the recipe says of the device and the format of each stage; calibrating computes as annotating does."""
    pretraining, finetuning, held = config.cluster.train, config.cluster.finetune, config.cluster.annotate
    return {
        "pretrain": ComputeRequest(config.pretrain.precision, pretraining, training=True),
        "captioner": ComputeRequest(config.captioner.precision, finetuning, training=True),
        "filter": ComputeRequest(config.filter.precision, finetuning, training=True),
        **{
            name(i): ComputeRequest(stage.train.precision, pretraining, training=True)
            for i, stage in enumerate(config.final)
        },
        "annotate": ComputeRequest(config.annotate.precision, held),
        "evaluate": ComputeRequest("fp32", held),
    }


def check_momentum(config: BootstrapConfig) -> None:
    """Refuse a training that would go on with a momentum copy that nobody kept."""
    if config.pretrain.objectives.momentum_from == "start":
        raise RecipeError(
            "pretrain.objectives.momentum_from is 'start', and round 0 starts from nothing: take 'model'."
        )
    if config.filter.objectives.momentum_from == "start" and not config.pretrain.keep_momentum:
        raise RecipeError(
            "filter.objectives.momentum_from is 'start': set pretrain.keep_momentum=true, or take 'model'."
        )
