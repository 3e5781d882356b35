"""The captioner: the role that writes a text for an image. Any model that can decode may play it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from capfilt.data.text.tokenizer import MAX_CHARACTERS, Tokenizer
from capfilt.errors import RecipeError
from capfilt.inference.generation.beam import beam_search
from capfilt.inference.generation.decode import DecodeConfig, generate, uniforms
from capfilt.inference.generation.output_layer import blocked_head
from capfilt.models import Model
from capfilt.models.layers.image_context import ImageContext

NEEDS = frozenset({"encode_image", "decode"})
"""The verbs of this role."""


MOST = 1024
"""Texts that are written at a time."""


def check_prompt(tokenizer: Tokenizer, config: DecodeConfig) -> None:
    """Refuse a prompt that leaves no room for a text; RecipeError."""
    prompt = tokenizer.opening(config.prompt, MAX_CHARACTERS)
    if len(prompt) >= config.max_length:
        raise RecipeError(
            f"decode.prompt has {len(prompt)} tokens with the one that a text begins with, and decode.max_length "
            f"{config.max_length} leaves none for the text: shorten the prompt, or set "
            f"decode.max_length={len(prompt) + 20} or more"
        )


class Captioner:
    """Writes `captions` texts per image."""

    def __init__(self, model: Model, tokenizer: Tokenizer, config: DecodeConfig, captions: int = 1):
        self.model, self.tokenizer, self.config, self.captions = model, tokenizer, config, captions
        self.head = blocked_head(model)
        check_prompt(tokenizer, config)
        self.prompt = tokenizer.opening(config.prompt, config.max_length)
        if (first := model.config.first_token) is not None:  # as in training, whatever the tokenizer says
            self.prompt[0] = first
        self.question = tokenizer.question(config.prompt)

    def write(self, tokens_BND: Tensor, uids: Sequence[str], seed: int, round_: int) -> list[list[str]]:
        """Image tokens -> `captions` texts for each image; the same for the same (seed, round, uid) in any batch."""
        with torch.inference_mode():
            keys = self.keys(tokens_BND)
        return self.write_beside(keys, uids, seed, round_)

    def keys(self, tokens_BND: Tensor) -> ImageContext:
        """Image tokens -> what a text is written beside."""
        return self.model.image_context(tokens_BND, "decoder", self.question)

    def write_beside(self, image: ImageContext, uids: Sequence[str], seed: int, round_: int) -> list[list[str]]:
        """`write`, where somebody has projected the image's keys already."""
        few = max(1, MOST // self.captions)
        if len(uids) > few:  # a thousand texts of each of a batch's images at once would fill any memory
            parts = [slice(i, i + few) for i in range(0, len(uids), few)]
            return [
                texts for part in parts for texts in self.write_beside(image.select(part), uids[part], seed, round_)
            ]
        if self.config.method == "beam":
            rows = beam_search(
                self.model, image, self.prompt, self.tokenizer.sep, self.config, self.captions, self.head
            )
        else:
            steps = self.config.max_length - len(self.prompt)
            draws = [uniforms(seed, round_, uid, c, steps) for uid in uids for c in range(self.captions)]
            draws_RS = torch.from_numpy(np.stack(draws)).to(image.device)
            rows = generate(self.model, image, self.prompt, self.tokenizer.sep, self.config, draws_RS, self.head)
        texts = [self.tokenizer.decode(row) for row in rows]
        return [texts[i : i + self.captions] for i in range(0, len(texts), self.captions)]
