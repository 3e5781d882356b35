"""Visual dialog: the place of the given answer among the candidates, and NDCG by how fitting people find each one.

The measures are those of VisDial 1.0's server, but for ties, which it breaks by an unstable sort: here a tie is
worth its average over all orders, so that a model which gives every candidate the same score earns chance wherever
the data put the right one. Without ties the figures are the server's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from capfilt.errors import DataError, ModelError
from capfilt.evaluation.metrics.rows import check_columns, check_unique

CUTOFFS = (1, 5, 10)

Relevance = Sequence[Sequence[float] | None]
Scores = NDArray[np.float64]


def figures(
    scores: Sequence[ArrayLike],
    gt_index: Sequence[int | None],
    relevance: Relevance | None = None,
    ids: Sequence[Hashable] | None = None,
) -> dict[str, Any]:
    """Measure r@1, r@5, r@10, mrr and ndcg in percent and mean_rank, over rounds of dialogs, one a row.

    A round has scores of its candidates (100 in VisDial, more is better), `gt_index`, the number of the answer that
    was given, and `relevance`, one figure a candidate from 0 on (VisDial has them for one round of a dialog). Rounds
    without gt_index are in none of the first five figures, rounds without relevance not in ndcg; one whose relevance
    is 0 everywhere has no ndcg (0/0) and is counted in all_irrelevant. rounds and dense_rounds say over how many rounds
    the figures are; what has nothing to average is absent.

    ndcg looks at the first k candidates, k the number of those with relevance above 0: their relevances / log2(place
    + 1), over the same sum in the best order.

    Raises DataError when columns or a round's lists differ in length, an id stands twice or a value is out of range,
    ModelError for NaN.
    """
    check_columns("rounds of scores", len(scores), gt_index=gt_index, relevance=relevance, ids=ids)
    check_unique("round", ids)
    places: list[tuple[int, int]] = []
    gains: list[float] = []
    irrelevant = 0
    for row, of_round in enumerate(scores):
        values = _scores(of_round, row)
        if (right := gt_index[row]) is not None:
            places.append(_place(values, right, row))
        if relevance is not None and (wanted := relevance[row]) is not None:
            gain = _ndcg(values, _relevance(wanted, values.size, row))
            irrelevant += gain is None
            gains += [] if gain is None else [gain]
    result: dict[str, Any] = {"rounds": len(places)}
    if len(places) < len(scores):
        result["without_answer"] = len(scores) - len(places)
    if places:
        result |= _ranking(places)
    if gains:
        result |= {"ndcg": 100.0 * float(np.mean(gains)), "dense_rounds": len(gains)}
    if irrelevant:
        result["all_irrelevant"] = irrelevant
    return result


def random_ranking(
    candidates: Sequence[int], gt_index: Sequence[int | None], relevance: Relevance | None = None
) -> dict[str, Any]:
    """The figures to beat, of candidates (so many a round) in random order, exactly. Raises as `figures`."""
    return figures([np.zeros(count) for count in candidates], gt_index, relevance)


def prior(
    questions: Sequence[str], candidates: Sequence[Sequence[str]], gt_index: Sequence[int | None], relevance: Relevance
) -> dict[str, Any]:
    """The figures to beat of candidates in the order of how often each answers a question with the same two first
    words, in these very rounds: what can be known without the picture and the history. Raises as `figures`."""
    check_columns("questions", len(questions), candidates=candidates, gt_index=gt_index)
    kinds = [" ".join(question.lower().split()[:2]) for question in questions]
    given = Counter(
        (kind, texts[right])
        for kind, texts, right in zip(kinds, candidates, gt_index, strict=True)
        if right is not None and 0 <= right < len(texts)
    )
    scores = [[given[kind, text] for text in texts] for kind, texts in zip(kinds, candidates, strict=True)]
    return figures(scores, gt_index, relevance)


def ranks(scores: ArrayLike) -> list[int]:
    """Each candidate's place, from 1, as the server's file has it: a tie goes to the earlier candidate."""
    values = _scores(scores, 0)
    places = np.empty(values.size, np.int64)
    places[np.argsort(-values, kind="stable")] = np.arange(1, values.size + 1)
    return [int(place) for place in places]


def _ranking(places: Sequence[tuple[int, int]]) -> dict[str, float]:
    better, tied = np.array(places).T
    reciprocal = np.concatenate([[0.0], np.cumsum(1.0 / np.arange(1, (better + tied).max() + 1))])
    hits = {f"r@{k}": 100.0 * float(np.clip((k - better) / tied, 0.0, 1.0).mean()) for k in CUTOFFS}
    return hits | {
        "mean_rank": float((better + (tied + 1) / 2).mean()),
        "mrr": 100.0 * float(((reciprocal[better + tied] - reciprocal[better]) / tied).mean()),
    }


def _place(values: Scores, right: int, row: int) -> tuple[int, int]:
    """How many candidates are better than the right one, and how many are level with it, itself included."""
    if not 0 <= right < values.size:
        raise DataError(f"gt_index of row {row} is {right}; its candidates are 0 to {values.size - 1}.")
    return int((values > values[right]).sum()), int((values == values[right]).sum())


def _ndcg(values: Scores, wanted: Scores) -> float | None:
    """None where nothing is relevant. Candidates of one score share their places' discounts evenly."""
    relevant = int((wanted > 0).sum())
    if not relevant:
        return None
    discounts = np.zeros(values.size)
    discounts[:relevant] = 1.0 / np.log2(np.arange(2, relevant + 2))
    _, group, size = np.unique(-values, return_inverse=True, return_counts=True)
    until = np.concatenate([[0.0], np.cumsum(discounts)])
    stop = np.cumsum(size)
    share = (until[stop] - until[stop - size]) / size
    best = np.sort(wanted)[::-1]
    return float((wanted * share[group]).sum() / (best * discounts).sum())


def _scores(of_round: ArrayLike, row: int) -> Scores:
    values = np.asarray(of_round, np.float64)
    if values.ndim != 1 or not values.size:
        raise DataError(f"the scores of row {row} have shape {values.shape}; a round has one score a candidate.")
    if np.isnan(values).any():
        raise ModelError(f"a score of row {row} is NaN, which has no rank. Evaluate in float32.")
    return values


def _relevance(of_round: Sequence[float], candidates: int, row: int) -> Scores:
    values = np.asarray(of_round, np.float64)
    if values.shape != (candidates,):
        raise DataError(f"row {row} has {candidates} candidates but {values.size} relevances; there must be one each.")
    if not (values >= 0).all() or np.isinf(values).any():
        raise DataError(f"a relevance of row {row} is negative or no number; VisDial's are in 0 to 1.")
    return values
