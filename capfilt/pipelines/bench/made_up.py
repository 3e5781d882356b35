"""What a benchmark measures with: models of random weights, a vocabulary of words that are one token each, pictures.

Random weights cost what trained ones do, as long as they write texts of the same length. Pictures have the grain of
photographs; a long shard has the same ones again and again, under other keys.
"""

from __future__ import annotations

import io
import string
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from capfilt.data import shards
from capfilt.data.sample import Sample
from capfilt.data.text.bert_tokenizers import BertTokenizer, ClosedBertTokenizer, OpenBertTokenizer
from capfilt.data.text.byte_bpe import ByteBpeTokenizer, build, of_words
from capfilt.data.text.tokenizer import Tokenizer
from capfilt.inference.device import local_device
from capfilt.models import ArchitectureConfig
from capfilt.models import build as build_model
from capfilt.models.checkpoints import store

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
PICTURES = 64
"""Pictures that differ: to draw one takes longer than to annotate it on a GPU."""
_OF_BERT: dict[str, type[Tokenizer]] = {
    "wordpiece": Tokenizer,
    "bert": BertTokenizer,
    "open-bert": OpenBertTokenizer,
    "closed-bert": ClosedBertTokenizer,
}


def word(number: int) -> str:
    """The word of a number: a, b, ... z, aa, ab, ..."""
    letters = ""
    while number >= 0:
        number, last = divmod(number, 26)
        letters, number = string.ascii_lowercase[last] + letters, number - 1
    return letters


def made_up_words(size: int, kind: type[Tokenizer] = Tokenizer) -> Tokenizer:
    """A vocabulary of so many tokens, each a word of its own: what is written has as many tokens when it is read."""
    return kind([*SPECIAL, *map(word, range(size - len(SPECIAL) - len(kind.marks)))])


def tokenizer_for(architecture: ArchitectureConfig) -> tuple[Tokenizer, int]:
    """A tokenizer for models of an architecture, and how many of the first words are one token of it."""
    kind, size = architecture.tokenizer_kind, architecture.vocabulary_size
    if kind in _OF_BERT:
        tokenizer = made_up_words(size, _OF_BERT[kind])
        return tokenizer, len(tokenizer) - len(SPECIAL) - len(tokenizer.marks)
    assert kind == "byte-bpe", "a model with a language model of its own is refused before"
    # Bytes take 512 entries, the beginnings that words share some more.
    count = max(26, (size - 1300) * 9 // 10)
    return ByteBpeTokenizer(build(*of_words(map(word, range(count))))), count


def make_models(
    captioner: ArchitectureConfig, folder: Path, shared: bool, filter_: ArchitectureConfig | None = None
) -> tuple[Path, Path]:
    """A captioner and a filter with random weights, as folders; one for both where they are shared."""
    if shared:
        return (_save(captioner, folder / "both", 0),) * 2
    return (
        _save(captioner.for_role("captioner"), folder / "captioner", 0),
        _save((filter_ or captioner).for_role("filter"), folder / "filter", 1),
    )


def _save(architecture: ArchitectureConfig, folder: Path, seed: int) -> Path:
    tokenizer, _ = tokenizer_for(architecture)
    torch.manual_seed(seed)
    with torch.device(local_device()):  # a GPU draws hundreds of millions of numbers in no time
        store.save(build_model(architecture), folder)
    tokenizer.save(folder)
    return folder


def make_shard(
    path: Path, images: int, width: int, num_words: int, words: tuple[int, int] = (4, 16), first: int = 0
) -> str:
    """A tar of JPEGs as the web has them, three quarters as high as wide, each with a text of `words` words of the
    first `num_words`; the keys count from `first`."""
    drawn = [photo(width, np.random.default_rng(i)) for i in range(min(images, PICTURES))]
    samples = []
    for i in range(first, first + images):
        random = np.random.default_rng(i)
        text = " ".join(map(word, random.integers(0, num_words, random.integers(words[0], words[1] + 1))))
        samples.append(Sample(f"{i:06d}", drawn[i % len(drawn)], "jpg", text, {}))
    shards.write(path, samples)
    return str(path)


def photo(width: int, random: np.random.Generator) -> bytes:
    """A JPEG of smooth fields with grain, three quarters as high as `width` pixels."""
    height = width * 3 // 4
    coarse = random.integers(0, 256, (12, 16, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), np.float32)
    grain = random.normal(0, 6, (height, width, 1))
    buffer = io.BytesIO()
    Image.fromarray(np.clip(smooth + grain, 0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()
