"""The tables and charts of two runs side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from capfilt.data.sample import SOURCES
from capfilt.printable import printable
from capfilt.reporting import charts, sections
from capfilt.reporting.charts import Chart, Histogram, Line
from capfilt.reporting.comparison.collect import Comparison, Side
from capfilt.reporting.comparison.join import DROPPED, KEPT, Joined
from capfilt.reporting.counts import NUM_BINS, SCORE_RANGES
from capfilt.reporting.page_data import MAX_LINES
from capfilt.reporting.sections import Cell

Table = tuple[list[str], list[list[Cell]]]
"""Headings and rows."""
MAX_SETTING = 40
"""Characters of a setting; of a longer one, its beginning and its end."""
CHANGE_BINS = 41
"""Bins of the changes of a score: odd, so that no change lies in the middle of one."""


def tiles(comparison: Comparison) -> Iterator[tuple[str, str, Cell]]:
    """The figures at the top: (name, meaning, figure)."""
    joined = comparison.joined
    of = " and ".join(f"{number:,}" for number in joined.candidates)
    meaning = f"of {of} images" if joined.whole else f"of {of} images drawn at random"
    yield "images in both", meaning, Cell(f"{len(joined.images):,}")
    if not joined.images:
        return
    both = [text.both for text in joined.texts() if text.both is not None]
    if both:
        differ = sum(first.verdict != second.verdict for first, second in both)
        yield (
            "verdicts that differ" if all(side.annotated.decided for side in comparison.sides) else "pass in one alone",
            f"{differ:,} of {len(both):,} texts that both have",
            Cell(f"{differ / len(both):.1%}"),
        )
    captions = [text for text in joined.texts() if text.source == "synthetic" and text.sides[0] is not None]
    if captions:
        same, total = sum(text.both is not None for text in captions), len(captions)
        yield "same captions", f"{same:,} of {total:,} synthetic texts of A", Cell(f"{same / total:.1%}")
    for score in SCORE_RANGES:
        changes = _changes(joined, score)
        if changes.size:
            yield f"{score}, change", f"mean over {changes.size:,} texts, B − A", Cell(_signed(changes.mean()))
    for score in SCORE_RANGES:
        areas = [side.annotated.human_auc.get(score) for side in comparison.sides]
        if None not in areas:
            values = " → ".join(f"{area:.3f}" for area in areas)
            yield f"AUC of {score}, human pairs", sections.HUMAN_PAIRS, Cell(values)


def totals(sides: Sequence[Side]) -> Table:
    """The figures of all annotations of each run, and their differences."""
    figures = [dict(_figures(side)) for side in sides]
    names = list(dict.fromkeys(name for each in figures for name in each))
    rows = []
    for name in names:
        first, second = (each.get(name) for each in figures)
        digits = max((value[1] for value in (first, second) if value is not None), default=0)
        cells = [Cell("–" if value is None else f"{value[0]:,.{digits}f}") for value in (first, second)]
        change = "" if first is None or second is None else _signed(second[0] - first[0], digits)
        rows.append([Cell(name), *cells, Cell(change)])
    return ["", *headings(sides), "B − A"], rows


def headings(sides: Sequence[Side]) -> list[str]:
    """The runs as headings of columns."""
    return [f"{letter}: {printable(side.name)}" for letter, side in zip("AB", sides, strict=True)]


def _figures(side: Side) -> Iterator[tuple[str, tuple[float, int]]]:
    """(name, (value, digits)) of everything that was measured of one run."""
    annotated, counts = side.annotated, side.annotated.counts
    assert counts is not None, "a round that was counted"
    yield "images", (counts.images, 0)
    if counts.failed:
        yield "images that could not be read", (sum(counts.failed.values()), 0)
    if annotated.decided:
        yield "images kept", (counts.kept_images, 0)
        if side.sample.source.rule.threshold is not None:
            yield f"threshold on {annotated.score}", (annotated.threshold, 3)
    for source, total in counts.texts.items():
        yield f"{source} texts", (total, 0)
        if annotated.decided:
            yield f"{source} texts kept, %", (100 * counts.kept.get(source, 0) / total, 1)
        for score, medians in counts.medians.items():
            if source in medians:
                yield f"{source} texts, median {score}", (medians[source], 3)
        for name, heading in (("repeated", "repeated"), ("distinct2", "distinct bigrams")):
            if name in annotated.diversity.get(source, {}):
                yield f"{source} texts, {heading}", (annotated.diversity[source][name], 3)
    for score, area in annotated.human_auc.items():
        yield f"AUC of {score} on human pairs against shuffled ones", (area, 3)
    for score, area in counts.auc.items():
        yield f"AUC of {score} where truth is known", (area, 3)
    for heading, keys, digits, _ in sections.FIGURES:
        value = sections.measured(side.figures, keys)
        if value is not None and keys[0] != "filter":
            yield heading, (value, digits)


def settings(sides: Sequence[Side]) -> Table:
    """The settings in which the runs differ."""
    first, second = (side.settings for side in sides)
    names = [name for name in dict.fromkeys((*first, *second)) if first.get(name) != second.get(name)]
    rows = [
        [Cell(printable(name)), *(Cell(printable(side.get(name, "–"), MAX_SETTING)) for side in (first, second))]
        for name in names
    ]
    return ["setting", *headings(sides)], rows[:MAX_LINES]


def verdicts(joined: Joined) -> Table:
    """What becomes of the texts that both runs have, by source."""
    rows = []
    for source in SOURCES:
        pairs = [text.both for text in joined.texts() if text.source == source and text.both is not None]
        outcomes = [(first.verdict, second.verdict) for first, second in pairs]
        if outcomes:
            counts = [
                outcomes.count(each) for each in ((KEPT, KEPT), (KEPT, DROPPED), (DROPPED, KEPT), (DROPPED, DROPPED))
            ]
            cells = [Cell(f"{count:,} ({count / len(outcomes):.1%})") for count in counts]
            rows.append([Cell(source), Cell(f"{len(outcomes):,}"), *cells])
    return ["texts", "in both runs", "pass in both", "only in A", "only in B", "in neither"], rows


def scores(joined: Joined) -> Table:
    """The scores of the texts that both runs have, by source."""
    rows = []
    for source in SOURCES:
        for score in SCORE_RANGES:
            pairs = _pairs(joined, score, (source,))
            if not len(pairs):
                continue
            first, second = pairs.T
            means = [Cell(f"{values.mean():.3f}") for values in (first, second)]
            changes = second - first
            shares = Cell(f"{(changes > 0).mean():.1%} / {(changes < 0).mean():.1%}")
            cells = [Cell(f"{len(pairs):,}"), *means, Cell(_signed(changes.mean())), shares]
            rows.append([Cell(f"{source}, {score}"), *cells])
    return ["scores", "texts", "mean, A", "mean, B", "mean B − A", "higher / lower in B"], rows


def score_charts(sides: Sequence[Side], joined: Joined) -> Iterator[Chart]:
    """The distribution of each score in both runs, over all texts; and its change on the texts that both have."""
    for score in SCORE_RANGES:
        for source in SOURCES:
            series = [
                Line(f"{letter}: {printable(side.name)}", points, style)
                for style, (letter, side) in enumerate(zip("AB", sides, strict=True), 1)
                if (points := _distribution(side, score, source))
            ]
            if len(series) == len(sides):
                yield charts.lines(f"{source} texts by {score}", series, score, "Share of the run's texts, %.")
        changes = _changes(joined, score)
        if changes.size and (widest := float(np.abs(changes).max())):
            bound = float(np.ceil(widest * 20) / 20)
            counts = np.histogram(changes, CHANGE_BINS, (-bound, bound))[0].tolist()
            bars = Histogram(-bound, bound, {"unknown": counts})
            yield charts.histogram(f"Change of {score}", bars, "B − A", "Of the texts that both runs have.", False)


def _distribution(side: Side, score: str, source: str) -> list[tuple[float, float]]:
    """Shares of a run's texts in fiftieths of a score's range, in percent; [] where none has the score."""
    counts = np.sum(list(side.sample.counts.scores[score, source].values()), axis=0)
    if not counts.sum():
        return []
    low, high = SCORE_RANGES[score]
    shares = 100 * counts.reshape(50, NUM_BINS // 50).sum(axis=1) / counts.sum()
    used = np.flatnonzero(shares)
    first, last = max(0, used[0] - 1), min(50, used[-1] + 2)
    return [(low + (high - low) * (place + 0.5) / 50, float(shares[place])) for place in range(first, last)]


def _pairs(joined: Joined, score: str, sources: Sequence[str]) -> np.ndarray:
    """[n, 2]: a score of both runs on the texts that both have and score."""
    both = (text.both for text in joined.texts() if text.source in sources and text.both is not None)
    pairs = [[side.row.score(score) for side in sides] for sides in both]
    return np.array([pair for pair in pairs if None not in pair], dtype=np.float64).reshape(-1, 2)


def _changes(joined: Joined, score: str) -> np.ndarray:
    """[n]: how much higher the second run's score is, on the same texts."""
    pairs = _pairs(joined, score, SOURCES)
    changes: np.ndarray = pairs[:, 1] - pairs[:, 0]
    return changes


def _signed(value: float, digits: int = 3) -> str:
    text = f"{value:+,.{digits}f}"
    return text.replace("-", "−") if text.strip("+-0.") else "0"
