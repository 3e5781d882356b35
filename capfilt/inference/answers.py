"""What models for downstream tasks say of texts about pictures: how likely each class is, or an answer.

A text's answer depends on the text and its picture alone, but for rounding: what else is in the batch changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from capfilt.inference.config import DecodeConfig
from capfilt.inference.generation.beam import scored_beams
from capfilt.inference.generation.output_layer import blocked_head
from capfilt.inference.local_model import LocalModel
from capfilt.models.layers.image_context import ImageContext
from capfilt.models.layers.precision import at_least_fp32
from capfilt.models.layers.transfer import to_device

MAX_LENGTH = 50
"""Tokens of a text that is answered, where the model has as many positions."""
RANKED = 128
"""Answers whose first token is likeliest that are ranked as a whole, as in the public codes."""
MAX_ROWS = 1024
"""Answers that are ranked at a time."""
WRITTEN = DecodeConfig(method="beam", beams=3, min_length=1, max_length=10, accounting="original")
"""How BLIP's code writes an answer."""


@torch.inference_mode()
def classify(local: LocalModel, pixels: Tensor, texts: Sequence[str], picture: Sequence[int]) -> Tensor:
    """How likely each class of a classifier is, [R, labels], for R texts; names are `local.model.config.labels`.

    Args:
        pixels: pictures [B, 3, S, S] as the model reads them; of a model of two pictures [2 B, 3, S, S], the left ones
            first.
        picture: the number of each text's picture among the B.
    """
    model, sides = local.model, local.model.config.pictures_of_text
    ids, mask = _encoded(local, texts)
    tokens, rows = model.encode_image(pixels), to_device(torch.tensor(picture), ids.device)
    rows = torch.cat([rows + side * (len(pixels) // sides) for side in range(sides)])
    return at_least_fp32(model.classify(tokens[rows], ids, mask)).softmax(dim=1)


@torch.inference_mode()
def answer(
    local: LocalModel,
    pixels: Tensor,
    questions: Sequence[str],
    picture: Sequence[int],
    answers: Sequence[str] | None = None,
    ranked: int = RANKED,
) -> list[str]:
    """An answer to each of R questions: a classifier's likeliest class, or by a decoder the best one of a list, or one
    that it writes.

    Args:
        pixels: pictures [B, 3, S, S] as the model reads them.
        picture: the number of each question's picture among the B.
        answers: the list; None: the one that the model was trained with; empty: answers are written freely.
        ranked: how many of the list, by their first token, are scored as a whole.
    """
    model = local.model
    if "classify" in model.capabilities:
        labels = model.config.known_answers or ()
        return [labels[best] for best in classify(local, pixels, questions, picture).argmax(dim=1).tolist()]
    ids, mask = _encoded(local, questions)
    tokens = model.encode_image(pixels)[to_device(torch.tensor(picture), ids.device)]
    context = model.question_context(tokens, ids, mask)
    listed = (model.config.known_answers or ()) if answers is None else answers
    if listed:
        return [listed[best] for best in rank(local, context, listed, ranked).tolist()]
    first = local.tokenizer.cls if model.config.first_token is None else model.config.first_token
    head = blocked_head(model)
    written = scored_beams(model, context.laid_out(), [first], local.tokenizer.sep, WRITTEN, 1, head)
    return [local.tokenizer.decode(beam.ids) for beam in written]


@torch.inference_mode()
def rank(local: LocalModel, context: ImageContext, answers: Sequence[str], ranked: int = RANKED) -> Tensor:
    """Which of the answers a decoder finds likeliest for each question of a `question_context`, [R] numbers: of those
    whose first token is likeliest, the one with the least loss over all of its tokens (BLIP's ranking), to which that
    of the first is added again in models that rank so (ALBEF, X-VLM). Answers are read as they are spelt."""
    model = local.model
    ids, mask = (
        to_device(torch.from_numpy(x), context.device) for x in local.tokenizer.encode_answers(answers, MAX_LENGTH)
    )
    start = ids[:1, :1].expand(context.rows, 1)
    first_RV = at_least_fp32(model.decode(start, torch.ones_like(start), context)[:, 0])
    count = min(ranked, len(answers))
    first_RA = first_RV.log_softmax(dim=1)[:, ids[:, 1]]
    chosen_RK = first_RA.topk(count, dim=1).indices
    best = []
    size = max(1, MAX_ROWS // count)
    for begin in range(0, context.rows, size):
        some_RK = chosen_RK[begin : begin + size]
        rows = some_RK.flatten()
        beside = context.select(slice(begin, begin + size)).repeat_interleave(count)
        logits = at_least_fp32(model.decode(ids[rows], mask[rows], beside)[:, :-1]).transpose(1, 2)
        labels = ids[rows, 1:].masked_fill(mask[rows, 1:] == 0, -100)
        smoothing = model.config.rank_smoothing
        loss = F.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing).sum(dim=1).view(-1, count)
        if model.config.ranks_first_twice:
            loss = loss - first_RA[begin : begin + size].gather(1, some_RK)
        best.append(some_RK.gather(1, loss.argmin(dim=1, keepdim=True))[:, 0])
    return torch.cat(best)


def _encoded(local: LocalModel, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """The ids of texts and their mask, where the model computes."""
    length = min(MAX_LENGTH, local.model.config.max_positions)
    ids, mask = local.tokenizer.encode([local.tokenizer.clean(text) for text in texts], length)
    return to_device(torch.from_numpy(ids), local.device), to_device(torch.from_numpy(mask), local.device)
