"""Retrieval: recalls of texts by images and of images by texts, beside what guessing reaches."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from capfilt.errors import DataError
from capfilt.evaluation.evaluate import retrieve, too_many_pairs
from capfilt.evaluation.metrics.retrieval import recalls
from capfilt.evaluation.tasks import Measured
from capfilt.evaluation.tasks.config import RetrievalEvalConfig
from capfilt.evaluation.tasks.pairs import read_pairs
from capfilt.inference.filters import local_filter
from capfilt.inference.local_model import LocalModel


def measure(local: LocalModel, urls: Sequence[str], config: RetrievalEvalConfig, device: torch.device) -> Measured:
    """`evaluate.retrieve` of the texts of shards. DataError: there is none, or there are too many pairs to read."""
    pairs, left_out = read_pairs(local, urls, config.batch_size, device)
    filter_ = local_filter(local)
    if problem := too_many_pairs(filter_, pairs, config.whole()):
        raise DataError(problem)
    image_of_text = pairs.image_of_text
    guessing = recalls(np.zeros((len(pairs.texts), len(image_of_text)), np.float32), image_of_text)
    figures = {**retrieve(filter_, pairs, config.whole()), "images": len(pairs.texts), "texts": len(image_of_text)}
    return Measured({"retrieval": figures | {"guessing": guessing}} | left_out.figures())
