"""The page: one self-contained report.html of a run, made from plain numbers and texts.

Nothing is loaded from anywhere: its style and script are in it, pinned by their hashes in a content security policy
that allows nothing else, so a caption that is a script in disguise stays a caption. The parts lie beside this module:
page.html.j2, page.css, page.js.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from capfilt.printable import MAX_MESSAGE, printable
from capfilt.reporting import charts
from capfilt.reporting.charts import Chart, Histogram, Line

PARTS = Path(__file__).with_name("templates")
COLUMNS = ("image", "source", "candidate", "text", "itm", "itc", "fixed", "truth", "kind", "label")
"""Of the texts in the page. image, source, fixed and kind are places in lists, -1 for none; truth and label are 1 for
right, 0 for wrong, -1 unknown, a label that was not given at random 2 more; itm and itc are null without a score."""
SOURCES = ("web", "synthetic", "human")
MAX_WORDS = 30
"""Texts of as many words or more share the last bin of the lengths."""
MAX_ROUNDS = 100
"""Rounds in the page: the newest."""
MAX_TRAININGS = 20
"""Trainings of one kind, a line each in the charts of losses: the newest."""
MAX_LINES = 64
"""Notes, charts of losses, and reasons of a round."""

Series = Mapping[str, Sequence[tuple[float, float]]]


@dataclass(frozen=True)
class Training:
    """One training: what was trained (pretrain, captioner, filter), in which round, and its losses by step."""

    what: str
    round: int
    losses: Series


@dataclass(frozen=True)
class Look:
    """The annotations of one round: counted over all of them, and those that are in the page, text by text."""

    round: int
    score: str
    threshold: float
    select: str
    """The `capfilt select` command that would apply another threshold, without its --out and --set."""
    out: str
    """How the --out of such a command begins; both are quoted for a shell."""
    totals: Mapping[str, int]
    """texts that could be judged, by source"""
    histograms: Mapping[str, Mapping[str, Histogram]]
    """by score and source"""
    lengths: Mapping[str, Sequence[int]]
    """by source: the number of texts of 0, 1, .. MAX_WORDS words"""
    diversity: Mapping[str, Mapping[str, float]]
    """by source: distinct1, distinct2, repeated, of `texts` texts"""
    texts: Mapping[str, list[Any]]
    """COLUMNS"""
    cut: Mapping[int, int] = field(default_factory=dict)
    """the full number of characters of a text that was cut short"""


@dataclass(frozen=True)
class Facts:
    """Everything that the page shows."""

    name: str
    command: str
    rounds: Sequence[Mapping[str, Any]] = ()
    """The entries of summary.json."""
    seconds: float | None = None
    finished: str = ""
    trainings: Sequence[Training] = ()
    looks: Sequence[Look] = ()
    images: Sequence[tuple[str, str | None]] = ()
    """key and thumbnail (a data: URL, or None) of every image in the page, in random order"""
    reasons: Sequence[tuple[str, str, bool]] = ()
    """why a text is out whatever the threshold: in full, its class, and whether it is a failure"""
    kinds: Sequence[str] = ()
    """the kinds of texts of known truth"""
    notes: Sequence[str] = ()
    """what a reader must know: what was sampled, what is missing"""


def render(facts: Facts, review: bool = False) -> str:
    """The page as HTML; with `review` it asks for labels, and posts them to where it came from."""
    facts = fitted(facts)
    style, script = ((PARTS / name).read_text("utf-8") for name in ("page.css", "page.js"))
    environment = Environment(
        loader=FileSystemLoader(PARTS), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["number"] = _number
    return environment.get_template("page.html.j2").render(
        facts=facts,
        review=review,
        policy=policy(review),
        style=Markup(style),
        script=Markup(script),
        data=embedded(_data(facts, review)),
        table=rounds_table(facts.rounds),
        tiles=list(tiles(facts.rounds)),
        ends=list(ends(facts.rounds)),
        progress=list(progress(facts)),
        captions=list(captions(facts.looks)),
        losses=list(islice(losses(facts.trainings), MAX_LINES)),
        histograms=[_histograms(look) for look in facts.looks],
    )


def fitted(facts: Facts) -> Facts:
    """The same with few enough entries and with names that are printable and short; a run folder may be anybody's.

    The texts of a look are shown as they came, in elements of their own; whoever drew them has bounded them.
    """
    kinds = list(dict.fromkeys(training.what for training in facts.trainings))[:MAX_LINES]
    trainings = [own for what in kinds for own in [t for t in facts.trainings if t.what == what][-MAX_TRAININGS:]]
    return replace(
        facts,
        name=printable(facts.name),
        command=printable(facts.command),
        finished=printable(facts.finished),
        rounds=list(facts.rounds)[-MAX_ROUNDS:],
        trainings=[Training(printable(own.what), own.round, _few_losses(own.losses)) for own in trainings],
        images=[(printable(key), thumb) for key, thumb in facts.images],
        reasons=[(printable(full), printable(kind), failed) for full, kind, failed in facts.reasons],
        kinds=[printable(kind) for kind in facts.kinds],
        notes=[printable(note, MAX_MESSAGE) for note in facts.notes[:MAX_LINES]],
    )


def _few_losses(losses: Series) -> Series:
    return {printable(name): losses[name] for name in list(losses)[:MAX_LINES]}


def policy(review: bool) -> str:
    """The content security policy of the page."""
    hashes = {name: hashlib.sha256((PARTS / name).read_bytes()).digest() for name in ("page.css", "page.js")}
    pinned = {name: f"'sha256-{base64.b64encode(digest).decode()}'" for name, digest in hashes.items()}
    connect = "'self'" if review else "'none'"
    return (
        f"default-src 'none'; script-src {pinned['page.js']}; style-src {pinned['page.css']}; img-src data:;"
        f" connect-src {connect}; base-uri 'none'; form-action 'none'; require-trusted-types-for 'script'"
    )


def embedded(tree: Any) -> Markup:
    """JSON that may stand inside a <script>: whatever a text says, nothing in it ends the element or opens another."""
    text = json.dumps(tree, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return Markup(text.encode("utf-8", "replace").decode())


def _data(facts: Facts, review: bool) -> dict[str, Any]:
    looks = [
        {
            "round": look.round,
            "score": look.score,
            "threshold": look.threshold,
            "select": look.select,
            "out": look.out,
            "totals": dict(look.totals),
            "ranges": {score: _range(own.values()) for score, own in look.histograms.items()},
            "texts": {name: list(look.texts[name]) for name in COLUMNS},
            "cut": dict(look.cut),
        }
        for look in facts.looks
    ]
    lists = {"images": [list(image) for image in facts.images], "reasons": facts.reasons, "kinds": facts.kinds}
    return {"review": review, "looks": looks, **lists}


def _range(own: Iterable[Histogram]) -> tuple[float, float]:
    found = list(own)
    return min(h.low for h in found), max(h.high for h in found)


# ---- the table ----

FIGURES: tuple[tuple[str, tuple[str, ...], int, bool], ...] = (
    ("AUC", ("filter", "auc"), 3, False),
    ("precision", ("filter", "precision"), 3, False),
    ("recall", ("filter", "recall"), 3, False),
    ("threshold", ("filter", "threshold"), 3, False),
    ("TR@1", ("retrieval", "tr@1"), 1, True),
    ("TR@5", ("retrieval", "tr@5"), 1, True),
    ("IR@1", ("retrieval", "ir@1"), 1, True),
    ("IR@5", ("retrieval", "ir@5"), 1, True),
    ("CIDEr", ("captioning", "cider"), 1, True),
    ("BLEU-4", ("captioning", "bleu4"), 1, True),
)
"""Heading, place in an entry of summary.json, digits, and whether round 0 is the line to beat."""


@dataclass(frozen=True)
class Cell:
    """A figure and how far it is from round 0's."""

    text: str
    change: str = ""
    better: bool = True


def rounds_table(rounds: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[Cell]]]:
    """Headings and rows of the rounds; a column that no round has is left out, a figure not measured is a dash."""
    sources = [source for source in SOURCES if any(source in entry.get("noise_ratio", {}) for entry in rounds)]
    columns = [figure for figure in FIGURES if any(_at(entry, figure[1]) is not None for entry in rounds)]
    headings = ["round", *(f"kept {source}" for source in sources), *(column[0] for column in columns), "seconds"]
    rows = []
    for entry in rounds:
        cells = [Cell(str(entry["round"])), *(_kept(entry, source) for source in sources)]
        for _, place, digits, compared in columns:
            base = _at(rounds[0], place) if compared and entry["round"] and not rounds[0]["round"] else None
            cells.append(_cell(_at(entry, place), digits, base))
        rows.append([*cells, _cell(entry.get("seconds"), 0, None)])
    return headings, rows


def _kept(entry: Mapping[str, Any], source: str) -> Cell:
    noise = entry.get("noise_ratio", {}).get(source)
    return Cell("–" if noise is None else f"{entry['kept'].get(source, 0):,} ({1 - noise:.1%})")


def _cell(value: float | None, digits: int, base: float | None) -> Cell:
    if value is None:
        return Cell("–")
    change = value - base if base is not None else 0.0
    told = f"{change:+.{digits}f}".replace("-", "−") if base is not None else ""
    return Cell(f"{value:,.{digits}f}", told, change >= 0)


def tiles(rounds: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str, Cell]]:
    """The newest round in a few figures against round 0: name, what it means, figure."""
    if not rounds:
        return
    newest, first = rounds[-1], rounds[0]
    for heading, place, digits, meaning in (
        ("TR@1", ("retrieval", "tr@1"), 1, "text found for an image, %"),
        ("IR@1", ("retrieval", "ir@1"), 1, "image found for a text, %"),
        ("CIDEr", ("captioning", "cider"), 1, "captions against people's"),
    ):
        value, base = _at(newest, place), _at(first, place)
        if value is not None:
            yield heading, meaning, _cell(value, digits, base if newest is not first else None)
    for source in SOURCES:
        noise = newest.get("noise_ratio", {}).get(source)
        if noise is not None:
            yield f"{source} texts kept", f"noise ratio {noise:.1%}", Cell(f"{1 - noise:.1%}")


def ends(rounds: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str, int, float]]:
    """Why texts were dropped and images failed: round, reason, count, share of what came in."""
    for entry in rounds:
        samples = entry.get("samples_in", 0)
        for counts in (entry.get("dropped", {}), {f"image: {why}": n for why, n in entry.get("failed", {}).items()}):
            ordered = sorted(counts.items(), key=lambda item: -item[1])
            rest = sum(count for _, count in ordered[MAX_LINES:])
            for reason, count in [*ordered[:MAX_LINES], *([("other reasons", rest)] if rest else [])]:
                yield str(entry["round"]), printable(reason), count, count / samples if samples else 0.0


def _at(entry: Mapping[str, Any], place: Sequence[str]) -> float | None:
    found: Any = entry
    for name in place:
        found = found.get(name) if isinstance(found, Mapping) else None
    return None if found is None else float(found)


# ---- the charts ----


def progress(facts: Facts) -> Iterator[Chart]:
    """What rounds are judged by: retrieval, captioning, the filter, what was kept."""
    rounds = facts.rounds
    for title, names, note in (
        ("Retrieval", (("TR@1", ("retrieval", "tr@1")), ("IR@1", ("retrieval", "ir@1"))), "Recall at 1, %."),
        ("Captioning", (("CIDEr", ("captioning", "cider")),), "CIDEr ×100."),
        (
            "The filter, where truth is known",
            tuple((name, ("filter", name)) for name in ("auc", "precision", "recall")),
            "",
        ),
        (
            "Captions of held-out images",
            (("repeated", ("captioning", "repeated")), ("distinct bigrams", ("captioning", "distinct2"))),
            "Shares. A captioner that collapses repeats itself.",
        ),
    ):
        series = [
            Line(label, [(r["round"], v) for r in rounds if (v := _at(r, place)) is not None], number)
            for number, (label, place) in enumerate(names, 1)
        ]
        if any(line.points for line in series):
            yield charts.by_round(title, series, note)
    kept = [
        (f"round {entry['round']}, {source}", 1 - noise)
        for entry in rounds
        for source, noise in sorted(entry.get("noise_ratio", {}).items(), reverse=True)
    ]
    if kept:
        yield charts.shares("Kept, and noise ratio", kept[-8:], ("kept", "dropped"), "By source; dropped is the noise.")


def captions(looks: Sequence[Look]) -> Iterator[Chart]:
    """How long texts are and how varied, by source and round."""
    for source in SOURCES:
        series = [
            Line(f"round {look.round}", _lengths(look.lengths[source]), number % charts.STYLES)
            for number, look in enumerate(looks, 1)
            if sum(look.lengths.get(source, ()))
        ]
        if series:
            which = series[:1] if source == "web" else series
            yield charts.lines(f"Length of {source} texts", which, "words", "Share of the texts, %.")
    for name, title in (("repeated", "Repeated captions"), ("distinct2", "Distinct bigrams")):
        found = [
            Line(source, [(look.round, look.diversity[source][name]) for look in looks if name in _of(look, source)], n)
            for n, source in enumerate(SOURCES, 1)
        ]
        if any(line.points for line in found):
            sizes = {int(own["texts"]) for look in looks for own in look.diversity.values() if own}
            told = f"Share, among {max(sizes):,} texts drawn at random." if sizes else ""
            yield charts.by_round(title, found, told)


def _of(look: Look, source: str) -> Mapping[str, float]:
    return look.diversity.get(source, {})


def _lengths(counts: Sequence[int]) -> list[tuple[float, float]]:
    last = max(number for number, count in enumerate(counts) if count)
    return [(number, 100 * count / sum(counts)) for number, count in enumerate(counts[: last + 1])]


def losses(trainings: Sequence[Training]) -> Iterator[Chart]:
    """A chart for every loss of every kind of training, a line a round."""
    for what in dict.fromkeys(training.what for training in trainings):
        own = [training for training in trainings if training.what == what]
        for loss in dict.fromkeys(name for training in own for name in training.losses):
            series = [
                Line(f"round {training.round}", training.losses[loss], training.round % charts.STYLES)
                for training in own
                if training.losses.get(loss)
            ]
            if series:
                yield charts.lines(f"{what}: {loss.replace('_', ' ')}", series, "step")


def _histograms(look: Look) -> list[tuple[str, Chart]]:
    words = {"itm": "itm, the probability of a match", "itc": "itc, a cosine"}
    return [
        (score, charts.histogram(f"{source} texts by {score}", found, words[score]))
        for score, own in look.histograms.items()
        for source, found in own.items()
    ]


def _number(value: float, digits: int = 0) -> str:
    return f"{value:,.{digits}f}"
