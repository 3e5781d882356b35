"""What models for downstream tasks say, against the same computed one text and one answer at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from capfilt.data.text.language_tokenizer import tokenizer_of
from capfilt.inference.answers import answer, classify, rank
from capfilt.inference.local_model import LocalModel
from capfilt.models import FAMILIES, ArchitectureConfig, architecture_of, build

ANSWERS = ("red", "a blue ring", "a blue", "two", "t-shirt")
QUESTIONS, PICTURE = ["what is left of the ring", "is it red", "a green star"], [1, 0, 1]


def local(architecture: ArchitectureConfig) -> LocalModel:
    torch.manual_seed(3)
    return LocalModel(build(architecture).eval(), tokenizer_of("world", architecture.tokenizer_kind))


def head(family: str, **settings: Any) -> ArchitectureConfig:
    return FAMILIES[family].config.model_validate(settings)


ANSWERERS = (
    architecture_of("blip/tiny-answers"),
    head("answerer", base="albef/tiny"),
    head("answerer", base="xvlm/tiny"),
)


@pytest.mark.parametrize("architecture", ANSWERERS, ids=["blip", "albef", "xvlm"])
class TestAnswerers:
    def test_the_best_of_a_list_has_the_least_loss(self, architecture: ArchitectureConfig) -> None:
        player = local(architecture)
        pixels = torch.randn(2, 3, 32, 32)
        expected = []
        for question, picture in zip(QUESTIONS, PICTURE, strict=True):
            ids, mask = (torch.from_numpy(x) for x in player.tokenizer.encode([player.tokenizer.clean(question)], 30))
            tokens = player.model.encode_image(pixels[picture : picture + 1])
            context = player.model.question_context(tokens, ids, mask)
            losses = []
            for one in ANSWERS:
                written = torch.from_numpy(player.tokenizer.encode_answers([one], 30)[0])
                logits = player.model.decode(written, torch.ones_like(written), context)[0, :-1]
                smoothing = architecture.rank_smoothing
                loss = F.cross_entropy(logits, written[0, 1:], reduction="sum", label_smoothing=smoothing)
                if architecture.family == "answerer":  # the released codes of ALBEF and X-VLM: P(first) twice
                    loss = loss - logits[0].log_softmax(dim=0)[written[0, 1]]
                losses.append(loss)
            expected.append(ANSWERS[int(torch.stack(losses).argmin())])
        assert answer(player, pixels, QUESTIONS, PICTURE, ANSWERS) == expected
        assert answer(LocalModel(player.model, player.tokenizer), pixels, QUESTIONS, PICTURE, ANSWERS, 5) == expected

    def test_an_answer_that_is_written_does_not_depend_on_others(self, architecture: ArchitectureConfig) -> None:
        player, pixels = local(architecture), torch.randn(2, 3, 32, 32)
        together = answer(player, pixels, QUESTIONS, PICTURE)
        alone = [
            answer(player, pixels[n : n + 1], [question], [0])[0]
            for question, n in zip(QUESTIONS, PICTURE, strict=True)
        ]
        assert together == alone


def test_only_the_likeliest_first_tokens_are_ranked() -> None:
    player = local(ANSWERERS[0])
    ids, mask = (torch.from_numpy(x) for x in player.tokenizer.encode(QUESTIONS, 30))
    context = player.model.question_context(player.model.encode_image(torch.randn(3, 3, 32, 32)), ids, mask)
    written = torch.from_numpy(player.tokenizer.encode_answers(ANSWERS, 30)[0])
    start = written[:3, :1]
    first = player.model.decode(start, torch.ones_like(start), context)[:, 0, written[:, 1]].argmax(dim=1)
    assert written[rank(player, context, ANSWERS, 1), 1].tolist() == written[first, 1].tolist()


@pytest.mark.parametrize("base", ["blip/tiny", "albef/tiny", "vilt/tiny", "vlmo/tiny"])
@pytest.mark.parametrize("images", [1, 2])
def test_a_class_does_not_depend_on_other_texts(base: str, images: int) -> None:
    player = local(head("classifier", base=base, labels=["false", "true"], images=images))
    pixels = torch.randn(2 * images, 3, 32, 32)
    together = classify(player, pixels, QUESTIONS, PICTURE)
    torch.testing.assert_close(together.sum(dim=1), torch.ones(3))
    for row, (question, n) in enumerate(zip(QUESTIONS, PICTURE, strict=True)):
        alone = classify(player, pixels[n::2], [question], [0])
        torch.testing.assert_close(together[row], alone[0])
    if images == 2:
        swapped = torch.cat([pixels[2:], pixels[:2]])
        assert not torch.allclose(classify(player, swapped, QUESTIONS, PICTURE), together)
