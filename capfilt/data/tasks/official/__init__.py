"""Data sets of the downstream tasks, read row by row from the files in which they are published (docs/tasks.md)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from capfilt.data.tasks.official import dialog, grounding, karpathy, sentences, vqa
from capfilt.data.tasks.official.rows import Item, Label, OfficialRow, OtherSplit, Picture, check

READERS: Mapping[str, Callable[[Sequence[str], Sequence[str]], Iterator[Item]]] = {
    "vqa": vqa.read,
    "nlvr2": sentences.read_nlvr2,
    "entailment": sentences.read_snli_ve,
    "grounding": grounding.read,
    "dialog": dialog.read,
    "retrieval": karpathy.read,
    "captioning": karpathy.read,
}
"""By task: what reads files, given their paths and the splits that are wanted; DataError for files of another kind."""

WITH_SPLITS = ("grounding", "retrieval", "captioning")
"""Tasks whose files hold several splits, of which some must be chosen."""
