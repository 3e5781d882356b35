from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from capfilt.objectives.losses.itc import TEMPERATURE_RANGE, Itc, itc, ramp


def unit(rows: int, seed: int, width: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, width, dtype=torch.double, generator=generator), dim=-1)


def inputs(B: int = 4, Q: int = 5, temperature: float = 0.07) -> list[Tensor]:
    """image, text, their momentum twins, two queues, temperature; the online three want gradients."""
    rows = [unit(B, seed) for seed in range(4)] + [unit(Q, seed) for seed in (4, 5)]
    rows.append(torch.tensor(temperature, dtype=torch.double))
    return [x.requires_grad_() if i in (0, 1, 6) else x for i, x in enumerate(rows)]


def slow_itc(
    image: Tensor,
    text: Tensor,
    m_image: Tensor,
    m_text: Tensor,
    q_image: Tensor,
    q_text: Tensor,
    t: Tensor,
    alpha: float,
) -> Tensor:
    """Pair by pair and key by key."""
    total = torch.zeros((), dtype=torch.double)
    for queries, slow, keys in (
        (image, m_image, [*m_text, *q_text]),
        (text, m_text, [*m_image, *q_image]),
    ):
        for i, query in enumerate(queries):
            weights = [float(torch.exp(slow[i] @ key / t.detach())) for key in keys]
            partition = sum(torch.exp(query @ key / t) for key in keys)
            for j, key in enumerate(keys):
                target = alpha * weights[j] / sum(weights) + (1 - alpha) * (i == j)
                total = total - target * torch.log(torch.exp(query @ key / t) / partition)
    return total / (2 * len(image))


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
@pytest.mark.parametrize(("B", "Q"), [(4, 5), (3, 0), (1, 4)])
def test_value_and_gradients_are_the_formula_s(alpha: float, B: int, Q: int) -> None:
    fast, slow = inputs(B, Q), inputs(B, Q)
    found, wanted = itc(*fast, alpha).loss, slow_itc(*slow, alpha)
    torch.testing.assert_close(found, wanted, atol=1e-12, rtol=1e-12)
    found.backward()
    wanted.backward()
    for i in (0, 1, 6):
        torch.testing.assert_close(fast[i].grad, slow[i].grad, atol=1e-11, rtol=1e-9)


def test_fp32_is_near_enough() -> None:
    exact = inputs()
    rough = [x.detach().float() for x in exact]
    torch.testing.assert_close(itc(*rough, 0.4).loss.double(), itc(*exact, 0.4).loss.detach(), atol=0, rtol=1e-5)


def test_no_gradient_goes_through_keys_or_targets() -> None:
    every = inputs()
    slow = [x.requires_grad_() for x in every[2:4]]
    itc(*every, 0.4).loss.backward()
    assert [x.grad for x in slow] == [None, None]


def test_its_similarities_are_of_the_batch_alone_online_query_by_momentum_key() -> None:
    image, text, m_image, m_text, *_ = every = inputs(B=3, Q=5)
    pairs = itc(*every, 0.4)
    torch.testing.assert_close(pairs.image_to_text_BN, (image @ m_text.T / 0.07).detach())
    torch.testing.assert_close(pairs.text_to_image_BN, (text @ m_image.T / 0.07).detach())
    assert not pairs.image_to_text_BN.requires_grad


@pytest.mark.parametrize("alpha", [0.0, 0.4])
def test_its_targets_are_over_the_batch_and_the_queue(alpha: float) -> None:
    _, _, m_image, m_text, q_image, q_text, _ = every = inputs(B=3, Q=5)
    pairs = itc(*every, alpha)
    for found, slow, keys in (
        (pairs.image_to_text_target_BK, m_image, torch.cat([m_text, q_text])),
        (pairs.text_to_image_target_BK, m_text, torch.cat([m_image, q_image])),
    ):
        wanted = alpha * (slow @ keys.T / 0.07).softmax(dim=1) + (1 - alpha) * torch.eye(3, 8)
        torch.testing.assert_close(found, wanted)
        assert not found.requires_grad


def test_autocast_does_not_blunt_the_cosines() -> None:
    every = [x.detach().float() for x in inputs(B=16, Q=32)]
    exact = itc(*every, 0.4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast: Itc = itc(*every, 0.4)
    assert torch.equal(cast.loss, exact.loss)
    assert torch.equal(cast.image_to_text_BN, exact.image_to_text_BN)


def test_alpha_grows_linearly_then_stays() -> None:
    # BLIP: to 0.4 over 2 of 20 epochs.
    assert [ramp(p, 0.4, 0.1) for p in (0.0, 0.025, 0.05, 0.1, 0.5, 1.0)] == pytest.approx([0, 0.1, 0.2, 0.4, 0.4, 0.4])
    assert ramp(0.0, 0.4, 0.0) == 0.4


def test_the_temperature_s_range_is_the_paper_code_s() -> None:
    assert TEMPERATURE_RANGE == (0.001, 0.5)


def test_of_the_same_image_every_column_is_asked_for_evenly_in_the_queue_too() -> None:
    image, text, m_image, m_text, q_image, q_text, t = every = inputs(B=4, Q=5)
    batch, queue = torch.tensor([7, 8, 7, 9]), torch.tensor([8, -100, 7, -100, 3])
    found = itc(*every, 0.0, (batch, queue)).loss
    total = torch.zeros((), dtype=torch.double)
    for queries, keys in ((image, [*m_text, *q_text]), (text, [*m_image, *q_image])):
        for i, query in enumerate(queries):
            logs = torch.stack([query @ key / t for key in keys]).log_softmax(0)
            own = [j for j, group in enumerate([*batch, *queue]) if group == batch[i]]
            assert len(own) == [3, 2, 3, 1][i]
            total = total - logs[own].mean()
    torch.testing.assert_close(found, total / 8)


def test_where_each_image_is_alone_both_targets_are_one() -> None:
    alone = torch.arange(4), torch.full((5,), -100)
    torch.testing.assert_close(itc(*inputs(), 0.4, alone).loss, itc(*inputs(), 0.4).loss)
