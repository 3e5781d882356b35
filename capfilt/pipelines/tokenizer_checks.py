"""Does the tokenizer of a recipe fit its model and its texts? Asked by `show`, and before a cluster is contacted.

What is not on this machine is not asked of: a recipe may be shown on another one than that which runs it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from capfilt.data import shards
from capfilt.data.text import fit
from capfilt.data.text.language_tokenizer import tokenizer_of
from capfilt.errors import RecipeError, ShardError
from capfilt.models import Architecture, ModelSection, label


class Texts(NamedTuple):
    """Some of the texts that a recipe reads."""

    key: str
    """The key that names their shards."""
    shards: str | tuple[str, ...]
    lengths: Mapping[str, int]
    """The tokens that a text may have in each training on them, by the key that says so."""


def is_here(source: str) -> bool:
    """Whether a tokenizer is the demo's or a file or folder of this machine."""
    return source == "world" or os.path.exists(source)


def are_here(spec: str | tuple[str, ...]) -> bool:
    """Whether shards are on this machine; nothing else is asked."""
    try:
        return not any("://" in pattern for pattern, _ in shards.patterns(spec)) and bool(shards.expand(spec))
    except ShardError:
        return False


def check_vocabulary(tokenizer: str, architecture: Architecture, model: ModelSection, key: str = "model") -> None:
    """Refuse a tokenizer with more entries than the model has embeddings for, if the tokenizer is on this machine.

    `key` is where the recipe gives the model. RecipeError, with what to set; TextError for one that cannot be used.
    """
    if not is_here(tokenizer):
        return
    entries = len(tokenizer_of(tokenizer, architecture.tokenizer_kind))
    if entries > architecture.vocabulary_size:
        setting = architecture.vocabulary_setting(entries)
        advice = f"set {key}.{setting}, or" if setting else "set"
        marks = ", [DEC] and [ENC] included" if architecture.tokenizer_kind == "wordpiece" else ""
        raise RecipeError(
            f"the tokenizer {tokenizer!r} has {entries} entries{marks}, and {key} ({label(model)}) has embeddings for"
            f" {architecture.vocabulary_size}: {advice} `tokenizer` to the vocabulary that belongs to it."
        )


def length_warnings(architecture: Architecture, lengths: Mapping[str, int], name: str = "the model") -> Iterator[str]:
    """The keys that allow texts for which the model has no positions: the first such text would end the run."""
    most = architecture.max_positions
    too_long = [f"{key} {length}" for key, length in lengths.items() if length > most]
    if too_long and architecture.language_kind is None:
        yield f"{name} has {most} positions, and a longer text ends the run: lower {', '.join(too_long)}."


def text_warnings(tokenizer: str, architecture: Architecture, texts: Iterable[Texts]) -> Iterator[str]:
    """What of the tokenizer and the lengths does not fit the texts, of which the first are read."""
    if architecture.language_kind is not None or not is_here(tokenizer):
        return
    loaded = tokenizer_of(tokenizer, architecture.tokenizer_kind)
    for some in texts:
        try:
            sample = fit.sample_texts(shards.expand(some.shards))
        except ShardError:  # whoever reads all of them says so
            continue
        yield from fit.warnings(tokenizer, loaded, sample, some.key, some.lengths)
