"""The page of a run: one self-contained report.html, rendered from plain numbers and texts.

It loads nothing: style and script are inside it, pinned by their hashes in a content security policy that allows
nothing else, so a caption that contains a script remains text. The parts lie in templates/.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from capfilt.printable import MAX_MESSAGE, printable
from capfilt.reporting import charts, sections
from capfilt.reporting.charts import Chart, Histogram
from capfilt.reporting.page_data import (
    MAX_LINES,
    MAX_ROUNDS,
    MAX_STAGES,
    MAX_TRAININGS,
    AnnotatedRound,
    PageData,
    Series,
    Training,
)
from capfilt.reporting.sections import Cell

TEMPLATES = Path(__file__).with_name("templates")


SCRIPTS = ("dom.js", "viewer.js", "csv.js", "labels.js", "thresholds.js", "page.js")
"""The scripts of the page, in this order in one element."""
SCORES = {"itm": "itm, P(match)", "itc": "itc, cosine"}


def render(data: PageData, review: bool = False) -> str:
    """The page as HTML; with `review` it has buttons for labels and posts them to the server it came from."""
    data = bounded(data)
    annotated = data.annotated_rounds
    alone = annotated[0] if len(annotated) == 1 and not data.rounds else None
    reasons = sections.drop_reasons(data.rounds) if alone is None else sections.annotation_reasons(alone)
    return fill(
        "page.html.j2",
        SCRIPTS,
        _script_data(data, review),
        data.notes,
        review,
        page=data,
        review=review,
        undecided=alone is not None and not alone.decided,
        human_auc=any(each.human_auc for each in annotated),
        num_heatmaps=sum(len(each.heatmaps) for each in annotated),
        scores=[
            (score, SCORES.get(score, score)) for score in dict.fromkeys(s for a in annotated for s in a.histograms)
        ],
        table=sections.rounds_table(data.rounds),
        texts_table=sections.texts_table(annotated),
        tiles=list(sections.tiles(data.rounds) if alone is None else sections.annotation_tiles(alone)),
        drop_reasons=list(reasons),
        round_charts=list(sections.round_charts(data.rounds)),
        caption_charts=list(sections.caption_charts(annotated)),
        loss_charts=list(islice(sections.loss_charts(data.trainings), MAX_LINES)),
        single_losses=list(islice(sections.single_losses(data.trainings), MAX_LINES)),
        histograms=[_histograms(each) for each in annotated],
        usage_rows=[[Cell(text) for text in row] for row in data.usage.rows],
    )


def fill(
    template: str, scripts: Sequence[str], tree: Any, notes: Sequence[str], connects: bool = False, **names: Any
) -> str:
    """A template as HTML, with its style, its scripts and what they read; `connects` allows it to talk to the server
    that it came from."""
    return (
        _environment()
        .get_template(template)
        .render(
            policy=content_security_policy(connects, scripts),
            style=Markup((TEMPLATES / "page.css").read_text("utf-8")),
            script=Markup(_script(scripts)),
            data=json_for_script(tree),
            notes=notes,
            **names,
        )
    )


@cache
def _environment() -> Environment:
    """The templates, compiled once a process: that takes longer than filling one."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = _number
    return environment


def _script(names: Sequence[str]) -> str:
    return "".join((TEMPLATES / name).read_text("utf-8") for name in names)


def bounded(data: PageData) -> PageData:
    """The same with a bounded number of entries, and with names that are printable and short: the run folder may come
    from someone else.

    The texts of an annotated round stay as they are, each in an element of its own; `RoundSample` has bounded them.
    """
    kinds = list(dict.fromkeys(training.what for training in data.trainings))[:MAX_LINES]
    newest = (each for kind in kinds for each in [t for t in data.trainings if t.what == kind][-MAX_TRAININGS:])
    return replace(
        data,
        name=printable(data.name),
        command=printable(data.command),
        finished=printable(data.finished),
        rounds=list(data.rounds)[-MAX_ROUNDS:],
        trainings=[Training(printable(each.what), each.round, _few_losses(each.losses)) for each in newest],
        images=[(printable(key), thumbnail) for key, thumbnail in data.images],
        identities=[(printable(shard), printable(uid)) for shard, uid in data.identities],
        reasons=[(printable(full), printable(kind), failed) for full, kind, failed in data.reasons],
        kinds=[printable(kind) for kind in data.kinds],
        notes=[printable(note, MAX_MESSAGE) for note in data.notes[:MAX_LINES]],
        usage=replace(data.usage, rows=[[printable(cell) for cell in row] for row in data.usage.rows[:MAX_STAGES]]),
    )


def _few_losses(losses: Series) -> Series:
    return {printable(name): losses[name] for name in list(losses)[:MAX_LINES]}


def content_security_policy(connects: bool, scripts: Sequence[str] = SCRIPTS) -> str:
    """The content security policy of a page with these scripts; `connects` allows it to talk to its server."""
    parts = {"script": _script(scripts).encode(), "style": (TEMPLATES / "page.css").read_bytes()}
    digests = {name: base64.b64encode(hashlib.sha256(part).digest()).decode() for name, part in parts.items()}
    connect = "'self'" if connects else "'none'"
    return (
        f"default-src 'none'; script-src 'sha256-{digests['script']}'; style-src 'sha256-{digests['style']}';"
        f" img-src data:; connect-src {connect}; base-uri 'none';"
        " form-action 'none'; require-trusted-types-for 'script'"
    )


def json_for_script(tree: Any) -> Markup:
    """JSON that is safe inside a <script>: no text in it can end the element or open another."""
    text = json.dumps(tree, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return Markup(text.encode("utf-8", "replace").decode())


def _script_data(data: PageData, review: bool) -> dict[str, Any]:
    """What page.js reads; an annotated round is called a look there."""
    looks = [
        {
            "round": each.round,
            "score": each.score,
            "threshold": each.threshold,
            "select": each.select_command,
            "out": each.out_prefix,
            "totals": dict(each.totals),
            "ranges": {
                score: _range(histograms.values())
                for score, histograms in each.histograms.items()
                if score in (each.movable or each.histograms)
            },
            "texts": {name: list(values) for name, values in each.texts.items()},
            "cut": dict(each.full_lengths),
            "decided": each.decided,
            "heat": dict(each.heatmaps),
        }
        for each in data.annotated_rounds
    ]
    lists = {"images": [list(image) for image in data.images], "reasons": data.reasons, "kinds": data.kinds}
    return {"name": data.name, "review": review, "looks": looks, "identities": data.identities, **lists}


def _range(histograms: Iterable[Histogram]) -> tuple[float, float]:
    bounds = [(histogram.low, histogram.high) for histogram in histograms]
    return min(low for low, _ in bounds), max(high for _, high in bounds)


def _histograms(annotated: AnnotatedRound) -> list[tuple[str, Chart]]:
    """(score, chart) of every score and source."""
    labels = {"itm": "itm, the probability of a match", "itc": "itc, a cosine"}
    return [
        (score, charts.histogram(f"{source} texts by {score}", histogram, labels.get(score, score)))
        for score, by_source in annotated.histograms.items()
        for source, histogram in by_source.items()
    ]


def _number(value: float, digits: int = 0) -> str:
    return f"{value:,.{digits}f}"
