"""BLIP-2's two stages, as recipes know them."""

from __future__ import annotations

from capfilt.models.blip2.config import Blip2Config
from capfilt.objectives.config import NEEDS, ObjectivesConfig
from capfilt.objectives.kinds import TaskKind, built_by

MOMENTUM_FIELDS = (
    "momentum", "alpha", "alpha_ramp", "negatives", "negatives_by", "negatives_epsilon", "momentum_from",
)  # fmt: skip
"""What ObjectivesConfig says of BLIP's ITC and ITM alone."""


def vanishing(architecture: Blip2Config) -> str:
    """Why no gradients come through a frozen language model; "" where they do. (LAVIS scales its loss.)"""
    if architecture.language is None or architecture.frozen != "fp16":
        return ""
    return (
        "frozen is fp16, in which gradients that come through a language model vanish unless they are "
        "scaled, and here they are not: set it to bf16, or to fp32."
    )


def unsupported(architecture: Blip2Config, config: ObjectivesConfig, micro_batches: int) -> str:
    """What does not go together, or what of BLIP's objectives BLIP-2 would pass over in silence; ""."""
    if reason := vanishing(architecture):
        return reason
    if config.queue:
        return f"objectives.queue is {config.queue}, and BLIP-2 has no queue: set it to 0."
    default = ObjectivesConfig()
    if given := [name for name in MOMENTUM_FIELDS if getattr(config, name) != getattr(default, name)]:
        return f"objectives.{given[0]} is of BLIP's momentum copy, which BLIP-2 does not have: leave it out."
    if config.itc_keys == "rank":
        return "objectives.itc_keys is rank, which is for BLIP's momentum features: set it to all or detached."
    if micro_batches > 1 and architecture.language is None:
        return (
            f"micro_batches is {micro_batches}, and BLIP-2's first stage compares all queries with all texts of the "
            "batch and is not cut: set it to 1."
        )
    return ""


def unsaid(architecture: Blip2Config, config: ObjectivesConfig) -> str:
    """The smoothing of a second stage: the default is that of BLIP and of the first stage."""
    if architecture.language is None or not config.smoothing or "smoothing" in config.model_fields_set:
        return ""
    return (
        f"objectives.smoothing is not given, and {config.smoothing:g} applies, as in BLIP and in BLIP-2's first stage; "
        f"the second was published without: set it to 0.0, or to {config.smoothing:g} if that is meant."
    )


BLIP2 = TaskKind(ObjectivesConfig, built_by("blip2.pretraining"), NEEDS, unsupported, unsaid)
