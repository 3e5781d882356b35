"""Models: single-device, plain torch. Each family is a folder with the same file names, and one line in `registry`."""

from capfilt.models.blip.model import Blip, BlipConfig
from capfilt.models.blip2.model import Blip2, Blip2Config
from capfilt.models.interface import ArchitectureConfig, Family, Model
from capfilt.models.registry import FAMILIES, Architecture, blank, build, family_of, read_architecture

__all__ = [
    "FAMILIES",
    "Architecture",
    "ArchitectureConfig",
    "Blip",
    "Blip2",
    "Blip2Config",
    "BlipConfig",
    "Family",
    "Model",
    "blank",
    "build",
    "family_of",
    "read_architecture",
]
