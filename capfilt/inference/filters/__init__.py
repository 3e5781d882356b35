"""Filters: the role that says how well texts match an image."""

from __future__ import annotations

from capfilt.inference.filters.dual_encoder import DualEncoderFilter
from capfilt.inference.filters.fusion import FusionFilter
from capfilt.inference.local_model import LocalModel
from capfilt.inference.roles import scores_given


def local_filter(local: LocalModel, max_length: int | None = None) -> DualEncoderFilter:
    """The filter that a model in this process can be: one that gives itm where the model can fuse. `max_length`: tokens
    of a text that are read; None: as many as its family evaluates with."""
    fuses = "itm" in scores_given(local.model.capabilities)
    length = local.model.config.scored_length if max_length is None else max_length
    return (FusionFilter if fuses else DualEncoderFilter)(local, length)
