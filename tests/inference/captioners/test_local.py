from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from capfilt.data.text.tokenizer import Tokenizer
from capfilt.inference.captioners.local import LocalCaptioner
from capfilt.inference.config import DecodeConfig
from capfilt.inference.local_model import LocalModel
from capfilt.inference.roles import NEEDS
from capfilt.models import Blip

MakeBlip = Callable[..., Blip]
SEP = 3
UIDS = tuple(f"{i:032x}" for i in range(20))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load("world")


@pytest.fixture(scope="module")
def model(small_blip: MakeBlip) -> Blip:
    model = small_blip(roles=("decoder",))
    with torch.no_grad():
        model.text.head.bias[SEP] += 4
    return model


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(20, 5, 24, generator=torch.Generator().manual_seed(4))


def test_a_caption_is_the_image_s_own_whatever_is_beside_it(model: Blip, tokenizer: Tokenizer, images: Tensor) -> None:
    local = LocalModel(model, tokenizer)
    captioner = LocalCaptioner(local, DecodeConfig(min_length=3, max_length=16), captions=2, seed=1, round_=2)
    together = dict(zip(UIDS, captioner.write(images, UIDS), strict=True))
    assert len({text for row in together.values() for text in row}) > 30
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0)).tolist()
    for size in (1, 3, 7):
        for start in range(0, 20, size):
            some = order[start : start + size]
            uids = [UIDS[i] for i in some]
            assert captioner.write(images[some], uids) == [together[uid] for uid in uids]


def test_more_candidates_do_not_change_the_first_ones(model: Blip, tokenizer: Tokenizer, images: Tensor) -> None:
    config = DecodeConfig(min_length=3, max_length=16)
    local = LocalModel(model, tokenizer)
    one = LocalCaptioner(local, config, captions=1).write(images, UIDS)
    three = LocalCaptioner(local, config, captions=3).write(images, UIDS)
    assert [texts[:1] for texts in three] == one
    assert all(len(texts) == 3 for texts in three)


def test_many_texts_are_written_some_at_a_time(
    model: Blip, tokenizer: Tokenizer, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    captioner = LocalCaptioner(LocalModel(model, tokenizer), DecodeConfig(min_length=3, max_length=16), captions=3)
    together = captioner.write(images, UIDS)
    for most in (1, 7, 59):
        monkeypatch.setattr("capfilt.inference.captioners.local.MAX_ROWS", most)
        assert captioner.write(images, UIDS) == together


@pytest.mark.parametrize(("seed", "round_"), [(1, 0), (0, 1)])
def test_another_seed_or_round_writes_otherwise(
    model: Blip, tokenizer: Tokenizer, images: Tensor, seed: int, round_: int
) -> None:
    local, config = LocalModel(model, tokenizer), DecodeConfig(min_length=3, max_length=16)
    base = LocalCaptioner(local, config).write(images, UIDS)
    other = LocalCaptioner(local, config, seed=seed, round_=round_).write(images, UIDS)
    assert sum(a != b for a, b in zip(base, other, strict=True)) > 15


def test_the_prompt_steers_and_is_not_part_of_the_answer(model: Blip, tokenizer: Tokenizer, images: Tensor) -> None:
    prompt = " ".join(tokenizer.vocab[i] for i in (50, 51))
    config = DecodeConfig(method="greedy", min_length=9, max_length=10, prompt=prompt)
    with_prompt = LocalCaptioner(LocalModel(model, tokenizer), config)
    assert with_prompt.prompt == [model.config.text.dec, 50, 51]
    ids = torch.tensor([[0, 50, 51]]).expand(20, -1)
    first = model.decode(ids, None, model.image_context(images, "decoder"))[:, -1]
    first[:, SEP] = -torch.inf
    wanted = [tokenizer.vocab[i] for i in first.argmax(dim=1).tolist()]
    texts = with_prompt.write(images, UIDS)
    for (text,), word in zip(texts, wanted, strict=True):
        begun = tokenizer.decode([tokenizer.vocab.index(word)])
        assert text.startswith(begun)


def test_no_prompt_is_dec_alone(model: Blip, tokenizer: Tokenizer) -> None:
    assert LocalCaptioner(LocalModel(model, tokenizer), DecodeConfig()).prompt == [model.config.text.dec]


def test_lengths_are_within_the_limits(model: Blip, tokenizer: Tokenizer, images: Tensor) -> None:
    class Counting(Tokenizer):
        lengths: list[int] = []

        def decode(self, ids: list[int]) -> str:  # type: ignore[override]
            self.lengths.append(len(ids))
            return super().decode(ids)

    counting = Counting(tokenizer.vocab)
    config = DecodeConfig(min_length=7, max_length=12)
    LocalCaptioner(LocalModel(model, counting), config, captions=4).write(images, UIDS)
    assert (min(counting.lengths), max(counting.lengths)) == (6, 11)  # [DEC] is counted


def test_it_asks_for_the_decoder(small_blip: MakeBlip) -> None:
    assert small_blip(roles=("decoder",)).capabilities >= NEEDS["captioner"]
    assert not small_blip(roles=("encoder",)).capabilities >= NEEDS["captioner"]
