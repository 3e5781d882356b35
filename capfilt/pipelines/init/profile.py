"""What some data is like, from a sample: layout, counts, texts, pictures, copies; or the columns of a list of URLs.

The beginnings of a few shards are read, so that the look takes seconds however much there is; counts are then estimates
by bytes, and copies are those within the sample, a small part of those that there are.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

from capfilt.data import shards
from capfilt.data.images.decode import decode
from capfilt.data.images.perceptual_hash import perceptual_hash
from capfilt.data.sample import FailedSample, Sample
from capfilt.data.survey import Draw, draw
from capfilt.data.text import rules
from capfilt.downloading.url_lists.files import find_files
from capfilt.downloading.url_lists.tables import peek
from capfilt.errors import DataError, ImageError, ListError, NoShardError

SAMPLE, SHARDS, FIRST, DECODED = 600, 8, 1_000, 200
"""Samples drawn; shards read; samples read of each; pictures decoded of what is drawn (5 to 10 ms each)."""
SMALL = 200
"""Pixels below which DataComp's basic filter drops a picture, of its shorter side."""
LISTS = (".csv", ".tsv", ".txt", ".json", ".jsonl", ".parquet")
_WEB = ("http://", "https://")


@dataclass(frozen=True)
class Profile:
    """What was found."""

    facts: dict[str, str]
    """In words, by heading."""
    figures: dict[str, Any] = field(default_factory=dict)
    """The numbers behind them."""
    url_col: str = ""
    """Of a list of URLs; "" for pictures that are there."""
    caption_col: str = ""


def look(specs: Sequence[str], seed: int) -> Profile:
    """What the data is like. NoShardError where there is none, DataError where none of it can be read."""
    of_lists: DataError | None = None
    if all(spec.lower().removesuffix(".gz").removesuffix(".zst").endswith(LISTS) for spec in specs):
        try:
            if profile := _of_list(specs):
                return profile
        except DataError as error:  # a table, and perhaps one of pictures
            of_lists = error
    try:
        urls = shards.expand(specs)
        return _of_samples(urls, draw(urls, SAMPLE, seed, SHARDS, FIRST))
    except NoShardError:
        with suppress(ListError):
            if profile := _of_list(specs):
                return profile
        raise
    except DataError as error:
        raise of_lists or error from None


# ---- pictures ----


def _of_samples(urls: list[str], drawn: Draw) -> Profile:
    readable = [item for _, item in drawn.items if isinstance(item, Sample)]
    failed = Counter(item.reason for _, item in drawn.items if isinstance(item, FailedSample))
    if not readable:
        why = failed.most_common(1)[0][0] if failed else "no sample is in it"
        raise DataError(f"nothing of {len(urls):,} shards (first {urls[0]}) can be read: {why}.")
    count = f"{drawn.num_samples:,.0f}" if drawn.is_census else f"about {float(f'{drawn.num_samples:.2g}'):,.0f}"
    size = "" if drawn.num_bytes is None else f", {drawn.num_bytes / 1e9:,.2g} GB"
    facts = {"Data": f"{count} pictures in {len(urls):,} shard{'s' * (len(urls) != 1)}{size}"}
    figures: dict[str, Any] = {"samples": drawn.num_samples, "bytes": drawn.num_bytes, "shards": len(urls)}
    for more in (_texts(readable), _pictures(readable, failed)):
        facts |= more[0]
        figures |= more[1]
    return Profile(facts, figures)


def _texts(readable: list[Sample]) -> tuple[dict[str, str], dict[str, Any]]:
    counts = [len(sample.captions) for sample in readable]
    every = [caption for sample in readable for caption in sample.captions]
    if not every:
        return {"Texts": "none of the sampled pictures has a text"}, {"texts_each": 0.0}
    rule = rules.TextRules(no_urls=True, no_boilerplate=True)
    noise = sum(bool(rule.broken(caption["text"])) for caption in every) / len(every)
    words = statistics.median(len(caption["text"].split()) for caption in every)
    figures: dict[str, Any] = {"texts_each": sum(counts) / len(counts), "words": words, "boilerplate": noise}
    sources = ", ".join(f"{n / len(every):.0%} {name}" for name, n in _most(caption["source"] for caption in every))
    none = counts.count(0) / len(counts)
    facts = {"Texts": f"{figures['texts_each']:.2g} a picture, {none:.0%} have none; {words:.0f} words; {sources}"}
    facts["Noise"] = f"{noise:.0%} of the texts are boilerplate, a file name, or have a web address"
    if find_spec("py3langid") is None:
        return {**facts, "Languages": "not looked at: pip install 'capfilt[language]'"}, figures
    guesses = (rules.language(caption["text"]) for caption in every)
    found = _most(code if probability >= rules.CLEARLY else "unclear" for code, probability in guesses)
    figures["languages"] = {code: n / len(every) for code, n in found[:5]}
    facts["Languages"] = ", ".join(f"{x:.0%} {code}" for code, x in figures["languages"].items() if x >= 0.005)
    return facts, figures


def _most(names: Any) -> list[tuple[str, int]]:
    return Counter[str](names).most_common()


def _pictures(readable: list[Sample], failed: Counter[str]) -> tuple[dict[str, str], dict[str, Any]]:
    """Sizes and copies of a part of the pictures; and what cannot be read, of all and of that part."""
    sides, hashes, damaged = [], set(), Counter[str]()
    for sample in readable[:DECODED]:
        try:
            image = decode(sample.image)
        except ImageError as error:
            damaged[str(error).partition(":")[0]] += 1
            continue
        sides.append(image.size)
        hashes.add(perceptual_hash(image))
    looked = min(DECODED, len(readable))
    unreadable = 1 - len(readable) / (len(readable) + failed.total()) * (1 - damaged.total() / looked)
    exact = 1 - len({sample.sha256 for sample in readable}) / len(readable)
    near = 1 - len(hashes) / len(sides) if sides else 0.0
    reasons = ", ".join(reason for reason, _ in (failed + damaged).most_common(3)) or f"{looked} were decoded"
    facts = {
        "Unreadable": f"{unreadable:.1%}: {reasons}",
        "Copies": f"{exact:.1%} by their bytes, {near:.1%} by their looks (pHash), within the sample alone",
    }
    figures = {"unreadable": unreadable, "copies_sha256": exact, "copies_phash": near}
    if not sides:
        return facts, figures
    width, height = (round(statistics.median(side)) for side in zip(*sides, strict=True))
    small = sum(min(side) < SMALL for side in sides) / len(sides)
    size = statistics.median(len(sample.image) for sample in readable)
    formats = ", ".join(name for name, _ in _most(sample.extension for sample in readable))
    words = f"{width} x {height} pixels, {size / 1000:,.0f} kB, {formats}; {small:.0%} with a side below {SMALL}"
    return {"Pictures": words, **facts}, {**figures, "width": width, "height": height, "small": small}


# ---- lists of URLs ----


def _of_list(specs: Sequence[str]) -> Profile | None:
    """What a list has; None where it names no pictures on the web."""
    files = find_files(list(specs))
    rows = peek(files[0])
    urls = [name for name, values in rows.items() if _share(values, lambda text: text.startswith(_WEB)) > 0.5]
    if not urls:
        return None
    url = next((name for name in urls if name.lower() in ("url", "image_url", "image")), urls[0])
    captions = [name for name in rows if name not in urls and _share(rows[name], lambda text: " " in text) > 0.3]
    named = [name for name in captions if name.lower() in ("caption", "text", "alt", "alt_text", "top_caption")]
    caption = (named or captions or [""])[0]
    columns = f"{', '.join(rows)}; the URLs are in {url}, " + (f"the texts in {caption}" if caption else "and no texts")
    data = f"{len(files):,} list{'s' * (len(files) != 1)} of URLs ({files[0].format})"
    return Profile({"Data": data, "Columns": columns}, {"files": len(files), "columns": list(rows)}, url, caption)


def _share(values: Sequence[Any], holds: Callable[[str], bool]) -> float:
    return sum(isinstance(value, str) and holds(value) for value in values) / max(1, len(values))
