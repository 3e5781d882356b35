"""Zero-shot classification: the class whose prompts are nearest to the image (CLIP section 3.1.4).

A class is one unit vector: its prompts, one a template, are encoded, normalised, averaged and normalised again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from capfilt.data.sample import Sample
from capfilt.data.tasks import ClassList, FailedRow, class_of
from capfilt.evaluation.metrics import classification
from capfilt.evaluation.tasks import Measured
from capfilt.evaluation.tasks.config import ClassificationEvalConfig
from capfilt.evaluation.tasks.rows import RowReader
from capfilt.inference.filters.dual_encoder import MAX_TEXTS, DualEncoderFilter
from capfilt.inference.local_model import LocalModel


class Labelled(NamedTuple):
    """A picture and the number of its class."""

    label: int
    id: None = None


def measure(local: LocalModel, urls: Sequence[str], config: ClassificationEvalConfig, device: torch.device) -> Measured:
    """Top-1 and top-5 of the pictures of shards. DataError where none has a class."""
    classes = ClassList(config.classes, config.templates)
    filter_ = DualEncoderFilter(local, local.model.config.scored_length)
    vectors_CP = class_vectors(filter_, classes)

    def parse(sample: Sample, failed: list[FailedRow]) -> list[Labelled]:
        label = class_of(sample.meta, sample.extras, classes)
        if label is None:
            failed.append(FailedRow("class", "no class"))
        return [] if label is None else [Labelled(label)]

    reader = RowReader(local, parse, config.batch_size, device, extras=True)
    scores, labels = [], []
    for batch in reader.batches(urls):
        with torch.inference_mode():
            tokens = local.model.encode_image(batch.pixels)
        scores.append(filter_.similarities(filter_.image_features(tokens), vectors_CP))
        labels += [row.label for row in batch.flat]
    figures = classification.accuracy(np.concatenate(scores), labels)
    figures |= {"classes": len(classes.names), "templates": len(classes.templates)}
    figures["guessing"] = 100.0 / len(classes.names)
    return Measured({"classification": figures} | reader.left_out.figures())


def class_vectors(filter_: DualEncoderFilter, classes: ClassList) -> np.ndarray:
    """The unit vector of each class [C, projection]."""
    at_once = max(1, MAX_TEXTS // len(classes.templates))
    vectors = []
    for start in range(0, len(classes.names), at_once):
        numbers = range(start, min(start + at_once, len(classes.names)))
        prompts = [prompt for number in numbers for prompt in classes.prompts(number)]
        of_prompts = filter_.text_features(prompts).reshape(len(numbers), len(classes.templates), -1)
        vectors.append(of_prompts.mean(axis=1))
    joined = np.concatenate(vectors)
    unit: np.ndarray = joined / np.linalg.norm(joined, axis=1, keepdims=True).clip(1e-12)
    return unit
