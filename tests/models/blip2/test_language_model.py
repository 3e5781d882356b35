from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from capfilt.errors import ModelError
from capfilt.models import Blip2
from capfilt.models.blip2 import transformers_config
from capfilt.models.blip2.language_model import (
    FORMATS,
    Format,
    LanguageCache,
    LanguageConfig,
    LanguageModel,
    check_language,
    load_language,
)
from capfilt.objectives.losses.lm import answered

MakeBlip2 = Callable[..., Blip2]
KINDS = ["opt", "t5"]


@pytest.fixture
def case() -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(3)
    ids = torch.randint(5, 290, (3, 7), generator=draw)
    mask = torch.ones_like(ids)
    mask[1, 5:] = mask[2, 6:] = 0
    return torch.randn(3, 4, 12, generator=draw), ids, mask


def slow(model: LanguageModel, image: Tensor, ids: list[int], prompt: int) -> Tensor:
    """One text, token by token, each time from the beginning: the logits of ids[prompt:] (OPT: of all)."""
    words = model.model.get_input_embeddings()
    told = []
    if model.config.kind == "opt":
        for t in range(len(ids)):
            before = torch.cat([image, words(torch.tensor(ids[:t], dtype=torch.long))])[None]
            told.append(model.model(inputs_embeds=before).logits[0, -1])
        return torch.stack(told)
    reads = torch.cat([image, words(torch.tensor([*ids[:prompt], 1]))])[None]  # </s> ends what the encoder reads
    for t in range(prompt, len(ids)):
        begun = torch.tensor([[0, *ids[prompt:t]]])
        told.append(model.model(inputs_embeds=reads, decoder_input_ids=begun).logits[0, -1])
    return torch.stack(told)


@pytest.mark.parametrize("prompt", [0, 1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_a_text_is_scored_token_by_token(small_blip2: MakeBlip2, case: tuple, kind: str, prompt: int) -> None:
    model, (image, ids, mask) = small_blip2(kind).language, case
    logits, labels = model.predict(image, ids, mask, prompt)
    if kind == "t5":
        assert torch.equal(labels, ids.masked_fill(mask == 0, -100)[:, prompt:])
    else:
        wanted = ids.masked_fill(mask == 0, -100)
        wanted[:, :prompt] = -100
        assert torch.equal(labels, wanted)
    for row, length in enumerate(mask.sum(dim=1).tolist()):
        one = slow(model, image[row], ids[row, :length].tolist(), prompt)
        torch.testing.assert_close(logits[row, : len(one)], one, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_steps_go_on_from_images_that_several_rows_share(small_blip2: MakeBlip2, case: tuple, kind: str) -> None:
    model, (image, ids, _) = small_blip2(kind).language, case
    ids = torch.cat([ids, ids.flip(1)]).view(2, 3, 7).transpose(0, 1).reshape(6, 7)
    texts = torch.cat([torch.zeros(6, 1, dtype=torch.long), ids[:, 1:]], dim=1)  # T5's answers begin with 0

    def after(row: int, count: int) -> Tensor:
        """The logits after the first `count` tokens of a row; what comes then is of no matter."""
        told = texts[row, :count].tolist() if kind == "opt" else texts[row, 1:count].tolist()
        return slow(model, image[row // 2], [*told, 9], 0)[-1]

    def same(found: Tensor, rows: list[int], count: int) -> None:
        torch.testing.assert_close(found, torch.stack([after(r, count) for r in rows]), atol=1e-4, rtol=1e-4)

    seen = model.read(image)
    cache = small_blip2(kind).cache(6, 9, seen)
    same(model.step(texts[:, :2], seen, cache), [*range(6)], 2)
    same(model.step(texts[:, 2:3], seen, cache), [*range(6)], 3)
    cache.keep(torch.tensor([True, True, False, False, True, True]))
    kept = torch.tensor([0, 1, 4, 5])
    seen = seen.select(torch.tensor([0, 2]))
    same(model.step(texts[kept, 3:4], seen, cache), kept.tolist(), 4)
    assert cache.start == 4


def test_t5_reads_a_prompt_before_it_writes(small_blip2: MakeBlip2, case: tuple) -> None:
    """Writing after a prompt is telling a text whose first tokens were the prompt."""
    model, (image, ids, _) = small_blip2("t5").language, case
    prompt = ids[0, :3].tolist()
    begun = torch.cat([torch.zeros(3, 1, dtype=torch.long), ids[:, 3:5]], dim=1)
    step = model.step(begun, model.read(image, prompt), LanguageCache())
    for row in range(3):
        told = slow(model, image[row], [*prompt, *ids[row, 3:5].tolist(), 9], 3)
        torch.testing.assert_close(step[row], told[-1], atol=1e-4, rtol=1e-4)
    other = model.step(begun, model.read(image), LanguageCache())
    assert (other - step).abs().max() > 1e-2


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_loaded_as_transformers_saved_it(small_blip2: MakeBlip2, tmp_path: Path, kind: str, tied: bool) -> None:
    settings = dict(small_blip2(kind).config.language.settings)
    if not tied and kind == "opt":
        settings["tie_word_embeddings"] = False
    config = LanguageConfig(kind=kind, settings=settings, tied=tied)
    made = LanguageModel(config, "fp32")
    made.model.save_pretrained(tmp_path)
    found = load_language(str(tmp_path), config, "fp32")
    assert found.tied() == made.tied()
    assert ("model.lm_head.weight" in found.tied()) == tied
    for name, tensor in made.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name
    assert not any(p.requires_grad for p in found.parameters())
    assert {p.dtype for p in load_language(str(tmp_path), config, "bf16").parameters()} == {torch.bfloat16}
    with pytest.raises(ModelError, match=f"set language.tied={str(tied).lower()}"):
        load_language(str(tmp_path), config.model_copy(update={"tied": not tied}), "fp32")


def test_transformers_gives_no_advice_on_an_untied_t5(small_blip2: MakeBlip2, tmp_path: Path) -> None:
    """It would advise to set a key that it ignores."""
    settings = {**small_blip2("t5").config.language.settings, "tie_word_embeddings": False}
    config = LanguageConfig(kind="t5", settings=settings, tied=False)
    LanguageModel(config, "fp32").model.save_pretrained(tmp_path)
    told, logger = list[str](), logging.getLogger("transformers.modeling_utils")
    noting = logging.Handler()
    noting.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(noting)
    try:
        load_language(str(tmp_path), config, "fp32")
        assert told == []
        type(LanguageModel(config, "fp32").model).from_pretrained(tmp_path)
        assert len(told) == 1, "the filter is for our loading alone"
    finally:
        logger.removeHandler(noting)


def test_logits_that_flan_t5_does_not_scale(small_blip2: MakeBlip2, tmp_path: Path) -> None:
    """transformers keeps `tie_word_embeddings: false` of a T5 as "logits are not scaled" alone."""
    settings = dict(small_blip2("t5").config.language.settings)
    unscaled = LanguageConfig(kind="t5", settings={**settings, "tie_word_embeddings": False})
    made = LanguageModel(unscaled, "fp32")
    made.model.save_pretrained(tmp_path)
    assert not load_language(str(tmp_path), unscaled, "fp32").model.config.scale_decoder_outputs
    with pytest.raises(ModelError, match=r"not scaled by its width: set language\.settings\.tie_word_embeddings=false"):
        load_language(str(tmp_path), LanguageConfig(kind="t5", settings=settings), "fp32")
    described = {"text_config": {"model_type": "t5", **settings, "tie_word_embeddings": False}}
    again = transformers_config.language_of(described, tied=True, source=tmp_path)
    assert not again.described().scale_decoder_outputs
    assert (
        transformers_config.language_of({"text_config": {"model_type": "t5", **settings}}, tied=True, source=tmp_path)
        .described()
        .scale_decoder_outputs
    )


@pytest.mark.parametrize(("kind", "held_in"), [("opt", "fp16"), ("opt", "bf16"), ("t5", "bf16"), ("t5", "fp32")])
@pytest.mark.parametrize("around", [torch.float32, torch.bfloat16])
def test_it_computes_in_its_own_format_whatever_the_model_around_it_does(
    small_blip2: MakeBlip2, case: tuple, kind: str, held_in: Format, around: torch.dtype
) -> None:
    exact, (image, ids, mask) = small_blip2(kind).language, case
    model = LanguageModel(exact.config, held_in)
    model.load_state_dict(exact.state_dict())
    image.requires_grad_()
    with torch.autocast("cpu", dtype=around, enabled=around != torch.float32):
        told, labels = model.predict(image.to(around), ids, mask, 2)
        keys = model.read(image.detach().to(around))
        begun = ids[:, :1] if kind == "opt" else torch.zeros(3, 1, dtype=torch.long)
        step = model.step(begun, keys, LanguageCache())
    answered(told, labels).backward()
    assert image.grad is not None
    assert image.grad.isfinite().all()
    assert told.dtype == step.dtype == FORMATS[held_in]
    for rough, whole in (
        (told, exact.predict(image, ids, mask, 2)[0]),
        (step, exact.step(begun, exact.read(image.detach()), LanguageCache())),
    ):
        alike = torch.cosine_similarity(rough.detach().float().flatten(), whole.detach().flatten(), dim=0)
        assert float(alike) > 0.999


def test_what_is_not_there_or_another_is_said(
    small_blip2: MakeBlip2, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    model = small_blip2("opt").language
    with pytest.raises(ModelError, match="names on the Hugging Face hub look like OWNER/NAME"):
        load_language("nowhere", model.config, "fp32")
    with pytest.raises(ModelError, match=r"not give it either .*Without a network: fetch its config.json, its weights"):
        load_language("capfilt/there-is-none", model.config, "fp32")
    with pytest.raises(ModelError, match="holds no language model that transformers can read"):
        load_language(str(tmp_path), model.config, "fp32")
    model.model.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"is a opt, and language\.kind is t5"):
        load_language(str(tmp_path), small_blip2("t5").language.config, "fp32")
    wider = model.config.model_copy(update={"settings": {**model.config.settings, "ffn_dim": 48}})
    (tmp_path / "model.safetensors").unlink()
    assert check_language(str(tmp_path), model.config) == tmp_path, "what describes it is enough to refuse it by"
    with pytest.raises(ModelError, match=r"has ffn_dim 24, and language.settings.ffn_dim is 48"):
        load_language(str(tmp_path), wider, "fp32")
    with pytest.raises(ModelError, match="describe no OPT of transformers"):
        LanguageConfig(kind="opt", settings={"hidden_size": "wide"}).described()
