"""retrieve: the pictures of an index that are nearest to a text or a picture, as records and as a page."""

from __future__ import annotations

from typing import Any

import numpy as np

from capfilt.data.sample import Sample
from capfilt.errors import DataError, ImageError, UsageError
from capfilt.inference.device import Compute
from capfilt.reporting.near.neighbours import render_neighbours
from capfilt.runs.progress import Progress
from capfilt.stages.near.embed import COPY, EmbedConfig, VectorModel
from capfilt.stages.near.index import IndexInfo, PictureIndex
from capfilt.storage.atomic import atomic
from capfilt.storage.paths import StoragePath


def run(
    folder: StoragePath,
    text: str | None,
    image: StoragePath | None,
    wanted: int,
    model: str | None,
    html: StoragePath | None,
    show: Progress,
) -> dict[str, Any]:
    """The verb: search an index for a text or an image, and write a page to `html` where that is given.

    `model` is what made the vectors, where it is not where the index says.

    Raises:
        UsageError: neither a text nor a picture, or both; a text where the vectors are of a copy-detection descriptor.
        FolderError: the folder is no index.
        DataError: the model is not the one that made the vectors.
        ImageError: the picture cannot be used.
    """
    if (text is None) == (image is None):
        raise UsageError('give a text, as in `capfilt retrieve --index I "a red ring"`, or --image FILE.')
    index = PictureIndex(folder)
    made_by = _model(index.info, text, model, show)
    with show.wait("loading the model"):
        query = _of_picture(made_by, index.info, image) if image is not None else _of_text(made_by, text or "")
    hits = [hit._asdict() for hit in index.search(query, wanted)]
    for hit in hits:
        hit["url"] = index.info.shards.get(hit["shard"], "")
    record = {"query": text if image is None else str(image), "rows": index.info.rows, "hits": hits}
    if html is not None:
        page = render_neighbours(record, None if image is None else image.read_bytes())
        with atomic(html) as file:
            file.write(page.encode("utf-8", "replace"))
        record["page"] = str(html)
    return record


def _model(info: IndexInfo, text: str | None, given: str | None, show: Progress) -> VectorModel:
    """The model that made the vectors of an index."""
    if text is not None and (info.kind == "copy" or not text.strip()):
        raise UsageError(
            "the vectors of this index are of a copy-detection descriptor, which reads no text: give --image FILE."
            if info.kind == "copy"
            else "the text to look for is empty."
        )
    if given is None and (info.kind == "copy" or not info.model_path):
        what = f"{COPY}FILE, the descriptor whose code is run" if info.kind == "copy" else "MODEL, the folder or name"
        raise UsageError(f"the index does not hold the model that made its vectors: give --model {what}.")
    found = VectorModel.find(given or info.model_path, show)
    if found.fingerprint != info.model:
        raise DataError(
            f"{given or info.model_path} is not the model that made the vectors of this index, {info.model[:12]}: its"
            f" weights are {found.fingerprint[:12]}. Give that one by --model."
        )
    return found


def _of_text(model: VectorModel, text: str) -> np.ndarray:
    from capfilt.inference.filters.dual_encoder import DualEncoderFilter
    from capfilt.inference.local_model import LocalModel

    vector: np.ndarray = DualEncoderFilter(LocalModel.load(model.path, _CPU.open())).text_features([text])[0]
    return vector


def _of_picture(model: VectorModel, info: IndexInfo, image: StoragePath) -> np.ndarray:
    from capfilt.inference.batches import pictures

    if not image.is_file():
        raise UsageError(f"--image {image}: there is no such file.")
    embedder = model.open(EmbedConfig.model_validate(info.embedded), _CPU)
    data = image.read_bytes()
    (batch,) = pictures([Sample("query", data, "", "")], 1, (embedder.image_format,))
    if batch.faults:
        raise ImageError(f"--image {image}: {batch.faults[0].reason}.")
    vector: np.ndarray = embedder.vectors(batch.on(_CPU.open(), (embedder.image_format,)))[0]
    return vector


_CPU = Compute(device="cpu", precision="fp32")
