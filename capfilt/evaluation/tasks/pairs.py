"""The images of retrieval and captioning with their human texts, and how many had to be left out."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from capfilt.errors import DataError
from capfilt.evaluation.eval_set import EvalSet, UniqueImages, encode_batches
from capfilt.evaluation.tasks.rows import LeftOut
from capfilt.inference.local_model import LocalModel


def read_pairs(
    local: LocalModel, urls: Sequence[str], batch_size: int, device: torch.device
) -> tuple[EvalSet, LeftOut]:
    """The pictures of shards with their texts, each picture once; the rows that are counted are samples.

    Raises:
        DataError: no picture can be read and has a text.
    """
    images, left_out = UniqueImages(), LeftOut()
    for batch in encode_batches(local, urls, batch_size, device):
        images.add(batch)
        left_out.rows += sum(bool(sample.captions) for sample in batch.samples)
        for reason, count in batch.unreadable.items():
            left_out.add(f"picture: {reason}", f"{count} samples", count)
    if images.without_text:
        left_out.add("no text", f"{images.without_text} samples", images.without_text)
    if (pairs := images.eval_set(device)) is None:
        where = ", ".join(urls) or "(no shard)"
        raise DataError(f"{where}: none of {left_out.rows} samples has a picture that can be read, and a text")
    return pairs, left_out
