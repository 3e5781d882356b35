from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from capfilt.objectives.losses.itc_queries import itc_queries

B, Q, P = 5, 3, 4


def unit(*shape: int) -> Tensor:
    return F.normalize(torch.randn(*shape, dtype=torch.double), dim=-1)


def slow(image: Tensor, text: Tensor, temperature: Tensor, smoothing: float, image_ids: list[int] | None) -> Tensor:
    """Pair by pair, in the words of the paper."""
    total = torch.zeros((), dtype=torch.double)
    near = [[torch.stack([image[i, q] @ text[t] for q in range(Q)]).max() for t in range(B)] for i in range(B)]
    for own in range(B):
        right = [
            c for c in range(B) if (image_ids is None and c == own) or (image_ids and image_ids[c] == image_ids[own])
        ]
        for scores in ([near[own][t] for t in range(B)], [near[i][own] for i in range(B)]):
            odds = [torch.exp(score / temperature) for score in scores]
            told = [torch.log(one / sum(odds)) for one in odds]
            for c in range(B):
                wanted = (1 - smoothing) * (1 / len(right) if c in right else 0.0) + smoothing / B
                total = total - wanted * told[c]
    return total / (2 * B)


@pytest.mark.parametrize("image_ids", [None, [0, 1, 0, 2, 1]])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("heat", [0.07, 0.9])
def test_is_the_loss_written_out(heat: float, smoothing: float, image_ids: list[int] | None) -> None:
    torch.manual_seed(0)
    image, text, temperature = unit(B, Q, P), unit(B, P), torch.tensor(heat, dtype=torch.double)
    fast = [x.clone().requires_grad_() for x in (image, text, temperature)]
    own = [x.clone().requires_grad_() for x in (image, text, temperature)]
    found = itc_queries(*fast, smoothing, None if image_ids is None else torch.tensor(image_ids))
    wanted = slow(*own, smoothing, image_ids)
    torch.testing.assert_close(found.loss, wanted)
    found.loss.backward()
    wanted.backward()
    for x, y in zip(fast, own, strict=True):
        torch.testing.assert_close(x.grad, y.grad)
    nearest = torch.einsum("iqp,tp->iqt", image, text).amax(dim=1) / heat
    torch.testing.assert_close(found.image_to_text_BN, nearest)
    torch.testing.assert_close(found.text_to_image_BN, nearest.T)
    assert not found.image_to_text_BN.requires_grad
    same = torch.eye(B) if image_ids is None else torch.tensor([[float(a == b) for b in image_ids] for a in image_ids])
    target = (1 - smoothing) * same / same.sum(dim=1, keepdim=True) + smoothing / B
    torch.testing.assert_close([*found[3:]], [target.double()] * 2, check_dtype=False, atol=1e-6, rtol=0)
