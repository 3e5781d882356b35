from __future__ import annotations

import pytest
import torch
from torch import Tensor

from capfilt.data.text.tokenizer import Tokenizer
from capfilt.objectives.config import SMOOTHING
from capfilt.objectives.losses.lm import lm

V = 11
CLS, SEP, PAD = 2, 3, 0
IDS = torch.tensor([[CLS, 5, 6, 7, 8, 9, SEP], [CLS, 4, 5, 6, SEP, PAD, PAD], [CLS, 7, SEP, PAD, PAD, PAD, PAD]])
MASK = (IDS != PAD).long()


@pytest.fixture
def logits() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(3, 7, V, dtype=torch.double, requires_grad=True)


def slow_lm(logits: Tensor, ids: Tensor, mask: Tensor, unlabelled: int, smoothing: float) -> Tensor:
    """Token by token: every token but the first `unlabelled` and padding is a label, told by the place before it."""
    terms = []
    for row in range(len(ids)):
        for place in range(max(unlabelled, 1), ids.shape[1]):
            if mask[row, place] == 0:
                continue
            scores = logits[row, place - 1]
            logs = scores - torch.log(torch.exp(scores).sum())
            smooth = [smoothing / V + (1 - smoothing) * (v == int(ids[row, place])) for v in range(V)]
            terms.append(-sum(weight * logs[v] for v, weight in enumerate(smooth)))
    return torch.stack(terms).mean()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("prompt", [0, 1, 3])
def test_value_and_gradient_are_the_formula_s(logits: Tensor, smoothing: float, prompt: int) -> None:
    found = lm(logits, IDS, MASK, prompt=prompt, smoothing=smoothing)
    wanted = slow_lm(logits, IDS, MASK, prompt, smoothing)
    (gradient,) = torch.autograd.grad(wanted, logits)
    (mine,) = torch.autograd.grad(found, logits)
    # The loss is taken in fp32 whatever it is given.
    torch.testing.assert_close(found.double(), wanted, atol=1e-6, rtol=0)
    torch.testing.assert_close(mine, gradient, atol=1e-7, rtol=1e-5)


def test_smoothing_is_the_paper_s_tenth(logits: Tensor) -> None:
    assert SMOOTHING == 0.1
    assert torch.equal(lm(logits, IDS, MASK), lm(logits, IDS, MASK, smoothing=0.1))
    assert not torch.isclose(lm(logits, IDS, MASK), lm(logits, IDS, MASK, smoothing=0.0))


def labelled(logits: Tensor, ids: Tensor, mask: Tensor, **options: int) -> list[list[int]]:
    """The places whose logits the loss depends on, row by row."""
    (gradient,) = torch.autograd.grad(lm(logits, ids, mask, **options), logits)
    return [torch.nonzero(row.abs().sum(dim=1)).flatten().tolist() for row in gradient]


def test_sep_is_predicted_and_padding_is_not(logits: Tensor) -> None:
    assert labelled(logits, IDS, MASK) == [[0, 1, 2, 3, 4, 5], [0, 1, 2, 3], [0, 1]]


def test_what_stands_under_padding_does_not_matter(logits: Tensor) -> None:
    other = IDS.masked_fill(MASK == 0, 9)
    assert torch.equal(lm(logits, other, MASK), lm(logits, IDS, MASK))


def test_the_mean_is_over_tokens_not_over_texts(logits: Tensor) -> None:
    each = [lm(logits[i : i + 1], IDS[i : i + 1], MASK[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(lm(logits, IDS, MASK), (6 * each[0] + 4 * each[1] + 2 * each[2]) / 12)


def test_without_a_prompt_every_word_is_predicted(logits: Tensor) -> None:
    assert torch.equal(lm(logits, IDS, MASK), lm(logits, IDS, MASK, prompt=0))
    assert torch.equal(lm(logits, IDS, MASK, prompt=1), lm(logits, IDS, MASK, prompt=0))
    assert labelled(logits, IDS, MASK)[0][0] == 0  # [DEC] predicts the first word


def test_a_picture_of_leaves_four_tokens_without_label() -> None:
    tokenizer = Tokenizer(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "picture", "of", "red", "dog"])
    assert int(tokenizer.encode(["a picture of "], 40)[1].sum()) - 1 == 4  # [CLS], later [DEC], and three words
    ids, mask = (torch.from_numpy(x) for x in tokenizer.encode(["a picture of a red dog", "a picture of dog"], 40))
    logits = torch.randn(*ids.shape, len(tokenizer), requires_grad=True)
    # Labels begin with the token at place 4, which the logits at place 3 ("of") predict.
    assert labelled(logits, ids, mask, prompt=4) == [[3, 4, 5, 6], [3, 4]]
    assert labelled(logits, ids, mask, prompt=0)[0] == [0, 1, 2, 3, 4, 5, 6]
