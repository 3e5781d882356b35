"""Karpathy's splits of COCO and Flickr30k: a JSON of pictures with their captions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from capfilt.data.tasks.official.rows import Item, OfficialRow, OtherSplit, entries, entry_of, row


def read(files: Sequence[str], splits: Sequence[str]) -> Iterator[Item]:
    """The captions of the pictures of some splits; a picture without captions is a row that cannot be used."""
    for url in files:
        for place, entry in entries(url, "images"):
            file, folder, sentences = entry.get("filename"), entry.get("filepath"), entry.get("sentences")
            if entry and (split := str(entry.get("split"))) not in splits:
                yield OtherSplit(split)
                continue
            picture = f"{folder}/{file}" if isinstance(file, str) and isinstance(folder, str) and folder else file
            if not isinstance(sentences, list) or not sentences:
                yield OfficialRow("captions", place, (), {}, "the picture has no sentences")
                continue
            for order, sentence in enumerate(map(entry_of, sentences)):
                value = {"text": sentence.get("raw"), "source": "human"}
                yield row("captions", sentence.get("sentid"), (picture,), value, f"{place}[{order}]")
