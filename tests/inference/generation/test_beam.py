"""Beam search against a search of everything. (Against transformers: tests/models/blip/test_parity.py.)"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from capfilt.data.text.tokenizer import Tokenizer
from capfilt.inference.captioners.local import LocalCaptioner
from capfilt.inference.config import DecodeConfig
from capfilt.inference.generation import beam
from capfilt.inference.generation.beam import beam_search
from capfilt.inference.generation.decode import generate
from capfilt.inference.local_model import LocalModel
from capfilt.models import Blip
from capfilt.models.layers.image_context import ImageContext

MakeBlip = Callable[..., Blip]
VOCAB, END = 7, 3
PROMPT = [VOCAB - 2, 4]


@pytest.fixture(scope="module")
def model(small_blip: MakeBlip) -> Blip:
    """A captioner of seven words."""
    return small_blip(vocab_size=VOCAB, roles=("decoder",))


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    return torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2


@torch.no_grad()
def keys(model: Blip, pixels: Tensor) -> ImageContext:
    return model.image_context(model.encode_image(pixels), "decoder")


def config(**options: object) -> DecodeConfig:
    return DecodeConfig.model_validate({"method": "beam", "min_length": 3, "max_length": 6, **options})


def every_text(config: DecodeConfig) -> Iterator[tuple[list[int], bool]]:
    """Every text the search may give, and whether it ends by itself."""
    longest = config.max_length - len(PROMPT)
    open_ = [list[int]()]
    while open_:
        text = open_.pop()
        for token in range(VOCAB):
            if token != END and len(text) + 1 < longest:
                open_.append([*text, token])
            elif token != END:
                yield [*text, token], False
            elif len(PROMPT) + len(text) >= config.min_length:
                yield text, True


@torch.no_grad()
def best_texts(model: Blip, image: ImageContext, config: DecodeConfig, texts: int) -> list[list[int]]:
    """The best of all texts for one image, each scored as a whole, without a cache."""
    every = list(every_text(config))
    rows = [[*PROMPT, *text, *([END] if ends else [])] for text, ends in every]
    ids, mask = torch.zeros(2, len(rows), config.max_length, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), 1
    steps = model.decode(ids, mask, image).log_softmax(dim=-1)[:, :-1].gather(2, ids[:, 1:, None])[:, :, 0]
    sums = (steps * mask[:, 1:])[:, len(PROMPT) - 1 :].sum(dim=1)
    scores = sums / (mask.sum(dim=1) - len(PROMPT)) ** config.length_penalty
    return [every[i][0] for i in scores.topk(texts).indices.tolist()]


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0])
def test_with_a_beam_for_every_text_it_finds_the_best(model: Blip, pixels: Tensor, length_penalty: float) -> None:
    # As wide as there are texts one step from the end: nothing can fall out.
    settings = config(beams=VOCAB**3, length_penalty=length_penalty)
    got = beam_search(model, keys(model, pixels[:3]), PROMPT, END, settings, texts=3)
    wanted = [text for i in range(3) for text in best_texts(model, keys(model, pixels[i : i + 1]), settings, 3)]
    assert got == wanted
    assert len(set(map(len, got))) > 1 or length_penalty != 1.0


def test_one_beam_is_greedy(model: Blip, pixels: Tensor) -> None:
    settings = config(beams=1, max_length=12)
    image = keys(model, pixels)
    greedy = generate(model, image, PROMPT, END, config(method="greedy", max_length=12), torch.zeros(8, 10))
    assert beam_search(model, image, PROMPT, END, settings) == greedy


@pytest.mark.parametrize("settings", [config(max_length=12), config(beams=5, repetition_penalty=1.5, max_length=12)])
def test_a_text_does_not_depend_on_its_neighbours(model: Blip, pixels: Tensor, settings: DecodeConfig) -> None:
    together = beam_search(model, keys(model, pixels), PROMPT, END, settings, texts=2)
    alone = [
        text
        for i in range(len(pixels))
        for text in beam_search(model, keys(model, pixels[i : i + 1]), PROMPT, END, settings, texts=2)
    ]
    assert together == alone
    assert len(together) == 16
    assert len(set(map(tuple, together))) > 2


@pytest.mark.parametrize("every", [1, 4])
def test_images_whose_texts_are_found_leave(
    model: Blip, pixels: Tensor, monkeypatch: pytest.MonkeyPatch, every: int
) -> None:
    settings = config(beams=4, max_length=16)
    fed: list[int] = []
    step = Blip.decode_step

    def noted(self: Blip, ids_BT: Tensor, *rest: object) -> Tensor:
        fed.append(len(ids_BT))
        return step(self, ids_BT, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Blip, "decode_step", noted)
    monkeypatch.setattr(beam, "is_poll_step", lambda _device, step: step % every == every - 1)
    leaving = beam_search(model, keys(model, pixels), PROMPT, END, settings, texts=3)
    assert fed[0] == 32
    assert fed[-1] < 24, "no image has left"
    monkeypatch.setattr(beam, "is_poll_step", lambda _device, _step: False)
    assert beam_search(model, keys(model, pixels), PROMPT, END, settings, texts=3) == leaving


def test_lengths_count_the_prompt(model: Blip, pixels: Tensor) -> None:
    texts = beam_search(model, keys(model, pixels), PROMPT, END, config(min_length=6, max_length=9, beams=4), texts=4)
    assert {len(text) for text in texts} <= {4, 5, 6, 7}
    assert all(END not in text for text in texts)


def test_a_penalty_on_repetition_counts_the_prompt(model: Blip, pixels: Tensor) -> None:
    """As transformers counts: a word of the prompt is as old as any."""
    free = beam_search(model, keys(model, pixels), PROMPT, END, config(max_length=10))
    strict = beam_search(model, keys(model, pixels), PROMPT, END, config(max_length=10, repetition_penalty=1e6))
    assert any(len(set(text)) < len(text) or PROMPT[1] in text for text in free)
    for text in strict:
        assert len(set(text[:4])) == len(text[:4])  # five words are left, and the end
        assert PROMPT[1] not in text[:4]


def test_a_captioner_gives_the_best_of_its_beams(small_blip: MakeBlip, pixels: Tensor) -> None:
    model, tokenizer = small_blip(roles=("decoder",)), Tokenizer.load("world")
    with torch.no_grad():
        tokens = model.encode_image(pixels)
    settings = DecodeConfig(method="beam", beams=4, max_length=10, prompt="a picture of ")
    local = LocalModel(model, tokenizer)
    three = LocalCaptioner(local, settings, captions=3).write(tokens, list("abcdefgh"))
    one = LocalCaptioner(local, settings, seed=9, round_=2).write(tokens, list("ABCDEFGH"))
    assert [own[:1] for own in three] == one
    assert all(len(own) == 3 for own in three)
    assert not any("picture" in text for text in one[0])
