"""Visual dialog: the candidate answers of each round ranked by a model that fuses, or by one that decodes.

The first gives the log-odds that caption, history, question and candidate match the picture; the second the likelihood
of the candidate's words behind the others, their product, as VisDial's generative models are ranked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from capfilt.data.sample import Sample
from capfilt.data.tasks import FailedRow, dialog_of
from capfilt.data.text.dialog_texts import RoundText, encode_candidates, turns_of
from capfilt.evaluation.metrics import dialog as metrics
from capfilt.evaluation.result_files import write_visdial
from capfilt.evaluation.tasks import Measured
from capfilt.evaluation.tasks.config import DialogEvalConfig
from capfilt.evaluation.tasks.rows import RowReader
from capfilt.inference.local_model import LocalModel
from capfilt.models.layers.transfer import to_device
from capfilt.objectives.tasks.dialog import log_likelihoods, log_odds

PAIRS = 512
"""Candidates that are read at a time; of a decoder, which gives logits of all words at each place, a tenth."""


class Round(NamedTuple):
    """A round with candidates, and what is known of them."""

    id: str
    dialog: int | str
    number: int
    """From 1, as VisDial counts."""
    text: RoundText
    gt_index: int | None
    relevance: tuple[float, ...] | None


def measure(local: LocalModel, urls: Sequence[str], config: DialogEvalConfig, device: torch.device) -> Measured:
    """R@1/5/10, mean rank, MRR and NDCG of the rounds of shards, beside those of a random order (`guessing`) and of the
    answers that are frequent after such questions (`prior`).

    Raises:
        DataError: no round has candidates.
    """
    by_match = config.by_match(local.model.config)
    length = min(config.max_length or local.model.config.max_positions, local.model.config.max_positions)
    reader = RowReader(local, rounds_of, config.batch_size, device)
    rounds: list[Round] = []
    scores: list[np.ndarray] = []
    for batch in reader.batches(urls):
        with torch.inference_mode():
            tokens = local.model.encode_image(batch.pixels)
            rounds += batch.flat
            scores += scores_of(local, tokens, batch.flat, batch.sample_of_row, length, by_match)
    known = [one.gt_index for one in rounds], [one.relevance for one in rounds]
    figures = metrics.figures(scores, *known)
    texts = [one.text.candidates for one in rounds]
    figures["ranked_by"] = "match" if by_match else "likelihood"
    figures["guessing"] = _main(metrics.random_ranking([len(of_round) for of_round in texts], *known))
    figures["prior"] = _main(metrics.prior([one.text.turns[-1] for one in rounds], texts, *known))
    answers = [(one.dialog, one.number, of_round) for one, of_round in zip(rounds, scores, strict=True)]
    return Measured({"dialog": figures} | reader.left_out.figures(), lambda path: write_visdial(path, answers))


def _main(figures: Mapping[str, Any]) -> dict[str, Any]:
    return {name: figures[name] for name in ("r@1", "mean_rank", "mrr", "ndcg") if name in figures}


def rounds_of(sample: Sample, failed: list[FailedRow]) -> list[Round]:
    """The rounds of a sample's dialog that have candidates."""
    dialog = dialog_of(sample.meta, failed)
    if dialog is None:
        return []
    return [
        Round(
            f"{dialog.id}:{number}",
            dialog.id,
            number + 1,
            RoundText(turns_of(dialog, number), one.options),
            one.gt_index,
            one.relevance,
        )
        for number, one in enumerate(dialog.rounds)
        if one.options
    ]


def scores_of(
    local: LocalModel, tokens_BND: Tensor, rounds: Sequence[Round], image: Sequence[int], length: int, by_match: bool
) -> list[np.ndarray]:
    """A score of each candidate of each round, whose picture is number `image` of those whose tokens are given."""
    model, device = local.model, tokens_BND.device
    context = model.image_context(tokens_BND, "encoder" if by_match else "decoder")
    made = encode_candidates(local.tokenizer, [one.text for one in rounds], length)
    counts = [len(one.text.candidates) for one in rounds]
    image_N = to_device(torch.tensor(image).repeat_interleave(torch.tensor(counts)), device)
    ids, mask, answer = (to_device(torch.from_numpy(array), device) for array in made)
    scores = []
    step = PAIRS if by_match else max(1, PAIRS // 10)
    for start in range(0, len(ids), step):
        some = slice(start, start + step)
        width = int(made[1][some].sum(axis=1).max())
        of_images = context.select(image_N[some])
        if by_match:
            logits = model.match(model.fuse(ids[some, :width], mask[some, :width], of_images))
            scores.append(log_odds(logits))
        else:
            logits = model.decode(ids[some, :width], mask[some, :width], of_images)
            scores.append(log_likelihoods(logits, ids[some, :width], answer[some, :width]))
    every: np.ndarray = torch.cat(scores).float().cpu().numpy()
    return np.split(every, np.cumsum(counts)[:-1])
