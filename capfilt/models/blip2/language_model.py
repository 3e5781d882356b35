"""The frozen language model of BLIP-2's second stage: OPT or T5 of transformers, and how it is run.

It is never trained: its weights take no gradient and it stays in eval mode, whatever the model around it does. It is
held in a low precision and computes in it. Images reach it as vectors of its width that stand before the text (OPT)
or before the prompt that its encoder reads (T5).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from capfilt.errors import ModelError
from capfilt.models.blip2 import transformers_config
from capfilt.models.blip2.config import CLASSES, Format, LanguageConfig
from capfilt.models.checkpoints import files, transformers_folder
from capfilt.models.checkpoints.fill import without_weights
from capfilt.models.layers.image_context import ImageContext
from capfilt.storage.documents import read_model_object

FORMATS: dict[Format, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

NO_LABEL = -100
"""The label of a position that counts for nothing."""


class LanguageCache:
    """What a language model has read so far, for each row; made by its first step."""

    def __init__(self) -> None:
        self.past: Any = None
        self.start = 0

    def keep(self, rows: Tensor) -> None:
        """Keep only these rows (indices or a boolean mask), in this order."""
        index = rows.nonzero().squeeze(1) if rows.dtype == torch.bool else rows
        if self.past is not None:
            self.past.batch_select_indices(index)


class LanguageModel(nn.Module):
    """A language model that is run and never trained."""

    def __init__(self, config: LanguageConfig, held_in: Format):
        super().__init__()
        import transformers  # here, not above: stage 1 and BLIP have no use for it, and it takes seconds

        self.config = config
        self.dtype = FORMATS[held_in]
        self.model: Any = getattr(transformers, CLASSES[config.kind][1])(config.described())
        if not config.tied:  # transformers ties it whatever its configuration says
            self.model.lm_head.weight = nn.Parameter(torch.empty_like(self.model.lm_head.weight))
            nn.init.normal_(self.model.lm_head.weight, std=0.02)
        self.model.to(self.dtype)
        self.requires_grad_(False)
        self.train(False)

    def tie(self) -> None:
        """Let tensors of two names be one again, after they were made anew."""
        output = self.model.lm_head.weight
        self.model.tie_weights()
        if not self.config.tied:
            self.model.lm_head.weight = output

    def train(self, mode: bool = True) -> LanguageModel:
        """Stay in eval mode."""
        super().train(False)
        return self

    def tied(self) -> dict[str, str]:
        """Second names of its tensors -> the first: the output matrix is often the word embeddings."""
        first: dict[int, str] = {}
        named = [*self.named_parameters(remove_duplicate=False), *self.named_buffers(remove_duplicate=False)]
        return {name: first[id(p)] for name, p in named if first.setdefault(id(p), name) != name}

    def predict(self, image_BQW: Tensor, ids_BT: Tensor, mask_BT: Tensor, prompt: int) -> tuple[Tensor, Tensor]:
        """Texts after images -> logits [B, T, V] and the tokens that they should predict [B, T], `NO_LABEL` for none.

        The logits at t are for token t itself, of which the model has read the image and the tokens before. The first
        `prompt` tokens are given, without a label; T5's encoder reads them, and the answer begins after them.
        Padding has no label. Without a prompt OPT's first token has one too, as in the public code.
        """
        with self._held_format(image_BQW):
            return self._predict(image_BQW, ids_BT, mask_BT, prompt)

    def _predict(self, image_BQW: Tensor, ids_BT: Tensor, mask_BT: Tensor, prompt: int) -> tuple[Tensor, Tensor]:
        labels = ids_BT.masked_fill(mask_BT == 0, NO_LABEL)
        if self.config.kind == "t5":
            reads = self._encoder_input(image_BQW, ids_BT[:, :prompt])
            answer = ids_BT[:, prompt:]
            begin = torch.full_like(answer[:, :1], self.model.config.decoder_start_token_id)
            out = self.model(inputs_embeds=reads, decoder_input_ids=torch.cat([begin, answer[:, :-1]], dim=1))
            return out.logits, labels[:, prompt:]
        reads, first = self._after_image(image_BQW, ids_BT[:, :-1]), image_BQW.shape[1] - 1
        # Padding is on the right: no word attends to it, and what comes of it has no label.
        states = self.model.model(inputs_embeds=reads).last_hidden_state[:, first:]
        return self.model.lm_head(states), labels.index_fill(1, torch.arange(prompt, device=labels.device), NO_LABEL)

    def read(self, image_BQW: Tensor, prompt: Sequence[int] = ()) -> ImageContext:
        """Images -> what `step` goes on from, one row for each: the keys of OPT's layers, or what T5's encoder says of
        them and of a prompt. OPT has its prompt from `step`."""
        with self._held_format(image_BQW):
            return self._read(image_BQW, prompt)

    def _read(self, image_BQW: Tensor, prompt: Sequence[int]) -> ImageContext:
        if self.config.kind == "t5":
            ids = torch.tensor(prompt, dtype=torch.long, device=image_BQW.device).expand(image_BQW.shape[0], -1)
            states = self.model.get_encoder()(inputs_embeds=self._encoder_input(image_BQW, ids)).last_hidden_state
            return ImageContext((states,))
        assert not prompt, "OPT's prompt is the beginning of what it writes"
        out = self.model.model(inputs_embeds=image_BQW.to(self.dtype), use_cache=True)
        return ImageContext.of_layers((layer.keys, layer.values) for layer in out.past_key_values.layers)

    def step(self, ids_BT: Tensor, image: ImageContext, cache: LanguageCache) -> Tensor:
        """Feed the newest tokens [B, T] and return the logits after the last of them [B, V]."""
        with self._held_format(ids_BT):
            return self._step(ids_BT, image, cache)

    def _step(self, ids_BT: Tensor, image: ImageContext, cache: LanguageCache) -> Tensor:
        from transformers.cache_utils import DynamicCache, EncoderDecoderCache

        times = ids_BT.shape[0] // image.rows
        if cache.past is None:
            cache.past = DynamicCache(config=self.model.config)
            if self.config.kind == "t5":
                cache.past = EncoderDecoderCache(cache.past, DynamicCache(config=self.model.config))
            else:
                for layer, pair in enumerate(image.layers):
                    cache.past.update(*(x.repeat_interleave(times, dim=0) for x in pair), layer)
        cache.start += ids_BT.shape[1]
        if self.config.kind == "t5":
            (states,) = image.repeat_interleave(times).tensors
            out = self.model(
                decoder_input_ids=ids_BT, encoder_outputs=(states,), past_key_values=cache.past, use_cache=True
            )
            return torch.as_tensor(out.logits[:, -1])
        states = self.model.model(input_ids=ids_BT, past_key_values=cache.past, use_cache=True).last_hidden_state
        return torch.as_tensor(self.model.lm_head(states[:, -1]))

    def _held_format(self, like: Tensor) -> AbstractContextManager[object]:
        """Products in the format that the model is held in, whatever the model around it computes in."""
        return torch.autocast(like.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)

    def _encoder_input(self, image_BQW: Tensor, prompt_BT: Tensor) -> Tensor:
        """What T5's encoder reads: the image, the prompt, and the end that its tokenizer sets, also of no prompt."""
        end = prompt_BT.new_full((len(prompt_BT), 1), self.model.config.eos_token_id)
        return self._after_image(image_BQW, torch.cat([prompt_BT, end], dim=1))

    def _after_image(self, image_BQW: Tensor, ids_BT: Tensor) -> Tensor:
        words = self.model.get_input_embeddings()(ids_BT)
        return torch.cat([image_BQW.to(words.dtype), words], dim=1)


def described_at(source: str) -> LanguageConfig:
    """The language model in a folder of transformers or under a name on the hub, by its `config.json` alone; ModelError
    where there is none of a kind that is known."""
    path = files.fetched(source)
    folder = path if path.is_dir() else files.download(source, weights=False)
    try:
        described = read_model_object(folder / transformers_folder.CONFIG)
    except (OSError, ValueError) as error:
        raise _none_there(source, error) from None
    tied = bool(described.get("tie_word_embeddings", True)) and bool(described.get("scale_decoder_outputs", True))
    return transformers_config.language_of({"text_config": described}, tied, folder)


def check_language(source: str, config: LanguageConfig, weights: bool = False) -> Path:
    """The folder of a language model, fetched if it is on the hub, with its `weights` or without; its settings must be
    those of `config`.

    Raises:
        ModelError: nothing there, or a model of another kind or shape.
    """
    import transformers

    path = files.fetched(source)
    if not path.is_dir():
        path = files.download(source, weights)
    try:
        described = transformers.AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise _none_there(source, error) from None
    if described.model_type != config.kind:
        raise ModelError(f"{source} is a {described.model_type}, and language.kind is {config.kind}")
    wanted = config.described().to_dict()
    if described.model_type == "t5" and described.scale_decoder_outputs != wanted["scale_decoder_outputs"]:
        raise ModelError(
            f"{source} has logits that are {'' if described.scale_decoder_outputs else 'not '}scaled by its width: set "
            f"language.settings.tie_word_embeddings={str(described.scale_decoder_outputs).lower()}"
        )
    for name in config.settings:
        if name in described.to_dict() and getattr(described, name) != wanted[name] and name != "dense_act_fn":
            raise ModelError(
                f"{source} has {name} {getattr(described, name)}, and language.settings.{name} is {wanted[name]}"
            )
    return path


@contextmanager
def without_advice_on_tying() -> Iterator[None]:
    """Keep transformers from advising to set `tie_word_embeddings` of a model whose output matrix is not its words: of
    a T5 it ignores that key, and what is tied here is compared with `language.tied`."""

    def kept(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("The tied weights mapping and config for this model")

    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(kept)
    try:
        yield
    finally:
        logger.removeFilter(kept)


def _none_there(source: str, error: Exception) -> ModelError:
    why = " ".join(str(error).split())[:200]
    return ModelError(f"{source} holds no language model that transformers can read: {why}")


def load_language(source: str, config: LanguageConfig, held_in: Format) -> LanguageModel:
    """A language model from a folder of transformers or a name on the hub; its settings must be those of `config`.

    Raises:
        ModelError: nothing there, or a model of another kind or shape.
    """
    import transformers

    path = check_language(source, config, weights=True)
    try:
        with without_weights():  # what is loaded takes the place of what this made
            made = LanguageModel(config, held_in)
        kind: Any = getattr(transformers, CLASSES[config.kind][1])
        transformers.utils.logging.disable_progress_bar()
        with without_advice_on_tying():
            loaded, report = kind.from_pretrained(
                path, config=config.described(), dtype=FORMATS[held_in], output_loading_info=True
            )
    except (OSError, ValueError) as error:
        raise _none_there(source, error) from None
    if bad := {what: sorted(names)[:5] for what, names in report.items() if names}:
        raise ModelError(f"{source} does not fit language.settings: {bad}")
    if (loaded.lm_head.weight is loaded.get_input_embeddings().weight) != config.tied:
        raise ModelError(f"{source}: set language.tied={str(not config.tied).lower()}, as it is there")
    made.model = loaded
    made.requires_grad_(False)
    made.train(False)
    return made
