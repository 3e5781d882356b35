"""explain --heatmap: one picture of an image and, for each of its texts, of the patches that its ITM score rests on.

A model is used only if it lies in the run folder or on this machine: whoever made the folder may have named any place.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from capfilt.data import shards
from capfilt.data.images import decode
from capfilt.data.sample import Sample
from capfilt.errors import RunError, UsageError
from capfilt.inference.heatmap import check_heatmap, heatmaps
from capfilt.inference.local_model import LocalModel
from capfilt.models.checkpoints import store
from capfilt.pipelines.inspect.explain import are_texts
from capfilt.printable import printable
from capfilt.runs.run import Run
from capfilt.stages import inputs
from capfilt.storage.atomic import atomic
from capfilt.storage.paths import StoragePath, storage_path

MAX_TILES = 24
"""Texts of a round that are drawn, the first ones."""
SIDE, LABEL = 256, 60
"""Pixels: the longer side of a drawn image, and the lines beneath it."""


def run(
    folder: StoragePath,
    explanation: Mapping[str, Any],
    out: StoragePath | None = None,
    filter_: str | None = None,
    fetch: bool = False,
) -> StoragePath:
    """Draw what `explain.run` said of an image: a row for each round, the image and then its scored texts in order.

    Args:
        out: the PNG; None: heatmap-KEY.png in the run folder.
        filter_: the filter that scored the texts, where the run folder neither holds nor names it.
        fetch: read shards that the run's plan names on other machines, too.

    Raises:
        CapfiltError: RunError where no text has a score by ITM, or the filter is gone; UsageError for a filter that has
            no heatmap or is another one; DataError for shards that are gone.
    """
    scored = [(each, _scored(each["rows"])) for each in explanation["found"] if are_texts(each["rows"])]
    scored = [(each, rows) for each, rows in scored if rows]
    if not scored:
        raise RunError(f"no text of {explanation['asked']} in {folder} has a score by a filter; nothing to draw")
    if out is not None and not out.name.lower().endswith(".png"):
        raise UsageError(f"--out {out}: the heatmap is a PNG; give a name that ends in .png")
    plan = Run.load(folder).plan
    urls = picture_urls(folder, plan, fetch)
    max_length, models, lines = filter_max_length(plan), dict[str, LocalModel](), []
    for each, rows in scored:
        model = rows[0]["filter"]
        if model not in models:
            known = explanation["models"].get(model)
            near = [] if known is None else [folder / known, *([] if "://" in known else [Path(known)])]
            models[model] = load_filter(model, near, known or f"{model[:20]}…", filter_)
        picture = _picture(urls, each["shard"], rows[0]["key"])
        lines.append(_tiles(models[model], picture, each["folder"], rows, max_length))
    path = out or folder / f"heatmap-{re.sub('[^A-Za-z0-9._-]', '_', scored[0][1][0]['key'])[:100]}.png"
    with atomic(path) as file:
        _sheet(lines).save(file, "PNG")
    return path


def _scored(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [row for row in rows if row["filter"] and row["status"] == "ok"][:MAX_TILES]


def picture_urls(folder: StoragePath, plan: Mapping[str, Any], fetch: bool) -> dict[str, str]:
    """The URL of each of the run's web shards by its name; errors as in `run`."""
    web = inputs.input_shards(folder, plan)
    inputs.check_reachable(folder, web, fetch)
    return inputs.urls_by_name(plan, shards.expand(web))


def filter_max_length(plan: Mapping[str, Any]) -> int:
    """Tokens of a text that the run's filter read at most."""
    settings = plan.get("config") or plan.get("annotate")
    length = settings.get("max_length") if isinstance(settings, dict) else None
    return length if isinstance(length, int) and length >= 2 else 35


def load_filter(fingerprint: str, near: Sequence[StoragePath], name: str, given: str | None) -> LocalModel:
    """The filter of this fingerprint: `given` by the user, or at the first place that exists."""
    place = storage_path(given) if given else next((path for path in near if path.exists()), None)
    if place is None:
        raise RunError(
            f"the filter that scored the texts ({printable(name)}) is neither in the run folder nor on this machine"
            " where its recipe says; name it: --filter MODEL"
        )
    path = store.find(str(place))
    if (scores := store.fingerprint(path)) != fingerprint:
        raise UsageError(
            f"{path} is {scores[:20]}…, and {fingerprint[:20]}… scored the texts; give that: --filter MODEL"
        )
    check_heatmap(path, store.architecture(path))
    return LocalModel.load(path, torch.device("cpu"))


def _picture(urls: Mapping[str, str], shard: str, key: str) -> Image.Image:
    if shard not in urls:
        raise RunError(f"the plan names no shard called {shard}, in which {key} is; its picture cannot be read")
    for item in shards.read(urls[shard]):
        if isinstance(item, Sample) and item.key == key:
            return decode.decode(item.image)
    raise RunError(f"{urls[shard]} has no image {key} any more; `capfilt verify --inputs` tells what has changed")


def _tiles(
    local: LocalModel, picture: Image.Image, title: str, rows: Sequence[Mapping[str, Any]], max_length: int
) -> Iterator[Image.Image]:
    """The image and, for each row, the same under its heatmap, with what is known of the text."""
    seen, maps = maps_of(local, picture, [row["text"] for row in rows], max_length)
    yield _labelled(seen, title, rows[0]["key"])
    for row, heat in zip(rows, maps, strict=True):
        score = "" if row["itm"] is None else f" itm {row['itm']:.3f}"
        yield _labelled(overlay(seen, heat), f"{row['source']}{score} {row.get('verdict', '')}", row["text"])


def maps_of(
    local: LocalModel, picture: Image.Image, texts: Sequence[str], max_length: int
) -> tuple[Image.Image, np.ndarray]:
    """What of a picture the filter saw, its longer side of SIDE pixels, and the heatmap of each text on it."""
    wanted = local.image_format
    read = wanted.to_pixels(picture)
    pixels_13SS = wanted.preprocess.normalise(wanted.preprocess.stack([read])).to(local.device)
    # Of a picture whose middle alone is read, that is what the patches are of.
    seen = picture if wanted.preprocess.shape == "squash" else Image.fromarray(read)
    scale = SIDE / max(seen.size)
    seen = seen.resize((max(1, round(seen.width * scale)), max(1, round(seen.height * scale))))
    return seen, heatmaps(local, pixels_13SS, texts, max_length)


def overlay(picture: Image.Image, heat: np.ndarray) -> Image.Image:
    """A picture under a heatmap [grid, grid] of values in [0, 1], from blue (0) over green to red (1)."""
    large = np.asarray(Image.fromarray(np.float32(heat)).resize(picture.size, Image.Resampling.BICUBIC)).clip(0, 1)
    colours = np.stack([1.5 - abs(4 * large - middle) for middle in (3, 2, 1)], axis=-1).clip(0, 1) * 255
    return Image.fromarray(np.uint8((np.asarray(picture.convert("RGB")) + colours) / 2))


def _labelled(picture: Image.Image, title: str, text: str) -> Image.Image:
    tile = Image.new("RGB", (SIDE, SIDE + LABEL), "white")
    tile.paste(picture, (0, 0))
    lines = [title, *textwrap.wrap(printable(text), 42)[:3]]  # Pillow's own font knows Latin letters alone
    ImageDraw.Draw(tile).text((2, SIDE + 2), "\n".join(lines).encode("latin-1", "replace").decode("latin-1"), "black")
    return tile


def _sheet(lines: Sequence[Iterator[Image.Image]]) -> Image.Image:
    rows = [list(line) for line in lines]
    gap = 4
    sheet = Image.new("RGB", (max(map(len, rows)) * (SIDE + gap), len(rows) * (SIDE + LABEL + gap)), "white")
    for y, row in enumerate(rows):
        for x, tile in enumerate(row):
            sheet.paste(tile, (x * (SIDE + gap), y * (SIDE + LABEL + gap)))
    return sheet
