"""Image-text retrieval: recall at K in both directions, and BLIP's two-stage ranking.

A tie is worth what a fair coin would make of it: sorting instead would let a model that gives every pair the
same score find its captions by their position, since data sets list them next to their image.

Shape suffixes: I images, T texts, Q queries, C candidates, P right pairs, N pairs to score.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from capfilt.errors import DataError, ModelError, UsageError

Scores = NDArray[np.floating[Any]]
Indices = NDArray[np.integer[Any]]
Itm = Callable[[NDArray[np.int64], NDArray[np.int64]], Scores]
"""(image indices [N], text indices [N]) -> positive ITM logits [N], before any softmax."""

CUTOFFS = (1, 5, 10)
NO_CANDIDATE = -100.0
"""The score of a pair outside the top k: far below any ITM logit + cosine (BLIP's constant)."""

_BLOCK_CELLS = 1 << 24
"""Cells compared at once: COCO's 5,000 x 25,010 matrix must not grow several copies of itself."""


def recalls(scores_i2t_IT: Scores, image_of_text: Indices, scores_t2i_IT: Scores | None = None) -> dict[str, float]:
    """Measure tr@1, tr@5, tr@10, ir@1, ir@5 and ir@10, in percent.

    tr@K is the share of images with at least one own caption among the K best of all texts; ir@K the share of
    texts whose image is among the K best of all images (Karpathy & Fei-Fei 2015, as BLIP and X-VLM report
    it). Both matrices are [images, texts]; text -> image uses the first one unless it has its own (two-stage
    ranking scores the directions separately). `image_of_text` [T] holds each text's image. An image without a
    text only distracts: it counts in ir@K, not in tr@K.

    Ties: the expected value under random tie-breaking, exactly. A constant matrix scores chance. With no
    texts, {} is returned.

    Raises DataError when the shapes or `image_of_text` don't fit, ModelError when a score is NaN.
    """
    forth_IT = np.asarray(scores_i2t_IT)
    back_IT = forth_IT if scores_t2i_IT is None else np.asarray(scores_t2i_IT)
    image_T = _image_indices(forth_IT, back_IT, np.asarray(image_of_text))
    if image_T.size == 0:
        return {}
    for scores_IT in (forth_IT,) if scores_t2i_IT is None else (forth_IT, back_IT):
        _refuse_nan(scores_IT, "retrieval scores")
    text_T = np.arange(image_T.size)
    return _recall("tr", forth_IT, image_T, text_T) | _recall("ir", back_IT.T, text_T, image_T)


def rerank(itc_IT: Scores, top_k: int, itm: Itm) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Rank in two stages as BLIP does: ITC chooses `top_k` candidates a query, ITM + ITC orders them.

    Returns (scores_i2t, scores_t2i), both [images, texts], ready for `recalls`: a candidate scores its
    positive ITM logit plus its ITC cosine, every other pair `NO_CANDIDATE`. The candidates of an image are
    its top_k texts, those of a text its top_k images; equal cosines at the border go to the lower index.
    `itm` is called once, with every pair that is a candidate in either direction, sorted by image (so an
    image is encoded once a run of pairs); a pair is never scored twice. With top_k below 10, recall at 10 also
    counts pairs nobody ordered: they tie, and are worth chance.

    Raises UsageError when top_k < 1, DataError when the scores are no matrix, ModelError when a score is NaN
    or `itm` returns the wrong number of logits.
    """
    if top_k < 1:
        raise UsageError(
            f"top_k is {top_k}; re-ranking needs at least 1 candidate a query "
            "(BLIP takes 256 for COCO, 128 for Flickr30K)."
        )
    itc = np.asarray(itc_IT)
    if itc.ndim != 2:
        raise DataError(f"the ITC scores have shape {itc.shape}; two-stage ranking needs [images, texts].")
    _refuse_nan(itc, "ITC scores")
    forth_IT, back_IT = _candidates(itc, top_k), _candidates(itc.T, top_k).T
    image_N, text_N = np.nonzero(forth_IT | back_IT)
    logit_N = np.asarray(itm(image_N, text_N))
    if logit_N.shape != image_N.shape:
        raise ModelError(
            f"{image_N.size} pairs went to the ITM head, logits of shape {logit_N.shape} came back; "
            "one positive logit a pair is needed."
        )
    _refuse_nan(logit_N, "ITM logits")
    final_IT = np.full(itc.shape, NO_CANDIDATE, np.float32)
    final_IT[image_N, text_N] = logit_N + itc[image_N, text_N]
    masked = np.float32(NO_CANDIDATE)
    return np.where(forth_IT, final_IT, masked), np.where(back_IT, final_IT, masked)


def _recall(
    prefix: str, scores_QC: Scores, query_P: NDArray[np.int64], candidate_P: NDArray[np.int64]
) -> dict[str, float]:
    """Average the chance of a hit over the queries that have a right pair (query_P, candidate_P)."""
    num_queries = scores_QC.shape[0]
    right_P = scores_QC[query_P, candidate_P]
    best_Q = np.full(num_queries, right_P.min())
    np.maximum.at(best_Q, query_P, right_P)
    right_tied_Q = np.bincount(query_P[right_P == best_Q[query_P]], minlength=num_queries)
    better_Q, tied_Q = _places(scores_QC, best_Q)
    asked_Q = right_tied_Q > 0
    better, tied, right = better_Q[asked_Q], tied_Q[asked_Q], right_tied_Q[asked_Q]
    return {f"{prefix}@{k}": 100.0 * float(_hit_chance(k, better, tied, right).mean()) for k in CUTOFFS}


def _places(scores_QC: Scores, best_Q: Scores) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Count each query's candidates above its best right one, and those level with it (itself included)."""
    num_queries, num_candidates = scores_QC.shape
    better_Q, tied_Q = np.zeros(num_queries, np.int64), np.zeros(num_queries, np.int64)
    step = max(1, _BLOCK_CELLS // num_candidates)
    for start in range(0, num_queries, step):
        rows = slice(start, start + step)
        better_Q[rows] = np.count_nonzero(scores_QC[rows] > best_Q[rows, None], axis=1)
        tied_Q[rows] = np.count_nonzero(scores_QC[rows] == best_Q[rows, None], axis=1)
    return better_Q, tied_Q


def _hit_chance(
    k: int, better: NDArray[np.int64], tied: NDArray[np.int64], right: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Chance of a right candidate among the first k, the `tied` ones (`right` of them right) in random order.

    Drawing without replacement: the j-th free place misses with (tied - right - j) / (tied - j).
    """
    places = np.minimum(k - better, tied)
    miss = np.ones(better.shape)
    for j in range(k):
        wrong_left = np.maximum(tied - right - j, 0)
        miss = np.where(j < places, miss * wrong_left / np.maximum(tied - j, 1), miss)
    return 1.0 - miss


def _candidates(scores_QC: Scores, top_k: int) -> NDArray[np.bool_]:
    """Mark each query's top_k candidates, row by row: all of COCO's ranks at once would take a gigabyte."""
    chosen_QC = np.zeros(scores_QC.shape, np.bool_)
    for query, scores_C in enumerate(scores_QC):
        chosen_QC[query, np.argsort(-scores_C, kind="stable")[:top_k]] = True
    return chosen_QC


def _image_indices(forth_IT: Scores, back_IT: Scores, image_of_text: Indices) -> NDArray[np.int64]:
    if forth_IT.ndim != 2 or back_IT.shape != forth_IT.shape:
        raise DataError(
            f"the scores have shapes {forth_IT.shape} (image -> text) and {back_IT.shape} (text -> image); "
            "both must be [images, texts]: transpose a [texts, images] matrix."
        )
    num_images, num_texts = forth_IT.shape
    if image_of_text.shape != (num_texts,):
        raise DataError(
            f"image_of_text has shape {image_of_text.shape}; it must name one image for each of {num_texts} texts."
        )
    if num_texts and not np.issubdtype(image_of_text.dtype, np.integer):
        raise DataError(
            f"image_of_text holds {image_of_text.dtype}; it must hold whole row numbers of the score matrix."
        )
    outside = image_of_text[(image_of_text < 0) | (image_of_text >= num_images)]
    if outside.size:
        raise DataError(f"image_of_text names image {outside[0]}; the scores have images 0 to {num_images - 1}.")
    return image_of_text.astype(np.int64)


def _refuse_nan(scores: Scores, what: str) -> None:
    if np.isnan(scores).any():
        raise ModelError(
            f"{np.count_nonzero(np.isnan(scores))} of {scores.size} {what} are NaN; a NaN has no rank. "
            "Check the checkpoint, or evaluate in float32."
        )
