"""What a model folder holds beside the weights and a role depends on: the tokenizer and how pictures are wanted."""

from __future__ import annotations

from capfilt.data.images.preprocess import Preprocess
from capfilt.data.text.language_tokenizer import tokenizer_of
from capfilt.data.text.tokenizer import Tokenizer
from capfilt.errors import ModelError
from capfilt.models import Architecture
from capfilt.storage.paths import StoragePath


def tokenizer_for(model: StoragePath, architecture: Architecture) -> Tokenizer:
    """The tokenizer of a saved model.

    Raises:
        TextError: none there, or one that cannot be obeyed.
        ModelError: one with more tokens than the model knows.
    """
    tokenizer = tokenizer_of(model, architecture.language_kind)
    if len(tokenizer) > architecture.vocabulary_size:
        raise ModelError(
            f"{model}: its tokenizer has {len(tokenizer)} entries, [DEC] and [ENC] included, and the model knows "
            f"{architecture.vocabulary_size}; it is the tokenizer of another model"
        )
    return tokenizer


def preprocess_for(model: StoragePath, architecture: Architecture) -> Preprocess:
    """How a saved model wants its pictures. ModelError where that cannot be done."""
    return Preprocess.read(model, architecture.image_size)
