"""Who looks and speaks: single-device, plain torch.

A family is one file, one line in each table here, and its YAML shelf.
"""

from __future__ import annotations

from collections.abc import Callable

from capfilt.models.blip import Blip, BlipConfig, verbs

FAMILIES: dict[str, type[BlipConfig]] = {"blip": BlipConfig}
"""The architecture config of each family, by the name that a YAML gives in `family:`."""

MODELS: dict[str, Callable[[BlipConfig], Blip]] = {"blip": Blip}
"""What builds a model from its architecture."""

__all__ = ["FAMILIES", "MODELS", "Blip", "BlipConfig", "verbs"]
