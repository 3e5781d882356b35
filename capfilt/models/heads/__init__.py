"""Models for downstream tasks: a model of any family that fuses, its `base`, and a head on what it fuses."""

from __future__ import annotations

from capfilt.models.family import Family, FamilyCode
from capfilt.models.heads.config import ClassifierConfig


def _classifier() -> FamilyCode:
    from capfilt.models.heads.base import blocks_of_families, continued, parts_of_base
    from capfilt.models.heads.classifier import Classifier

    return FamilyCode(
        build=Classifier,
        blocks=blocks_of_families(),
        continued=continued,
        initial={part: parts_of_base(part) for part in ("vision", "text")},
    )


CLASSIFIER = Family(name="classifier", config=ClassifierConfig, load=_classifier, written_as="capfilt")

__all__ = ["CLASSIFIER"]
