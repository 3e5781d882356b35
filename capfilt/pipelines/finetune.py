"""finetune: one recipe, one model for a downstream task.

The pipeline is `pretrain`'s, and so is the run folder; the recipes have a shelf of their own.
"""

from __future__ import annotations

from typing import ClassVar

from capfilt.pipelines.pretrain import PretrainConfig


class FinetuneConfig(PretrainConfig):
    """A recipe of `capfilt finetune`."""

    folder: ClassVar[str] = "finetune"
