from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from capfilt.data.sample import Sample
from capfilt.data.text.tokenizer import Tokenizer
from capfilt.inference.batches import Images
from capfilt.inference.captioners.local import LocalCaptioner
from capfilt.inference.config import DecodeConfig
from capfilt.inference.interface import Caption
from capfilt.inference.local_model import LocalModel
from capfilt.inference.roles import NEEDS
from capfilt.models import Blip, BlipConfig
from capfilt.models.layers.config import TextConfig, VisionConfig
from capfilt.models.layers.packed_linear import multiplies_bf16

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


@pytest.mark.parametrize("method", ["nucleus", "greedy", "beam"])
def test_after_its_web_text_an_image_has_the_text_of_that_prompt(
    model: Blip, tokenizer: Tokenizer, images: Tensor, method: Literal["nucleus", "greedy", "beam"]
) -> None:
    """Of each image as if its web text were the prompt of all; with one too long, none, and lengths in turn."""
    local, words = LocalModel(model, tokenizer), [tokenizer.vocab[i] for i in (50, 51, 52, 53)]
    webs = ["", words[0], " ".join(words[1:3]), " ".join(words), " ".join(words[:2])]
    samples = [Sample(uid, b"", "jpg", web, {"uid": uid}) for uid, web in zip(UIDS, webs, strict=False)]
    settings = {"method": method, "repetition_penalty": 1.3, "prompt": words[3]}
    config = DecodeConfig(**settings, min_length=7, max_length=12)
    captioner = LocalCaptioner(local, config, captions=2, seed=3, web_prefix=3)
    batch = Images({})
    batch.once(captioner.context_name, lambda: captioner.image_context(images[:5]))
    captions = captioner.caption(batch, samples)
    assert [of_image[0].prompt for of_image in captions] == ["ignore", *["prefix"] * 4]
    for i, web in enumerate(webs):
        first = web.split()[:3]
        longer = {"min_length": 7 + len(first), "max_length": 12 + len(first)}
        alone = DecodeConfig(**{**settings, "prompt": " ".join([*first, words[3]])}, **longer)
        (wanted,) = LocalCaptioner(local, alone, captions=2, seed=3).write(images[i : i + 1], [UIDS[i]])
        assert [caption.text for caption in captions[i]] == wanted
    off = LocalCaptioner(local, config, captions=2, seed=3)
    other = Images({})
    other.once(off.context_name, lambda: off.image_context(images[:5]))
    assert off.caption(other, samples) == [[Caption(text) for text in row] for row in off.write(images[:5], UIDS[:5])]


@pytest.mark.parametrize("method", ["nucleus", "beam"])
@torch.inference_mode()
def test_beside_tokens_it_writes_what_it_writes_beside_keys_and_values_and_the_same_in_any_batch(
    tokenizer: Tokenizer, method: Literal["nucleus", "beam"]
) -> None:
    """A captioner that shares nothing with its filter projects no keys (`Attention.tokens_instead`)."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {"width": 256, "depth": 2, "heads": 2, "hidden": 32, "init_std": 0.1}
    text = TextConfig(vocab_size=len(tokenizer), max_positions=64, dropout=0.0, **shape)
    config = BlipConfig(vision=VisionConfig(image_size=16, patch_size=8, **shape), text=text, projection=8)
    local = LocalModel(Blip(config).eval(), tokenizer)
    captioner = LocalCaptioner(local, DecodeConfig(method=method, min_length=5, max_length=12), seed=3)
    tokens = torch.randn(len(UIDS), 5, 256)
    context = captioner.image_context(tokens)
    assert {id(tensor) for tensor in context.tensors} == {id(tokens)}
    if multiplies_bf16():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert len({id(tensor) for tensor in captioner.image_context(tokens).tensors}) == 1, "cast once"
    written = captioner.write(tokens, UIDS)
    assert len({text for (text,) in written}) > 1
    for some in ([3], [5, 0, 2], [1, 2, 3, 4, 6]):
        assert captioner.write(tokens[some], [UIDS[i] for i in some]) == [written[i] for i in some]
    captioner.shares_context = True
    assert captioner.image_context(tokens).tensors[0].ndim == 4
    assert captioner.write(tokens, UIDS) == written
