"""How large an architecture may be: a number in a YAML or a `config.json` costs nothing to write, and memory to build.

The largest vision transformers have 48 layers and 22 billion weights, the deepest public language models 126 layers.
"""

from __future__ import annotations

import os
from typing import Annotated

from pydantic import Field

from capfilt.errors import ModelError

MAX_DEPTH, MAX_ENTRIES, MAX_WEIGHTS = 256, 2**22, 10**11

Depth = Annotated[int, Field(ge=1, le=MAX_DEPTH)]
"""Layers of a stack."""
Width = Annotated[int, Field(ge=1, le=2**16)]
Hidden = Annotated[int, Field(ge=1, le=2**18)]
"""Inner width of feed-forward layers."""
Heads = Annotated[int, Field(ge=1, le=1024)]
Entries = Annotated[int, Field(ge=3, le=MAX_ENTRIES)]
"""Words of a vocabulary."""
Positions = Annotated[int, Field(ge=1, le=2**20)]
Side = Annotated[int, Field(ge=1, le=4096)]
"""Of a picture or a patch, in pixels."""
Rate = Annotated[float, Field(ge=0, lt=1)]
Epsilon = Annotated[float, Field(gt=0, le=1)]
Deviation = Annotated[float, Field(ge=0, le=100)]
Temperature = Annotated[float, Field(gt=0, le=1000)]


def refuse_too_many(what: str, weights: int) -> None:
    """Raise ValueError for a stack of more weights than any model here can have."""
    if weights > MAX_WEIGHTS:
        raise ValueError(f"{what} would have {weights:.1e} weights; allowed are {MAX_WEIGHTS:.0e}")


def refuse_too_large(weights: int) -> None:
    """Raise ModelError for a new model that does not fit into this machine's memory, before any of it is allocated."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if 4 * weights > memory:
        raise ModelError(
            f"the architecture has about {weights:.1e} weights, {4 * weights / 1e9:.0f} GB in fp32, and this machine "
            f"has {memory / 1e9:.0f} GB of memory; take a smaller one (width, depth, vocab_size)"
        )
