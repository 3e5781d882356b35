"""What the plan of a bootstrap holds, and what each of its stages requests to compute with.

The plan is the recipe without the fields that change no result: a resumed run may change those.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from capfilt.evaluation import config as evaluation_config
from capfilt.inference import config as inference_config
from capfilt.models import Architecture
from capfilt.models.architecture import ModelRole
from capfilt.pipelines.bootstrap import tasks
from capfilt.pipelines.bootstrap.config import BootstrapConfig
from capfilt.pipelines.bootstrap.context import RoleSource
from capfilt.pipelines.bootstrap.pool.data import input_names
from capfilt.pipelines.bootstrap.roles.blip2_stages import stage_name
from capfilt.pipelines.bootstrap.roles.sources import training_plan
from capfilt.stages.compute import ComputeRequest


def plan_of(
    config: BootstrapConfig,
    architecture: Architecture,
    final: Sequence[Architecture],
    roles: Mapping[ModelRole, RoleSource],
) -> dict[str, Any]:
    """What makes two runs the same. A resumed run may ask for more rounds, for downstream tasks, and for other settings
    that decide only how its results are computed.
    """
    exclude: dict[str, Any] = {
        "rounds": True,
        "cluster": True,
        "data": {
            "download": {"manners": True, "thread_count": True},
            "world": {"task_train": True, "task_test": True},
            "allow_contamination": True,
        },
        "annotate": inference_config.EXECUTION_FIELDS,
        "evaluate": {**evaluation_config.EXECUTION_FIELDS, "tasks": True},
    }
    plan = config.model_dump(mode="json", exclude=exclude)
    plan["pretrain"] = training_plan(config.pretrain)
    plan["select"] = config.select.record()
    plan |= {role: source.plan() for role, source in roles.items()}
    for stage, stage_config in zip(plan["final"], config.final, strict=True):
        stage["train"] = training_plan(stage_config.train)
    plan |= {"architecture": architecture.model_dump(mode="json"), "inputs": input_names(config.data)}
    for stage, stage_architecture in zip(plan["final"], final, strict=True):
        stage["architecture"] = stage_architecture.model_dump(mode="json")
    return plan


def compute_requests(config: BootstrapConfig, roles: Mapping[ModelRole, RoleSource]) -> dict[str, ComputeRequest]:
    """What the recipe says about the device and the number format of each stage; calibration computes as annotation
    does."""
    pretraining, inference = config.cluster.train, config.cluster.annotate
    return {
        "pretrain": ComputeRequest(config.pretrain.precision, pretraining, training=True),
        **{name: request for source in roles.values() for name, request in source.compute_requests().items()},
        **{
            stage_name(number): ComputeRequest(stage.train.precision, pretraining, training=True)
            for number, stage in enumerate(config.final)
        },
        "annotate": ComputeRequest(config.annotate.precision, inference),
        "evaluate": ComputeRequest(config.evaluate.precision, inference),
        **tasks.compute_requests(config),
    }
