"""report --heatmaps: of the texts with which the gallery of each round opens, the picture under the text's heatmap."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from capfilt.data import shards
from capfilt.data.images import decode
from capfilt.data.sample import Sample
from capfilt.errors import RunError
from capfilt.inference.local_model import LocalModel
from capfilt.pipelines.inspect.explain import pretrained_roles
from capfilt.pipelines.inspect.heatmap import filter_max_length, load_filter, maps_of, overlay, picture_urls
from capfilt.reporting.collect import Report
from capfilt.reporting.page_data import AnnotatedRound, PageData
from capfilt.runs.run import Run
from capfilt.storage.paths import StoragePath

MAX_HEATMAPS = 400
"""Heatmaps of one page, about 10 kB each; the newest rounds come first."""


def with_heatmaps(
    folder: StoragePath, report: Report, number: int, filter_: str | None = None, fetch: bool = False
) -> Report:
    """The same report with heatmaps of `number` kept and `number` dropped texts of each round, those nearest to its
    threshold, which is the order in which the gallery opens. `filter_`, `fetch` and errors are those of `heatmap.run`.
    """
    plan, page = Run.load(folder).plan, report.page
    if not page.annotated_rounds:
        raise RunError(f"{folder} has no annotations; there is nothing to draw heatmaps of")
    urls, named = picture_urls(folder, plan, fetch), pretrained_roles(folder, plan)
    rounds, left = list(page.annotated_rounds), MAX_HEATMAPS
    for index, annotated in reversed(list(enumerate(rounds))):
        near = [folder / f"round-{annotated.round}/filter/checkpoint"]
        if (name := named.get(annotated.filter)) is not None and "://" not in name:
            near.append(Path(name))
        local = load_filter(annotated.filter, near, f"{annotated.filter[:20]}…", filter_)
        rows = nearest(page, annotated, number)[:left]
        left -= len(rows)
        texts = [text for _, _, text in report.texts[index]]
        drawn = dict(_drawn(local, urls, page, annotated, rows, texts, filter_max_length(plan)))
        rounds[index] = replace(annotated, heatmaps=drawn)
    return replace(report, page=replace(page, annotated_rounds=rounds))


def nearest(page: PageData, annotated: AnnotatedRound, number: int) -> list[int]:
    """The rows of `number` kept and of `number` dropped texts that are nearest to the threshold, of those with a score
    by ITM whose picture is in the page."""
    columns = annotated.texts
    scores, images = columns[annotated.score], columns["image"]
    shown = [
        row
        for row, score in enumerate(scores)
        if score is not None and columns["itm"][row] is not None and page.images[images[row]][1] is not None
    ]
    shown.sort(key=lambda row: (abs(scores[row] - annotated.threshold), images[row]))
    kept = [row for row in shown if columns["fixed"][row] < 0 and np.float32(scores[row]) >= annotated.threshold]
    dropped = [row for row in shown if row not in set(kept)]
    return kept[:number] + dropped[:number]


def _drawn(
    local: LocalModel,
    urls: Mapping[str, str],
    page: PageData,
    annotated: AnnotatedRound,
    rows: Sequence[int],
    texts: Sequence[str],
    max_length: int,
) -> Iterator[tuple[int, str]]:
    """Each row with its overlay as a data: URL; every shard is read once."""
    by_image: dict[tuple[str, str], list[int]] = {}
    for row in rows:
        image = annotated.texts["image"][row]
        by_image.setdefault((page.identities[image][0], page.images[image][0]), []).append(row)
    for shard in sorted({shard for shard, _ in by_image if shard in urls}):
        for item in shards.read(urls[shard]):
            if isinstance(item, Sample) and (wanted := by_image.get((shard, item.key))):
                seen, maps = maps_of(local, decode.decode(item.image), [texts[row] for row in wanted], max_length)
                yield from ((row, _data_url(overlay(seen, heat))) for row, heat in zip(wanted, maps, strict=True))


def _data_url(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=70, method=2)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
