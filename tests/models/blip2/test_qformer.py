from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from capfilt.errors import ModelError
from capfilt.models import Blip2
from capfilt.models.blip2.config import QFormerConfig
from capfilt.models.blip2.qformer import QFormer
from capfilt.models.layers.bert import Cache

MakeBlip2 = Callable[..., Blip2]
T, Q = 6, 3


@pytest.fixture
def qformer(small_blip2: MakeBlip2) -> QFormer:
    return small_blip2().double().text


@pytest.fixture
def case() -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(3)
    ids = torch.randint(4, 190, (2, T), generator=draw)
    ids[1, 4:] = 0
    return ids, (ids != 0).long(), torch.randn(2, 5, 24, dtype=torch.double, generator=draw)


def slow(qformer: QFormer, ids: Tensor, tokens: Tensor, visible: Tensor) -> Tensor:
    """One row: queries and words as one sequence, `visible` [Q + T, Q + T] says who sees whom."""
    words = qformer.words(ids) + qformer.positions.weight[: len(ids)]
    x = qformer.norm(torch.cat([qformer.query_tokens[0], words]))[None]
    for n, layer in enumerate(qformer.layers):
        x = layer.self_attention(x, layer.self_keys_values(x), visible[None, None])
        queries, words = x[:, :Q], x[:, Q:]
        if n % 2 == 0:
            queries = layer.cross_attention(queries, layer.cross_attention.block.keys_values(tokens[None]))
        queries = layer.query_feed_forward(queries)
        x = torch.cat([queries, layer.feed_forward(words)], dim=1)
    return x[0]


class TestWhoSeesWhom:
    """Against one sequence with a mask, row by row, without padding."""

    def visible(self, length: int, kind: str) -> Tensor:
        seen = torch.ones(Q + length, Q + length, dtype=torch.bool)
        if kind == "apart":
            seen[:Q, Q:] = seen[Q:, :Q] = False
        if kind == "written":  # a word sees queries and what came before; queries do not see words
            seen[:Q, Q:] = False
            seen[Q:, Q:] = torch.ones(length, length).tril().bool()
        return seen

    def rows(self, qformer: QFormer, case: tuple[Tensor, ...], kind: str) -> list[Tensor]:
        ids, mask, tokens = case
        lengths = mask.sum(dim=1).tolist()
        return [slow(qformer, ids[i, :n], tokens[i], self.visible(n, kind)) for i, n in enumerate(lengths)]

    def test_queries_and_texts_apart(self, qformer: QFormer, case: tuple[Tensor, ...]) -> None:
        ids, mask, tokens = case
        states, _ = qformer.run_queries(qformer.image_context(tokens))
        read = qformer.read(ids, mask)
        for i, wanted in enumerate(self.rows(qformer, case, "apart")):
            torch.testing.assert_close(states[i], wanted[:Q])
            torch.testing.assert_close(read[i, : len(wanted) - Q], wanted[Q:])

    def test_together(self, qformer: QFormer, case: tuple[Tensor, ...]) -> None:
        ids, mask, tokens = case
        found = qformer.encode_multimodal(ids, mask, qformer.image_context(tokens))
        for i, wanted in enumerate(self.rows(qformer, case, "together")):
            torch.testing.assert_close(found[i], wanted[:Q])

    def test_written_after_the_queries(self, qformer: QFormer, case: tuple[Tensor, ...]) -> None:
        ids, mask, tokens = case
        states, seen = qformer.run_queries(qformer.image_context(tokens))
        found = qformer.write(ids, mask, seen)
        for i, wanted in enumerate(self.rows(qformer, case, "written")):
            torch.testing.assert_close(states[i], wanted[:Q])
            torch.testing.assert_close(found[i, : len(wanted) - Q], wanted[Q:])

    def test_gradient_of_what_is_written_reaches_the_queries(self, qformer: QFormer, case: tuple[Tensor, ...]) -> None:
        ids, mask, tokens = case
        _, seen = qformer.run_queries(qformer.image_context(tokens))
        qformer.write(ids, mask, seen).square().sum().backward()
        assert qformer.query_tokens.grad.any()
        assert qformer.layers[0].cross_attention.block.value.weight.grad.any()


def test_only_every_second_layer_attends_to_the_image(qformer: QFormer, case: tuple[Tensor, ...]) -> None:
    assert [layer.cross_attention is not None for layer in qformer.layers] == [True, False, True]
    assert len(qformer.image_context(case[2]).layers) == 2


def test_texts_that_share_an_image_are_as_with_one_each(qformer: QFormer, case: tuple[Tensor, ...]) -> None:
    ids, mask, tokens = case
    four, both = ids.repeat_interleave(2, dim=0).roll(1, dims=1), mask.repeat_interleave(2, dim=0).roll(1, dims=1)
    both[:, 0] = 1
    shared, own = qformer.image_context(tokens), qformer.image_context(tokens.repeat_interleave(2, dim=0))
    torch.testing.assert_close(
        qformer.encode_multimodal(four, both, shared), qformer.encode_multimodal(four, both, own)
    )
    torch.testing.assert_close(
        qformer.write(four, both, qformer.run_queries(shared)[1]),
        qformer.write(four, both, qformer.run_queries(own)[1]),
    )


def test_step_by_step_is_as_at_once(qformer: QFormer, case: tuple[Tensor, ...]) -> None:
    ids, _, tokens = case
    _, seen = qformer.run_queries(qformer.image_context(tokens))
    whole = qformer.write(ids, None, seen)
    cache = Cache(qformer.config, 2, T, seen.tensors[0])
    parts = [qformer.write(ids[:, a:b], None, seen, cache) for a, b in ((0, 2), (2, 3), (3, T))]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole)


def test_a_text_beyond_the_positions_is_refused(qformer: QFormer) -> None:
    with pytest.raises(ModelError, match="a text of 65 tokens, and the model has 64 positions"):
        qformer.read(torch.ones(1, 65, dtype=torch.long), torch.ones(1, 65))


def test_a_stack_without_texts_has_no_part_for_them(small_blip2: MakeBlip2) -> None:
    names = {name for name, _ in small_blip2("opt").text.named_parameters()}
    both = {name for name, _ in small_blip2().text.named_parameters()}
    gone = both - names
    assert names < both
    assert {name.partition(".")[0] for name in gone} == {"words", "positions", "head", "layers"}
    assert all(".feed_forward." in name for name in gone if name.startswith("layers"))


def test_dec_is_the_last_entry() -> None:
    config = QFormerConfig(vocab_size=30523, width=4, depth=1, heads=2, hidden=4)
    assert config.dec == 30522
    assert config.queries == 32
    with pytest.raises(ValidationError, match="not a multiple of heads"):
        QFormerConfig(vocab_size=9, width=5, depth=1, heads=2, hidden=4)
    with pytest.raises(ValidationError):
        QFormerConfig(vocab_size=9, width=4, depth=1, heads=2, hidden=4, tie_lm_head=False)
