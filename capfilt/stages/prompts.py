"""Prompts that leave no room for a text, refused before anything is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from capfilt.data.loading.loader import LoaderConfig
from capfilt.data.text.language_tokenizer import tokenizer_of
from capfilt.data.text.tokenizer import MAX_CHARACTERS
from capfilt.errors import RecipeError
from capfilt.inference.generation.decode import DecodeConfig
from capfilt.inference.roles import check_prompt
from capfilt.models import Architecture


def check_prompts(
    tokenizer: str,
    architecture: Architecture,
    loaders: Mapping[str, LoaderConfig],
    decodes: Sequence[DecodeConfig] = (),
) -> None:
    """Refuse a prompt that leaves no token for the text behind it, of a training (`loaders`, by the name of each) or of
    a captioner. RecipeError."""
    words = tokenizer_of(tokenizer, architecture.language_kind)
    for decode in decodes:
        check_prompt(words, decode)
    for where, loader in loaders.items():
        prompt = len(words.encode([loader.prompt], MAX_CHARACTERS)[0][0])  # with a beginning and an end
        if loader.prompt and prompt >= loader.max_length:
            raise RecipeError(
                f"{where}.loader.prompt has {prompt} tokens with the ends of a text, and loader.max_length "
                f"{loader.max_length} leaves none for the text: shorten the prompt, or set "
                f"{where}.loader.max_length={prompt + 20} or more"
            )
