"""Models for downstream tasks: a model of any family that fuses, its `base`, and a head on what it fuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from capfilt.models.family import Family, FamilyCode
from capfilt.models.heads.config import AnswererConfig, ClassifierConfig

if TYPE_CHECKING:
    from capfilt.models.interface import Model


def _code(build: Callable[[Any], Model]) -> FamilyCode:
    from capfilt.models.heads.base import blocks_of_families, continued, parts_of_base

    initial = {part: parts_of_base(part) for part in ("vision", "text")}
    return FamilyCode(build=build, blocks=blocks_of_families(), continued=continued, initial=initial)


def _classifier() -> FamilyCode:
    from capfilt.models.heads.classifier import Classifier

    return _code(Classifier)


def _answerer() -> FamilyCode:
    from capfilt.models.heads.answerer import Answerer

    return _code(Answerer)


CLASSIFIER = Family(name="classifier", config=ClassifierConfig, load=_classifier, written_as="capfilt")
ANSWERER = Family(name="answerer", config=AnswererConfig, load=_answerer, written_as="capfilt")

__all__ = ["ANSWERER", "CLASSIFIER"]
