"""What the plan of a bootstrap holds, and what each of its stages requests to compute with.

The plan is the recipe without the fields that change no result: a resumed run may change those.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from capfilt.evaluation import evaluate
from capfilt.models import Architecture
from capfilt.pipelines.bootstrap.blip2_stages import stage_name
from capfilt.pipelines.bootstrap.config import BootstrapConfig
from capfilt.pipelines.bootstrap.data import input_names
from capfilt.stages import annotate
from capfilt.stages.compute import ComputeRequest
from capfilt.training.config import EXECUTION_FIELDS


def plan_of(config: BootstrapConfig, architecture: Architecture, final: Sequence[Architecture]) -> dict[str, Any]:
    """What makes two runs the same. A resumed run may ask for more rounds, and for other settings that decide only how
    its results are computed.
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
        train["features"] = bool(train["features"])  # whether, not in which folder
    plan |= {"architecture": architecture.model_dump(mode="json"), "inputs": input_names(config.data)}
    for stage, stage_architecture in zip(plan["final"], final, strict=True):
        stage["architecture"] = stage_architecture.model_dump(mode="json")
    return plan


def compute_requests(config: BootstrapConfig) -> dict[str, ComputeRequest]:
    """What the recipe says about the device and the number format of each stage; calibration computes as annotation
    does."""
    pretraining, finetuning, inference = config.cluster.train, config.cluster.finetune, config.cluster.annotate
    return {
        "pretrain": ComputeRequest(config.pretrain.precision, pretraining, training=True),
        "captioner": ComputeRequest(config.captioner.precision, finetuning, training=True),
        "filter": ComputeRequest(config.filter.precision, finetuning, training=True),
        **{
            stage_name(number): ComputeRequest(stage.train.precision, pretraining, training=True)
            for number, stage in enumerate(config.final)
        },
        "annotate": ComputeRequest(config.annotate.precision, inference),
        "evaluate": ComputeRequest("fp32", inference),
    }
