"""Models: single-device, plain torch. Each family is a folder with the same file names, and one line in `registry`.

What needs torch is imported when it is first used: a recipe is checked without.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from capfilt.models.architecture import ArchitectureConfig
from capfilt.models.blip.config import BlipConfig
from capfilt.models.blip2.config import Blip2Config
from capfilt.models.family import Family, FamilyCode
from capfilt.models.registry import (
    FAMILIES,
    Architecture,
    ModelSection,
    architecture_of,
    blank,
    build,
    family_of,
    label,
    preprocess_of,
    read_architecture,
)

if TYPE_CHECKING:
    from capfilt.models.blip.model import Blip
    from capfilt.models.blip2.model import Blip2
    from capfilt.models.interface import Model

__all__ = [
    "FAMILIES",
    "Architecture",
    "ArchitectureConfig",
    "Blip",
    "Blip2",
    "Blip2Config",
    "BlipConfig",
    "Family",
    "FamilyCode",
    "Model",
    "ModelSection",
    "architecture_of",
    "blank",
    "build",
    "family_of",
    "label",
    "preprocess_of",
    "read_architecture",
]

_NEED_TORCH = {"Blip": "blip.model", "Blip2": "blip2.model", "Model": "interface"}


def __getattr__(name: str) -> Any:
    if name not in _NEED_TORCH:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_NEED_TORCH[name]}"), name)
