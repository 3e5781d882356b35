"""Features that a frozen vision tower gives for every image of a shard, kept on disk and read in each epoch.

One safetensors file a shard: a tensor [N, D] for each image, by its uid, so that any row of any epoch is one read from
a mapped file. The file's name is the fingerprint of the tower, the shard and the format, so trainings that share all
three share the file.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open
from torch import Tensor

from capfilt.errors import DataError
from capfilt.storage.atomic import atomic

DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
"""The types of tensors, as safetensors names them."""


class Features:
    """The kept features of some shards; `files` has the file of each, by the shard's url."""

    def __init__(self, files: Mapping[str, Path]):
        self.files = files
        self._open: dict[str, tuple[Any, frozenset[str]]] = {}

    def of(self, url: str, uid: str) -> Tensor | None:
        """The features of an image, [N, D]; None for a picture that could not be decoded.

        Raises DataError for a shard that has no file.
        """
        if url not in self._open:
            if url not in self.files:
                raise DataError(f"{url}: no features were kept for this shard")
            kept = safe_open(self.files[url], "pt")
            self._open[url] = kept, frozenset(kept.keys())
        kept, uids = self._open[url]
        tensor: Tensor | None = kept.get_tensor(uid) if uid in uids else None
        return tensor


def write(path: Path, batches: Iterable[tuple[list[str], Tensor]]) -> int:
    """Write batches of uids and their features [B, N, D] as one file; returns the number of images.

    An image that comes twice is kept once. Memory holds one batch: the tensors go to a temporary file first, since a
    safetensors file begins with the table of their places.
    """
    header: dict[str, dict[str, Any]] = {}
    end = 0
    with tempfile.TemporaryFile(dir=path.parent) as data:
        for uids, features_BND in batches:
            for uid, features_ND in zip(uids, features_BND, strict=True):
                if uid in header:
                    continue
                start, end = end, end + _append(data, features_ND)
                header[uid] = {
                    "dtype": DTYPES[features_ND.dtype],
                    "shape": list(features_ND.shape),
                    "data_offsets": [start, end],
                }
        contents = json.dumps(header).encode()
        contents += b" " * (-len(contents) % 8)  # the data begin at a multiple of eight
        data.seek(0)
        with atomic(path) as file:
            file.write(len(contents).to_bytes(8, "little") + contents)
            shutil.copyfileobj(data, file, 1 << 22)
    return len(header)


def _append(file: BinaryIO, tensor: Tensor) -> int:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return file.write(flat.view(torch.uint8).numpy().data)
