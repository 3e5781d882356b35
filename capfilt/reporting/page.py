"""The page of a run: one self-contained report.html, rendered from plain numbers and texts.

It loads nothing: style and script are inside it, pinned by their hashes in a content security policy that allows
nothing else, so a caption that contains a script remains text. The parts lie in templates/: page.html.j2, page.css,
page.js.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from capfilt.printable import MAX_MESSAGE, printable
from capfilt.reporting import charts, sections
from capfilt.reporting.charts import Chart, Histogram
from capfilt.reporting.page_data import (
    COLUMNS,
    MAX_LINES,
    MAX_ROUNDS,
    MAX_TRAININGS,
    AnnotatedRound,
    PageData,
    Series,
    Training,
)

TEMPLATES = Path(__file__).with_name("templates")


def render(data: PageData, review: bool = False) -> str:
    """The page as HTML; with `review` it has buttons for labels and posts them to the server it came from."""
    data = bounded(data)
    style, script = ((TEMPLATES / name).read_text("utf-8") for name in ("page.css", "page.js"))
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = _number
    return environment.get_template("page.html.j2").render(
        page=data,
        review=review,
        policy=content_security_policy(review),
        style=Markup(style),
        script=Markup(script),
        data=json_for_script(_script_data(data, review)),
        table=sections.rounds_table(data.rounds),
        tiles=list(sections.tiles(data.rounds)),
        drop_reasons=list(sections.drop_reasons(data.rounds)),
        round_charts=list(sections.round_charts(data.rounds)),
        caption_charts=list(sections.caption_charts(data.annotated_rounds)),
        loss_charts=list(islice(sections.loss_charts(data.trainings), MAX_LINES)),
        histograms=[_histograms(each) for each in data.annotated_rounds],
    )


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
        reasons=[(printable(full), printable(kind), failed) for full, kind, failed in data.reasons],
        kinds=[printable(kind) for kind in data.kinds],
        notes=[printable(note, MAX_MESSAGE) for note in data.notes[:MAX_LINES]],
    )


def _few_losses(losses: Series) -> Series:
    return {printable(name): losses[name] for name in list(losses)[:MAX_LINES]}


def content_security_policy(review: bool) -> str:
    """The content security policy of the page."""
    hashes = {name: hashlib.sha256((TEMPLATES / name).read_bytes()).digest() for name in ("page.css", "page.js")}
    pinned = {name: f"'sha256-{base64.b64encode(digest).decode()}'" for name, digest in hashes.items()}
    connect = "'self'" if review else "'none'"
    return (
        f"default-src 'none'; script-src {pinned['page.js']}; style-src {pinned['page.css']}; img-src data:;"
        f" connect-src {connect}; base-uri 'none'; form-action 'none'; require-trusted-types-for 'script'"
    )


def json_for_script(tree: Any) -> Markup:
    """JSON that is safe inside a <script>: no text in it can end the element or open another."""
    text = json.dumps(tree, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return Markup(text.encode("utf-8", "replace").decode())


def _script_data(data: PageData, review: bool) -> dict[str, Any]:
    """What page.js reads."""
    looks = [
        {
            "round": each.round,
            "score": each.score,
            "threshold": each.threshold,
            "select": each.select_command,
            "out": each.out_prefix,
            "totals": dict(each.totals),
            "ranges": {score: _range(histograms.values()) for score, histograms in each.histograms.items()},
            "texts": {name: list(each.texts[name]) for name in COLUMNS},
            "cut": dict(each.full_lengths),
        }
        for each in data.annotated_rounds
    ]
    lists = {"images": [list(image) for image in data.images], "reasons": data.reasons, "kinds": data.kinds}
    return {"review": review, "looks": looks, **lists}


def _range(histograms: Iterable[Histogram]) -> tuple[float, float]:
    bounds = [(histogram.low, histogram.high) for histogram in histograms]
    return min(low for low, _ in bounds), max(high for _, high in bounds)


def _histograms(annotated: AnnotatedRound) -> list[tuple[str, Chart]]:
    """(score, chart) of every score and source."""
    labels = {"itm": "itm, the probability of a match", "itc": "itc, a cosine"}
    return [
        (score, charts.histogram(f"{source} texts by {score}", histogram, labels[score]))
        for score, by_source in annotated.histograms.items()
        for source, histogram in by_source.items()
    ]


def _number(value: float, digits: int = 0) -> str:
    return f"{value:,.{digits}f}"
