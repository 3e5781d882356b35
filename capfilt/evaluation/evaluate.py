"""Asks a model about held-out pairs, and about web texts of known truth, and turns its answers into figures.

The figures' formulas are in `metrics/`. Nothing that trains or filters may read the truth.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import torch

from capfilt.data.policy import check_scores
from capfilt.errors import DataError, RecipeError
from capfilt.evaluation.config import EvaluateConfig
from capfilt.evaluation.eval_set import EncodedBatch, EvalSet, UniqueImages, encode_batches
from capfilt.evaluation.known_truth import ScoredTexts, truth
from capfilt.evaluation.metrics import captioning, matching, retrieval
from capfilt.inference.captioners.local import LocalCaptioner
from capfilt.inference.filters import local_filter
from capfilt.inference.filters.dual_encoder import DualEncoderFilter
from capfilt.inference.filters.fusion import FusionFilter
from capfilt.inference.local_model import LocalModel
from capfilt.inference.roles import lacking

T = TypeVar("T")
Figures = dict[str, float]


def examine(local: LocalModel, urls: Sequence[str], config: EvaluateConfig, device: torch.device) -> dict[str, Any]:
    """Everything that can be measured: retrieval, captioning, filter, each where model and shards allow it.

    Web texts of known truth are scored by the filter; all other texts are taken for human ones. `unreadable` and
    `without_text` count pictures that are in no figure.

    Raises:
        DataError: nothing can be measured.
        RecipeError: texts of known truth, and a filter that does not give `config.score`.
    """
    filter_, captioner = local_roles(local, config)
    scored, human, unreadable = ScoredTexts(), UniqueImages(), Counter[str]()
    for batch in encode_batches(local, urls, config.batch_size, device):
        unreadable.update(batch.unreadable)
        known = [truth(sample) is not None for sample in batch.samples]
        if filter_ is not None and any(known):
            score_known(filter_, config.score, batch.only(known), scored)
        if not all(known):
            human.add(batch.only([not is_known for is_known in known]))
    figures: dict[str, Any] = {}
    too_many = ""
    if (pairs := human.eval_set(device)) is not None:
        if filter_ is not None and (too_many := too_many_pairs(filter_, pairs, config)):
            logging.getLogger(__name__).warning("%s", too_many)
        elif filter_ is not None:
            figures["retrieval"] = retrieve(filter_, pairs, config)
        if captioner is not None:
            figures["captioning"] = caption(captioner, pairs, config.batch_size)
    if of_filter := scored.figures(config.threshold):
        figures["filter"] = of_filter
    if not figures:
        if too_many:
            raise DataError(too_many)
        why = "".join(f", mostly {reason}" for reason, _ in unreadable.most_common(1))
        where = ", ".join(urls)
        raise DataError(
            f"nothing can be measured on {where}: no pair that can be read ({unreadable.total()} unreadable{why},"
            f" {human.without_text} without a text) and that this model can be asked about; give other shards."
        )
    left_out = {"unreadable": unreadable.total(), "without_text": human.without_text}
    return figures | {why: count for why, count in left_out.items() if count}


def score_known(filter_: DualEncoderFilter, score: str, batch: EncodedBatch, scored: ScoredTexts) -> None:
    """Add the web texts of known truth of a batch, with their scores; an image whose web text was dropped has none.

    Raises:
        RecipeError: the filter does not give this score.
    """
    texts = [[str(c["text"]) for c in sample.captions if c["source"] == "web"][:1] for sample in batch.samples]
    values = score_of(filter_, score, batch.tokens, texts)
    for sample, of_image in zip(batch.samples, values, strict=True):
        for value in of_image:
            scored.add(value, truth(sample) or (False, ""))


def score_of(
    filter_: DualEncoderFilter, score: str, tokens: torch.Tensor, texts: Sequence[Sequence[str]]
) -> list[list[float]]:
    """One score of each image's texts. RecipeError where the filter does not give it."""
    check_scores([score], filter_.given, "this model")
    values = filter_.score_tokens(tokens, texts)[score]
    assert values is not None, "a filter that does not give what it says"
    return values


def retrieve(filter_: DualEncoderFilter, pairs: EvalSet, config: EvaluateConfig) -> Figures:
    """TR and IR recalls, in percent; with `rerank` by BLIP's two-stage rule (ITM logit + cosine on the candidates).
    A filter without cosines ranks all pairs by the ITM logit.

    Raises:
        RecipeError: `rerank`, and a filter that gives no itm.
    """
    if "itc" not in filter_.given:
        return retrieve_by_itm(filter_, pairs, config.batch_size)
    texts = pairs.flat_texts
    image = np.concatenate([filter_.image_features(part) for part in pairs.split(config.batch_size)])
    text = np.concatenate([filter_.text_features(part) for part in _parts(texts, config.batch_size)])
    itc = filter_.similarities(image, text)
    if not config.rerank:
        return dict(retrieval.recalls(itc, pairs.image_of_text))
    if not isinstance(filter_, FusionFilter):
        raise RecipeError(f"rerank is {config.rerank}, and this model gives no itm to rank by again: set rerank=0.")
    fusion = filter_

    def itm(images: np.ndarray, chosen: np.ndarray) -> np.ndarray:
        return itm_logits(fusion, pairs, images, chosen, 4 * config.batch_size)

    i2t, t2i = retrieval.rerank(itc, config.rerank, itm)
    return dict(retrieval.recalls(i2t, pairs.image_of_text, t2i))


def retrieve_by_itm(filter_: DualEncoderFilter, pairs: EvalSet, batch_size: int) -> Figures:
    """TR and IR recalls by the ITM logit of every text beside every image, as ViLT ranks."""
    assert isinstance(filter_, FusionFilter), "a filter gives one score at least"
    images, texts = len(pairs.texts), pairs.flat_texts
    # Text by text, short ones first: pairs that are read together have texts of about one length.
    order = np.argsort([len(text) for text in texts], kind="stable").repeat(images)
    logits = itm_logits(filter_, pairs, np.tile(np.arange(images), len(texts)), order, 4 * batch_size)
    itm_IT = np.empty((images, len(texts)), np.float32)
    itm_IT[np.tile(np.arange(images), len(texts)), order] = logits
    return dict(retrieval.recalls(itm_IT, pairs.image_of_text))


def itm_logits(filter_: FusionFilter, pairs: EvalSet, images: np.ndarray, chosen: np.ndarray, step: int) -> np.ndarray:
    """The logit of "matches" of images and texts, both by their numbers [N], `step` pairs at a time."""
    texts = pairs.flat_texts
    logits = [
        filter_.match_logits(pairs.of_images(images[i : i + step]), [texts[t] for t in chosen[i : i + step]])
        for i in range(0, len(images), step)
    ]
    return np.concatenate(logits)


def too_many_pairs(filter_: DualEncoderFilter, pairs: EvalSet, config: EvaluateConfig) -> str:
    """Why retrieval is not measured of so large a set; "" where it is."""
    images, texts = len(pairs.texts), len(pairs.flat_texts)
    if "itc" in filter_.given or images * texts <= config.itm_pairs:
        return ""
    return (
        f"retrieval is not measured: this model gives no cosine and would read {texts:,} texts beside {images:,} images"
        f" each, {images * texts:,} pairs, of which itm_pairs allows {config.itm_pairs:,}; give fewer images, or set it"
    )


def caption(captioner: LocalCaptioner, pairs: EvalSet, batch_size: int) -> dict[str, float | str]:
    """CIDEr and BLEU-4 of one text per image against its human texts, in percent, and how varied the texts are; and by
    what they were scored (`tokenisation`)."""
    written: list[str] = []
    for tokens, uids in zip(pairs.split(batch_size), _parts(pairs.uids, batch_size), strict=True):
        written += [of_image[0] for of_image in captioner.write(tokens, uids)]
    return {
        **captioning.cider(written, pairs.texts),
        **captioning.bleu4(written, pairs.texts),
        **captioning.diversity(written),
        "tokenisation": captioning.tokenisation(text for of_image in pairs.texts for text in of_image),
    }


def calibrate(
    filter_: DualEncoderFilter, pairs: EvalSet, score: str, recall: float, batch_size: int
) -> matching.Calibration:
    """Set a threshold on human pairs: the highest that lets `recall` of them pass, checked against shuffled pairs.

    Each image keeps its texts (right) and is given those of the next image in a fixed shuffle (wrong).
    """

    def scores(texts: list[list[str]]) -> list[float]:
        parts = zip(pairs.split(batch_size), _parts(texts, batch_size), strict=True)
        return [value for tokens, part in parts for row in score_of(filter_, score, tokens, part) for value in row]

    return matching.calibrate(scores(pairs.texts), scores(shuffled(pairs)), recall)


def shuffled(pairs: EvalSet) -> list[list[str]]:
    """For each image the texts of another one, the next in a fixed shuffle; of a single image its own."""
    order = np.random.default_rng(0).permutation(len(pairs.texts))
    wrong = [pairs.texts[0]] * len(order)
    for image, stranger in zip(order, np.roll(order, 1), strict=True):
        wrong[image] = pairs.texts[stranger]
    return wrong


def human_pairs(filter_: DualEncoderFilter, pairs: EvalSet, batch_size: int) -> dict[str, Any]:
    """How well a filter tells human pairs from shuffled ones: `images`, `texts`, and `auc` by each score it gives.

    It is no measure of web texts, whose mistakes may be subtler than another image's text.

    Raises:
        DataError: fewer than two images, which cannot be shuffled.
    """
    if len(pairs.texts) < 2:
        raise DataError("human pairs of one image cannot be shuffled; give the pairs of two images or more")

    def scores(texts: list[list[str]]) -> dict[str, list[float]]:
        values: dict[str, list[float]] = {score: [] for score in filter_.given}
        for tokens, part in zip(pairs.split(batch_size), _parts(texts, batch_size), strict=True):
            by_score = filter_.score_tokens(tokens, part)
            for score, into in values.items():
                into += [value for of_image in by_score[score] or [] for value in of_image]
        return values

    right, wrong = scores(pairs.texts), scores(shuffled(pairs))
    areas = {}
    for score in right:
        labels = [True] * len(right[score]) + [False] * len(wrong[score])
        areas[score] = matching.auc(right[score] + wrong[score], labels)
    return {"images": len(pairs.texts), "texts": len(pairs.flat_texts), "auc": areas}


def local_roles(local: LocalModel, config: EvaluateConfig) -> tuple[DualEncoderFilter | None, LocalCaptioner | None]:
    """The roles that a model can play in an examination."""
    able = local.model.capabilities
    filter_ = None if lacking("filter", able) else local_filter(local)
    captioner = None if lacking("captioner", able) else LocalCaptioner(local, config.decode)
    return filter_, captioner


def _parts(items: Sequence[T], size: int) -> list[list[T]]:
    return [list(items[i : i + size]) for i in range(0, len(items), size)]
