"""A captioner that is a model in this process: any that can decode."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from capfilt.data.images.preprocess import ImageFormat
from capfilt.data.sample import Sample
from capfilt.inference.batches import Images
from capfilt.inference.captioners.prompts import IGNORE, PREFIX, web_text
from capfilt.inference.config import DecodeConfig
from capfilt.inference.generation.beam import scored_beams
from capfilt.inference.generation.decode import generate, uniforms
from capfilt.inference.generation.fused import FusedSteps
from capfilt.inference.generation.output_layer import blocked_head
from capfilt.inference.interface import Caption
from capfilt.inference.local_model import LocalModel
from capfilt.inference.roles import check_prompt
from capfilt.models.layers.image_context import ImageContext
from capfilt.models.layers.transfer import to_device

MAX_ROWS = 1024
"""Texts that are written at a time."""


class Written(NamedTuple):
    """A text, and by what beam search preferred it (`Beam.score`); None of methods that draw or take the likeliest."""

    text: str
    score: float | None


class LocalCaptioner:
    """Writes `captions` texts per image; the same for the same (seed, round, uid) in any batch."""

    def __init__(
        self,
        local: LocalModel,
        config: DecodeConfig,
        captions: int = 1,
        seed: int = 0,
        round_: int = 0,
        web_prefix: int = 0,
        capture: bool = False,
    ):
        """`web_prefix`: tokens of its web text that stand before what an image's texts begin with. `capture`: on a GPU,
        steps become CUDA graphs."""
        self.web_prefix = web_prefix
        self.local, self.model, self.tokenizer = local, local.model, local.tokenizer
        self.config, self.captions, self.seed, self.round = config, captions, seed, round_
        self.head, self.fused = blocked_head(self.model), FusedSteps.of(self.model, capture)
        check_prompt(self.tokenizer, config)
        self.prompt = self.tokenizer.decoder_prompt(config.prompt, config.max_length)
        if (first := self.model.config.first_token) is not None:  # as in training, whatever the tokenizer says
            self.prompt[0] = first
        self.question = self.tokenizer.encoder_prompt(config.prompt)
        self.context_name: object = object()
        """Under which the image context is kept in a batch of images."""
        self.shares_context = False
        """Whether the filter reads texts beside the same context."""
        self.keeps_rows = False
        """Whether texts that have ended stay in the batch until all have, so that its shapes are the same each time."""

    @property
    def image_formats(self) -> tuple[ImageFormat, ...]:
        return (self.local.image_format,)

    @torch.inference_mode()
    def prepare(self, images: Images) -> None:
        self.local.image_tokens(images)

    def caption(self, images: Images, samples: Sequence[Sample]) -> list[list[Caption]]:
        """`captions` texts for each image, which draw by the uids of the samples."""
        if self.web_prefix:
            return self._after_web_texts(self._context(images), samples)
        return [[Caption(written.text) for written in of_image] for of_image in self.caption_scored(images, samples)]

    @torch.inference_mode()
    def caption_scored(self, images: Images, samples: Sequence[Sample]) -> list[list[Written]]:
        """`caption` with the scores of the texts."""
        return self.write_from(self._context(images), [sample.uid for sample in samples])

    def _context(self, images: Images) -> ImageContext:
        context: ImageContext = images.once(
            self.context_name, lambda: self.image_context(self.local.image_tokens(images))
        )
        return context

    @torch.inference_mode()
    def _after_web_texts(self, context: ImageContext, samples: Sequence[Sample]) -> list[list[Caption]]:
        """`caption` after each image's web text; images whose web texts have equally many tokens are written
        together."""
        found: list[list[Caption]] = [[] for _ in samples]
        prefixes = [self._web_ids(web_text(sample)) for sample in samples]
        for length in sorted({*map(len, prefixes)}):
            numbers = [i for i, prefix in enumerate(prefixes) if len(prefix) == length]
            rows = to_device(torch.tensor(numbers), context.device)
            begun = [[*self.prompt[:1], *prefixes[i], *self.prompt[1:]] for i in numbers]
            prompts_IP = to_device(torch.tensor(begun), context.device)
            written = self.write_from(context.select(rows), [samples[i].uid for i in numbers], prompts_IP)
            for i, of_image in zip(numbers, written, strict=True):
                found[i] = [Caption(one.text, PREFIX if length else IGNORE) for one in of_image]
        return found

    def _web_ids(self, text: str) -> list[int]:
        most = self.web_prefix
        return self.tokenizer.decoder_prompt(text, most + 2)[1 : most + 1] if text else []

    @torch.inference_mode()
    def write(self, tokens_BND: Tensor, uids: Sequence[str]) -> list[list[str]]:
        """Image tokens -> `captions` texts for each image."""
        every = self.write_from(self.image_context(tokens_BND), uids)
        return [[written.text for written in of_image] for of_image in every]

    def image_context(self, tokens_BND: Tensor) -> ImageContext:
        """Image tokens -> what the texts attend to."""
        if not self.shares_context:
            rows = self.config.beams if self.config.method == "beam" else self.captions
            context = self.model.tokens_instead(tokens_BND, rows * self.config.max_length)
            if context is not None:
                return context
        return self.model.image_context(tokens_BND, "decoder", self.question).laid_out()

    def write_from(
        self, image: ImageContext, uids: Sequence[str], prompts_IP: Tensor | None = None
    ) -> list[list[Written]]:
        """An image context -> `captions` texts for each image, after the prompt, or after one for each image."""
        most = max(1, MAX_ROWS // self.captions)
        if len(uids) > most:  # a thousand texts of each of a batch's images at once would fill any memory
            parts = [slice(i, i + most) for i in range(0, len(uids), most)]
            prompts = [None if prompts_IP is None else prompts_IP[part] for part in parts]
            texts = [
                self.write_from(image.select(part), uids[part], of_part)
                for part, of_part in zip(parts, prompts, strict=True)
            ]
            return [of_image for of_part in texts for of_image in of_part]
        end, rows = self.tokenizer.sep, list[tuple[list[int], float | None]]()
        config, prompt = self.config, self.prompt if prompts_IP is None else prompts_IP
        if prompts_IP is not None:  # lengths are of the prompt and the text
            more = prompts_IP.shape[1] - len(self.prompt)
            lengths = {"min_length": config.min_length + more, "max_length": config.max_length + more}
            config = config.model_copy(update=lengths)
        how = (self.head, self.fused, self.keeps_rows)
        if self.config.method == "beam":
            rows += scored_beams(self.model, image, prompt, end, config, self.captions, *how)
        else:
            steps = self.config.max_length - len(self.prompt)
            draws = [uniforms(self.seed, self.round, uid, c, steps) for uid in uids for c in range(self.captions)]
            draws_RS = torch.from_numpy(np.stack(draws)).to(image.device, non_blocking=True)
            rows += [(ids, None) for ids in generate(self.model, image, prompt, end, config, draws_RS, *how)]
        every = [Written(self.tokenizer.decode(ids), score) for ids, score in rows]
        return [every[i : i + self.captions] for i in range(0, len(every), self.captions)]
