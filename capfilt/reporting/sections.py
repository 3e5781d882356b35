"""The tables and charts of the page, from the entries of summary.json, the logs of trainings and the annotations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from capfilt.data.sample import SOURCES
from capfilt.printable import printable
from capfilt.reporting import charts
from capfilt.reporting.charts import Chart, Line
from capfilt.reporting.page_data import MAX_LINES, AnnotatedRound, AnnotationCounts, Training
from capfilt.runs.round_figures import TASK_FIGURES

HUMAN_AUC = "human_auc"
"""The figure of a round's filter that the page adds: the AUC on human pairs against shuffled ones."""
HUMAN_PAIRS = "human validation pairs against shuffled ones; 0.5 is guessing"

# ---- tables ----

FIGURES: tuple[tuple[str, tuple[str, ...], int, bool], ...] = (
    ("AUC", ("filter", "auc"), 3, False),
    ("AUC, human pairs", ("filter", HUMAN_AUC), 3, False),
    ("precision", ("filter", "precision"), 3, False),
    ("recall", ("filter", "recall"), 3, False),
    ("threshold", ("filter", "threshold"), 3, False),
    ("TR@1", ("retrieval", "tr@1"), 1, True),
    ("TR@5", ("retrieval", "tr@5"), 1, True),
    ("IR@1", ("retrieval", "ir@1"), 1, True),
    ("IR@5", ("retrieval", "ir@5"), 1, True),
    ("CIDEr", ("captioning", "cider"), 1, True),
    ("BLEU-4", ("captioning", "bleu4"), 1, True),
    ("repeated", ("captioning", "repeated"), 2, False),
    ("distinct bigrams", ("captioning", "distinct2"), 2, False),
    *((shown.label, ("tasks", task, shown.key), 1, True) for task, shown in TASK_FIGURES.items()),
)
"""Heading, keys in an entry of summary.json, digits, and whether it is compared with round 0."""


@dataclass(frozen=True)
class Cell:
    """A figure, and its difference from round 0's."""

    text: str
    change: str = ""
    better: bool = True


def rounds_table(rounds: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[Cell]]]:
    """Headings and rows of the rounds; a column that no round has is left out, a figure not measured is a dash."""
    sources = [source for source in SOURCES if any(source in entry.get("noise_ratio", {}) for entry in rounds)]
    columns = [figure for figure in FIGURES if any(measured(entry, figure[1]) is not None for entry in rounds)]
    headings = ["round", *(f"kept {source}" for source in sources), *(column[0] for column in columns), "seconds"]
    rows = []
    for entry in rounds:
        cells = [Cell(str(entry["round"])), *(_kept(entry, source) for source in sources)]
        for _, keys, digits, compared in columns:
            base = measured(rounds[0], keys) if compared and entry["round"] and not rounds[0]["round"] else None
            cells.append(_cell(measured(entry, keys), digits, base))
        rows.append([*cells, _cell(entry.get("seconds"), 0, None)])
    return headings, rows


def _kept(entry: Mapping[str, Any], source: str) -> Cell:
    noise = entry.get("noise_ratio", {}).get(source)
    return Cell("–" if noise is None else f"{entry['kept'].get(source, 0):,} ({1 - noise:.1%})")


def _cell(value: float | None, digits: int, base: float | None) -> Cell:
    if value is None:
        return Cell("–")
    change = value - base if base is not None else 0.0
    signed = f"{change:+.{digits}f}".replace("-", "−") if base is not None else ""
    return Cell(f"{value:,.{digits}f}", signed, change >= 0)


def tiles(rounds: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str, Cell]]:
    """A few figures of the newest round, compared with round 0: (name, meaning, figure)."""
    if not rounds:
        return
    newest, first = rounds[-1], rounds[0]
    for heading, keys, digits, meaning in (
        ("TR@1", ("retrieval", "tr@1"), 1, "text found for an image, %"),
        ("IR@1", ("retrieval", "ir@1"), 1, "image found for a text, %"),
        ("CIDEr", ("captioning", "cider"), 1, "captions against people's"),
    ):
        value, base = measured(newest, keys), measured(first, keys)
        if value is not None:
            yield heading, meaning, _cell(value, digits, base if newest is not first else None)
    for source in SOURCES:
        noise = newest.get("noise_ratio", {}).get(source)
        if noise is not None:
            yield f"{source} texts kept", f"noise ratio {noise:.1%}", Cell(f"{1 - noise:.1%}")
    if (area := measured(newest, ("filter", HUMAN_AUC))) is not None:
        yield "Filter's AUC", HUMAN_PAIRS, Cell(f"{area:.3f}")


def annotation_tiles(annotated: AnnotatedRound) -> Iterator[tuple[str, str, Cell]]:
    """The figures of an annotate or a select: (name, meaning, figure). Nothing is "kept" before a policy ran."""
    counts = annotated.counts
    if counts is None:
        return
    failed = sum(counts.failed.values())
    unread = f"{failed:,} could not be read" if failed else "all could be read"
    if annotated.decided:
        share = counts.kept_images / counts.images if counts.images else 0.0
        yield "images kept", f"{counts.kept_images:,} of {counts.images:,}; {unread}", Cell(f"{share:.1%}")
    else:
        yield "images", unread, Cell(f"{counts.images:,}")
    for source, total in counts.texts.items():
        if annotated.decided:
            kept = counts.kept.get(source, 0)
            yield f"{source} texts kept", f"{kept:,} of {total:,}", Cell(f"{_share(kept, total):.1%}")
        else:
            yield f"{source} texts", _medians(counts, source), Cell(f"{total:,}")
    if annotated.policy:
        yield "policy", "what a text must reach", Cell(annotated.policy.replace(">=", "≥"))
    for score, area in annotated.human_auc.items():
        yield f"AUC of {score}, human pairs", HUMAN_PAIRS, Cell(f"{area:.3f}")
    for score, area in counts.auc.items():
        yield f"AUC of {score}, known truth", "right web texts against wrong ones", Cell(f"{area:.3f}")


def _medians(counts: AnnotationCounts, source: str) -> str:
    known = [f"{score} {by[source]:.2f}" for score, by in counts.medians.items() if source in by]
    return f"median {', '.join(known)}" if known else "without a score"


def texts_table(rounds: Sequence[AnnotatedRound]) -> tuple[list[str], list[list[Cell]]]:
    """Headings and rows of the texts by round and source; a column that no row has is left out."""
    columns: dict[str, list[str]] = {}
    for each in rounds:
        for source, total in each.totals.items():
            for name, text in _text_figures(each, source, total).items():
                columns.setdefault(name, []).append(text)
    used = {name: texts for name, texts in columns.items() if any(texts)}
    if len(rounds) == 1:
        used.pop("round", None)
    rows = [[Cell(text or "–") for text in row] for row in zip(*used.values(), strict=True)]
    return list(used), rows


def _text_figures(annotated: AnnotatedRound, source: str, total: int) -> dict[str, str]:
    """The figures of one source's texts, "" where there is none."""
    counts, lengths = annotated.counts, annotated.lengths.get(source, ())
    varied = annotated.diversity.get(source, {})
    figures = {"round": str(annotated.round), "texts": source, "number": f"{total:,}"}
    kept = counts.kept.get(source, 0) if counts is not None and annotated.decided else None
    figures["kept"] = "" if kept is None else f"{kept:,} ({_share(kept, total):.1%})"
    for score in ("itm", "itc"):
        median = counts.medians.get(score, {}).get(source) if counts is not None else None
        figures[f"median {score}"] = "" if median is None else f"{median:.3f}"
    figures["median words"] = str(_median_words(lengths)) if sum(lengths) else ""
    for name, heading in (("repeated", "repeated"), ("distinct2", "distinct bigrams")):
        figures[heading] = f"{varied[name]:.2f}" if name in varied else ""
    return figures


def _share(kept: int, total: int) -> float:
    """What the noise ratio of summary.json leaves, so that both are rounded alike."""
    return 1 - round(1 - kept / total, 4)


def _median_words(lengths: Sequence[int]) -> int:
    passed, half = 0, (sum(lengths) + 1) // 2
    for number, count in enumerate(lengths):
        passed += count
        if passed >= half:
            return number
    return 0


def annotation_reasons(annotated: AnnotatedRound) -> Iterator[tuple[str, str, int, float]]:
    """As `drop_reasons`, of an annotate (why images failed) or a select."""
    counts = annotated.counts
    if counts is not None:
        entry = {"round": annotated.round, "samples_in": counts.images + sum(counts.failed.values())}
        dropped = counts.dropped if annotated.decided else {}
        yield from drop_reasons([{**entry, "dropped": dropped, "failed": counts.failed}])


def drop_reasons(rounds: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str, int, float]]:
    """Why texts were dropped and images failed: (round, reason, count, count per image)."""
    for entry in rounds:
        samples = entry.get("samples_in", 0)
        for counts in (entry.get("dropped", {}), {f"image: {why}": n for why, n in entry.get("failed", {}).items()}):
            ordered = sorted(counts.items(), key=lambda item: -item[1])
            rest = sum(count for _, count in ordered[MAX_LINES:])
            for reason, count in [*ordered[:MAX_LINES], *([("other reasons", rest)] if rest else [])]:
                yield str(entry["round"]), printable(reason), count, count / samples if samples else 0.0


def measured(entry: Mapping[str, Any], keys: Sequence[str]) -> float | None:
    """A figure of summary.json by its nested keys; None where it was not measured."""
    value: Any = entry
    for name in keys:
        value = value.get(name) if isinstance(value, Mapping) else None
    return None if value is None else float(value)


# ---- charts ----


def round_charts(rounds: Sequence[Mapping[str, Any]]) -> Iterator[Chart]:
    """The figures of the rounds: retrieval, captioning, the filter, downstream tasks, what was kept."""
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
        *(
            (shown.label, ((shown.label, ("tasks", task, shown.key)),), "%, fine-tuned alike in every round.")
            for task, shown in TASK_FIGURES.items()
        ),
    ):
        series = [
            Line(label, [(r["round"], v) for r in rounds if (v := measured(r, keys)) is not None], number)
            for number, (label, keys) in enumerate(names, 1)
        ]
        if _is_line(series):
            yield charts.by_round(title, series, note)
    kept = [
        (f"round {entry['round']}, {source}", 1 - noise)
        for entry in rounds
        for source, noise in sorted(entry.get("noise_ratio", {}).items(), reverse=True)
    ]
    if kept:
        yield charts.shares("Kept, and noise ratio", kept[-8:], ("kept", "dropped"), "By source; dropped is the noise.")


def caption_charts(rounds: Sequence[AnnotatedRound]) -> Iterator[Chart]:
    """The length and the diversity of texts, by source and round."""
    for source in SOURCES:
        series = [
            Line(f"round {each.round}", _length_shares(each.lengths[source]), number % charts.STYLES)
            for number, each in enumerate(rounds, 1)
            if sum(each.lengths.get(source, ()))
        ]
        if _is_line(series):
            if source == "web":  # the same in every round
                series = series[:1]
            yield charts.lines(f"Length of {source} texts", series, "words", "Share of the texts, %.")
    for name, title in (("repeated", "Repeated captions"), ("distinct2", "Distinct bigrams")):
        series = [
            Line(
                source, [(r.round, r.diversity[source][name]) for r in rounds if name in r.diversity.get(source, {})], n
            )
            for n, source in enumerate(SOURCES, 1)
        ]
        if _is_line(series):
            sizes = [int(figures["texts"]) for each in rounds for figures in each.diversity.values() if figures]
            yield charts.by_round(title, series, f"Share, among {max(sizes):,} texts drawn at random.")


def _is_line(series: Sequence[Line]) -> bool:
    """Whether there is anything to draw: one point is no line, and its figure stands in a table."""
    return any(len(line.points) > 1 for line in series)


def _length_shares(counts: Sequence[int]) -> list[tuple[float, float]]:
    last = max(number for number, count in enumerate(counts) if count)
    return [(number, 100 * count / sum(counts)) for number, count in enumerate(counts[: last + 1])]


def single_losses(trainings: Sequence[Training]) -> Iterator[tuple[str, str, str, str]]:
    """The losses that were logged once, which no chart shows: (training, round, loss, value at step)."""
    for training in trainings:
        for name, points in training.losses.items():
            if len(points) == 1:
                ((step, value),) = points
                yield training.what, str(training.round), name.replace("_", " "), f"{value:.4g} at step {step:,.0f}"


def loss_charts(trainings: Sequence[Training]) -> Iterator[Chart]:
    """A chart for every loss of every kind of training, with a line for each round that logged it more than once."""
    for what in dict.fromkeys(training.what for training in trainings):
        same_kind = [training for training in trainings if training.what == what]
        for loss in dict.fromkeys(name for training in same_kind for name in training.losses):
            series = [
                Line(f"round {training.round}", training.losses[loss], training.round % charts.STYLES)
                for training in same_kind
                if len(training.losses.get(loss, ())) > 1
            ]
            if series:
                yield charts.lines(f"{what}: {loss.replace('_', ' ')}", series, "step")
