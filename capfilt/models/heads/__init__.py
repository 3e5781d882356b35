"""Models for downstream tasks: a model of any family that fuses, its `base`, and a head on what it fuses."""

from __future__ import annotations

from functools import partial
from importlib import import_module

from capfilt.models.family import Family, FamilyCode
from capfilt.models.heads.config import AnswererConfig, ClassifierConfig


def _code(module: str, model: str) -> FamilyCode:
    from capfilt.models.heads.base import blocks_of_families, continued, parts_of_base

    build = getattr(import_module(f"{__name__}.{module}"), model)
    initial = {part: parts_of_base(part) for part in ("vision", "text")}
    return FamilyCode(build=build, blocks=blocks_of_families(), continued=continued, initial=initial)


CLASSIFIER = Family("classifier", ClassifierConfig, partial(_code, "classifier", "Classifier"), written_as="capfilt")
ANSWERER = Family("answerer", AnswererConfig, partial(_code, "answerer", "Answerer"), written_as="capfilt")
