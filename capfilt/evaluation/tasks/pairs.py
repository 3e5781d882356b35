"""Retrieval and captioning: images with their human texts, beside what guessing or one text for all images reaches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch

from capfilt.errors import DataError
from capfilt.evaluation.eval_set import EvalSet, UniqueImages, encode_batches
from capfilt.evaluation.evaluate import caption, retrieve, too_many_pairs
from capfilt.evaluation.metrics import captioning
from capfilt.evaluation.metrics.retrieval import recalls
from capfilt.evaluation.tasks import Measured
from capfilt.evaluation.tasks.config import CaptioningEvalConfig, RetrievalEvalConfig
from capfilt.evaluation.tasks.rows import LeftOut
from capfilt.inference.captioners.local import LocalCaptioner
from capfilt.inference.filters import local_filter
from capfilt.inference.local_model import LocalModel


def measure_retrieval(
    local: LocalModel, urls: Sequence[str], config: RetrievalEvalConfig, device: torch.device
) -> Measured:
    """`evaluate.retrieve` of the texts of shards. DataError: there is none, or there are too many pairs to read."""
    pairs, left_out = read_pairs(local, urls, config.batch_size, device)
    filter_ = local_filter(local)
    if problem := too_many_pairs(filter_, pairs, config.whole()):
        raise DataError(problem)
    image_of_text = pairs.image_of_text
    guessing = recalls(np.zeros((len(pairs.texts), len(image_of_text)), np.float32), image_of_text)
    figures = {**retrieve(filter_, pairs, config.whole()), "images": len(pairs.texts), "texts": len(image_of_text)}
    return Measured({"retrieval": figures | {"guessing": guessing}} | left_out.figures())


def measure_captioning(
    local: LocalModel, urls: Sequence[str], config: CaptioningEvalConfig, device: torch.device
) -> Measured:
    """`evaluate.caption` of the images of shards. DataError where none has a text."""
    pairs, left_out = read_pairs(local, urls, config.batch_size, device)
    figures = caption(LocalCaptioner(local, config.decode), pairs, config.batch_size)
    ((common, _),) = Counter(pairs.flat_texts).most_common(1)
    same = [common] * len(pairs.texts)
    constant = captioning.cider(same, pairs.texts) | captioning.bleu4(same, pairs.texts)
    return Measured({"captioning": {**figures, "images": len(same), "constant": constant}} | left_out.figures())


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
