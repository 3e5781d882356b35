"""Teach a small language model, for BLIP-2's second stage in miniature: an OPT that has read texts and seen no image.

What the paper freezes has read the web, and with it that what came before tells what comes next; queries in front of
a text are listened to for that reason. A small model that read single texts never met anything before a text that was
worth a look, and writes the same beside every image. So texts are read as documents: all texts of an image, one after
another, in another order each time. Nothing of this is BLIP-2's; it stands where OPT-2.7B stands.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from capfilt.data.text.language_tokenizer import LanguageTokenizer
from capfilt.errors import DataError, ModelError
from capfilt.models.blip2.config import LanguageConfig
from capfilt.models.blip2.language_model import LanguageModel
from capfilt.training.config import TeachConfig

OWN_TOKENS = ("<s>", "<pad>", "</s>")
"""As OPT's tokenizer has them; a text begins with the last."""


def teach(
    folder: Path, language: LanguageConfig, documents: Sequence[Sequence[str]], config: TeachConfig, seed: int
) -> float:
    """Write a model that has read these documents, with a byte-level BPE trained on them, in transformers' layout.

    Returns: the loss of its last step in nats a token; 0 where there was none.

    Raises:
        ModelError: a language model other than OPT.
        DataError: nothing to read.
    """
    if language.kind != "opt":
        raise ModelError(f"a language model that is taught is an OPT, and language.kind is {language.kind}")
    documents = [document for document in documents if document]
    if not documents:
        raise DataError("there is no text from which a language model could be taught")
    tokenizer = make_tokenizer(documents, int(language.settings["vocab_size"] or 0) - 1)  # the last stands for images
    read = [[_ids(tokenizer, text) for text in document] for document in documents]
    torch.manual_seed(seed)
    model = LanguageModel(language, "fp32").model.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr)
    draw, length, loss = np.random.default_rng(seed), int(model.config.max_position_embeddings), 0.0
    for step in range(config.steps):
        optimizer.param_groups[0]["lr"] = config.lr * (1 - step / config.steps)
        ids = rows(read, config.batch_size, length, draw)
        output = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        output.backward()
        optimizer.step()
        loss = output.item()
    model.eval().save_pretrained(folder)
    tokenizer.save(folder)
    return loss


def make_tokenizer(documents: Sequence[Sequence[str]], entries: int) -> LanguageTokenizer:
    """A byte-level BPE of at most `entries` tokens, learned from these documents."""
    from tokenizers import ByteLevelBPETokenizer  # here, not above: it takes seconds, as transformers does
    from transformers import PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    texts = [text for document in documents for text in document]
    bpe.train_from_iterator(texts, vocab_size=entries, special_tokens=[*OWN_TOKENS], show_progress=False)
    start, padding, end = OWN_TOKENS[2], OWN_TOKENS[1], OWN_TOKENS[2]
    engine = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, bos_token=start, eos_token=end, pad_token=padding)
    return LanguageTokenizer(engine, "opt")


def rows(documents: Sequence[Sequence[Sequence[int]]], count: int, length: int, draw: np.random.Generator) -> Tensor:
    """Documents drawn at random, the texts of each shuffled, end to end and cut to rows [count, length]."""
    taken = []
    for _ in range(count):
        row: list[int] = []
        while len(row) < length:
            document = documents[int(draw.integers(len(documents)))]
            row += [token for i in draw.permutation(len(document)) for token in document[i]]
        taken.append(row[:length])
    return torch.tensor(taken)


def _ids(tokenizer: LanguageTokenizer, text: str) -> list[int]:
    ids, _ = tokenizer.encode([text], 1 << 16)
    return [int(token) for token in ids[0]]
