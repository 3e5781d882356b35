"""NLVR2 and SNLI-VE: JSON lines, each with a sentence about two pictures or about one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from capfilt.data.tasks.official.json_stream import lines
from capfilt.data.tasks.official.rows import Item, OfficialRow, entry_of, row

_TRUTH = {"True": True, "False": False}


def read_nlvr2(files: Sequence[str], splits: Sequence[str]) -> Iterator[Item]:
    """The statements of NLVR2: `dev-850-0-1` is sentence 1 on pair 0 of set 850, the same on its other pairs."""
    for place, entry in _entries(files):
        name = entry.get("identifier")
        parts = name.split("-") if isinstance(name, str) else []
        if len(parts) != 4:
            yield OfficialRow("statements", place, (), {}, f"identifier is not SPLIT-SET-PAIR-SENTENCE: {name!r}")
            continue
        label = entry.get("label")
        value = {"id": name, "text": entry.get("sentence"), "group": "-".join((*parts[:2], parts[3]))}
        if label is not None:
            value["label"] = _TRUTH.get(label, label) if isinstance(label, str) else label
        pair = "-".join(parts[:3])
        yield row("statements", name, (f"{pair}-img0.png", f"{pair}-img1.png"), value, place)


def read_snli_ve(files: Sequence[str], splits: Sequence[str]) -> Iterator[Item]:
    """The hypotheses of SNLI-VE, whose premises are pictures of Flickr30K."""
    for place, entry in _entries(files):
        id_, number = entry.get("pairID"), entry.get("Flickr30K_ID")
        number = str(number) if type(number) is int else number
        picture = f"{number}.jpg" if isinstance(number, str) and number else None
        value = {"id": id_, "text": entry.get("sentence2")}
        if entry.get("gold_label") is not None:
            value["label"] = entry["gold_label"]
        yield row("hypotheses", id_, (picture,), value, place)


def _entries(files: Sequence[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Each line with its place; one that is no object has no fields."""
    for url in files:
        for number, value in lines(url):
            yield f"{url.rpartition('/')[2]}:{number}", entry_of(value)
