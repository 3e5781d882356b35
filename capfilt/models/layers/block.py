"""How a block of a transformer is treated where blocks are gathered (FSDP) or compiled one by one."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Block:
    """A kind of module that FSDP gathers and torch compiles one by one."""

    kind: type[nn.Module]
    entry_points: tuple[str, ...] = ()
    """Its methods, besides `forward`, that use its weights."""
    repeated: bool = False
    """Whether it runs several times a step and, where it is trained, keeps its gathered weights in between."""
