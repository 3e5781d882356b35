"""What some data is like, from a sample of it: layout, counts, texts, pictures, copies; or the columns of a list of URLs.

The beginnings of a few shards are read, so that the look takes seconds however much there is; counts are then estimates
by bytes, and copies are those within the sample, a small part of those that there are.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from typing import Any

from capfilt.data import shards
from capfilt.data.images.decode import decode
from capfilt.data.images.perceptual_hash import perceptual_hash
from capfilt.data.sample import FailedSample, Sample
from capfilt.data.survey import Draw, draw, texts
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

    layout: str
    """shards | pictures | list"""
    described: str
    """The layout in words."""
    facts: dict[str, str] = field(default_factory=dict)
    """A line of words for each heading, for a person."""
    figures: dict[str, Any] = field(default_factory=dict)
    """The numbers behind them."""
    url_col: str = ""
    caption_col: str = ""

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return {name: value for name, value in asdict(self).items() if value}


def look(specs: Sequence[str], seed: int) -> Profile:
    """What the data is like. NoShardError where there is none, DataError where none of it can be read."""
    named = all(spec.lower().removesuffix(".gz").removesuffix(".zst").endswith(LISTS) for spec in specs)
    of_lists: DataError | None = None
    try:
        if named and (profile := _of_list(specs)) is not None:
            return profile
    except DataError as error:  # a table, and perhaps one of pictures
        of_lists = error
    try:
        urls = shards.expand(specs, plain_pictures=True)
        return _of_shards(urls, draw(urls, SAMPLE, seed, SHARDS, FIRST))
    except NoShardError:
        with suppress(ListError):
            if (profile := _of_list(specs)) is not None:
                return profile
        raise
    except DataError as error:
        raise of_lists or error from None


# ---- shards and folders of pictures ----


def _of_shards(urls: list[str], drawn: Draw) -> Profile:
    plain = shards.pictures.is_pictures(urls[0])
    readable = [item for _, item in drawn.items if isinstance(item, Sample)]
    failed = Counter(item.reason for _, item in drawn.items if isinstance(item, FailedSample))
    if not readable:
        why = failed.most_common(1)[0][0] if failed else "no sample is in it"
        raise DataError(f"nothing of {urls[0]} and {len(urls) - 1} more shards can be read: {why}.")
    kind = "a plain folder of pictures" if plain else f"{len(urls):,} shard{'s' * (len(urls) != 1)}"
    about = "" if drawn.is_census else "about "
    size = "" if drawn.num_bytes is None else f", {drawn.num_bytes / 1e9:,.2g} GB"
    facts = {"Data": f"{about}{_round(drawn.num_samples, drawn.is_census):,} pictures in {kind}{size}"}
    figures: dict[str, Any] = {"samples": drawn.num_samples, "counted": drawn.is_census, "bytes": drawn.num_bytes}
    figures |= {"shards": len(urls), "drawn": len(drawn.items)}
    for more in (_texts(drawn, readable), _pictures(readable, failed, len(drawn.items))):
        facts |= more[0]
        figures |= more[1]
    return Profile("pictures" if plain else "shards", kind, facts, figures)


def _round(number: float, exact: bool) -> int:
    return round(number) if exact else int(float(f"{number:.2g}"))


def _texts(drawn: Draw, readable: list[Sample]) -> tuple[dict[str, str], dict[str, Any]]:
    counts = [len(sample.captions) for sample in readable]
    every = list(texts(drawn.items))
    if not every:
        return {"Texts": "none of the sampled pictures has a text"}, {"texts_per_picture": 0.0}
    mean, without = statistics.fmean(counts), counts.count(0) / len(counts)
    words = statistics.median(len(text.split()) for text, _ in every)
    sources = Counter(source for _, source in every)
    beside = rules.TextRules(no_urls=True, no_boilerplate=True)
    noise = sum(bool(beside.broken(text)) for text, _ in every) / len(every)
    facts = {
        "Texts": f"{mean:.2g} a picture ({without:.0%} have none), {words:.0f} words in the middle, "
        + " and ".join(f"{count / len(every):.0%} {source}" for source, count in sources.most_common()),
        "Noise": f"{noise:.0%} of the texts are boilerplate, a file name, or have a web address",
    }
    figures = {"texts_per_picture": mean, "without_text": without, "words": words, "boilerplate": noise}
    if find_spec("py3langid") is None:
        return {**facts, "Languages": "not looked at: pip install 'capfilt[language]'"}, figures
    found = Counter(code if p >= rules.CLEARLY else "unclear" for code, p in (rules.language(text) for text, _ in every))
    shares = {code: count / len(every) for code, count in found.most_common(5)}
    facts["Languages"] = ", ".join(f"{share:.0%} {code}" for code, share in shares.items())
    return facts, {**figures, "languages": shares}


def _pictures(readable: list[Sample], failed: Counter[str], drawn: int) -> tuple[dict[str, str], dict[str, Any]]:
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
    unreadable = 1 - (1 - failed.total() / drawn) * (1 - damaged.total() / looked)
    exact = 1 - len({sample.sha256 for sample in readable}) / len(readable)
    near = 1 - len(hashes) / len(sides) if sides else 0.0
    reasons = ", ".join(reason for reason, _ in (failed + damaged).most_common(3))
    facts = {
        "Unreadable": f"{unreadable:.1%}" + (f": {reasons}" if reasons else f" ({looked} decoded)"),
        "Copies": f"{exact:.1%} by their bytes, {near:.1%} by their looks (pHash), within the sample: the whole has more",
    }
    figures: dict[str, Any] = {"unreadable": unreadable, "decoded": looked, "copies_sha256": exact, "copies_phash": near}
    if not sides:
        return facts, figures
    middle = [round(statistics.median(side)) for side in zip(*sides, strict=True)]
    small = sum(min(side) < SMALL for side in sides) / len(sides)
    size = statistics.median(len(sample.image) for sample in readable)
    formats = ", ".join(name for name, _ in Counter(sample.extension for sample in readable).most_common())
    words = f"{middle[0]} x {middle[1]} pixels and {size / 1000:,.0f} kB in the middle, {formats}; "
    words += f"{small:.0%} with a side below {SMALL}"
    figures |= {"width": middle[0], "height": middle[1], "small": small, "image_bytes": size}
    return {"Pictures": words, **facts}, figures


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
    described = f"{len(files):,} list{'s' * (len(files) != 1)} of URLs ({files[0].format})"
    facts = {
        "Data": described,
        "Columns": f"{', '.join(rows)}; the URLs are in {url}, " + (f"the texts in {caption}" if caption else "and no texts"),
    }
    return Profile("list", described, facts, {"files": len(files), "columns": list(rows)}, url, caption)


def _share(values: Sequence[Any], holds: Any) -> float:
    return sum(isinstance(value, str) and holds(value) for value in values) / max(1, len(values))
