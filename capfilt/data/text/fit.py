"""How well a tokenizer and a text length fit the texts of shards, measured on a sample before anything is trained.

The demo's vocabulary has some hundred words: it can read any text, letter by letter, and no model learns from that.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence

from capfilt.data import shards
from capfilt.data.sample import Sample
from capfilt.data.text.tokenizer import MAX_CHARACTERS, Tokenizer

SAMPLE = 200
"""Texts that are read, of the first shard."""
SPELLED = 0.3
"""The share of characters from which on a tokenizer is warned of: on COCO's captions the demo's has 0.8, BERT's 0."""
CUT = 0.25
"""The share of texts from which on a length is warned of."""


def sample_texts(urls: Sequence[str]) -> list[str]:
    """The first texts of the first shards. ShardError for a shard that cannot be read."""
    read = (shards.read_lines(url) if shards.is_lines(url) else shards.read(url) for url in urls)
    items = itertools.chain.from_iterable(read)
    return list(itertools.islice(_texts(items), SAMPLE))


def _texts(items: Iterator[object]) -> Iterator[str]:
    for item in items:
        if isinstance(item, Sample):
            yield from (str(caption["text"]) for caption in item.captions)


def warnings(
    name: str, tokenizer: Tokenizer, texts: Sequence[str], where: str, lengths: Mapping[str, int]
) -> Iterator[str]:
    """What does not fit, as sentences with what to do.

    Args:
        name: how the recipe names the tokenizer.
        texts: a sample.
        where: the key that says where they are from.
        lengths: the tokens that a text may have, by the key that says so.
    """
    cleaned = [text for text in map(tokenizer.clean, texts) if text]
    if not cleaned:
        return
    spelled, total = (sum(counts) for counts in zip(*map(tokenizer.spelled_out, cleaned), strict=True))
    if spelled >= SPELLED * total:
        whose = "it has the words of the demo's world alone" if name == "world" else "they are not in its language"
        yield (
            f"the tokenizer {name!r} spells out {spelled / total:.0%} of the characters of {where} letter by letter"
            f" ({len(cleaned)} texts): {whose}. Set `tokenizer` to the vocabulary of a"
            f" {tokenizer.known_as} for these texts, and model.text.vocab_size to its size{tokenizer.marks_beside}."
        )
        return  # which makes them long
    counts = sorted(int(mask.sum()) for mask in (tokenizer.encode([text], MAX_CHARACTERS)[1] for text in cleaned))
    too_short = {key: n for key, n in lengths.items() if sum(count > n for count in counts) >= CUT * len(counts)}
    if too_short:
        typical = counts[int(0.95 * (len(counts) - 1))]
        keys = ", ".join(f"{key} {length}" for key, length in too_short.items())
        share = sum(count > min(too_short.values()) for count in counts) / len(counts)
        yield f"{share:.0%} of the texts of {where} would be cut by {keys}; 95 % have {typical} tokens at most."
