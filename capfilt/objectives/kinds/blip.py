"""BLIP's pretraining and fine-tuning, as recipes know it."""

from __future__ import annotations

from capfilt.models.blip.config import BlipConfig
from capfilt.objectives.config import NEEDS, ObjectivesConfig
from capfilt.objectives.kinds import TaskKind, built_by


def unsupported(architecture: BlipConfig, config: ObjectivesConfig, micro_batches: int) -> str:
    """What does not go together, as a sentence; "" for nothing."""
    if micro_batches > 1 and config.negatives == "all":
        return (
            f"micro_batches is {micro_batches}, and objectives.negatives 'all' takes images of other processes, whose "
            "gradients are gathered once a step: set it to 1."
        )
    if config.itc_keys == "detached":
        return (
            "objectives.itc_keys is detached, which is for BLIP-2: BLIP's keys are momentum features, which have no "
            "gradients; set it to all or rank."
        )
    return ""


BLIP = TaskKind(ObjectivesConfig, built_by("blip.BlipPretraining"), NEEDS, unsupported)
