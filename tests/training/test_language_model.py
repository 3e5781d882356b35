from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from capfilt.data.text.language_tokenizer import LanguageTokenizer
from capfilt.errors import DataError, ModelError
from capfilt.models.blip2.config import LanguageConfig
from capfilt.models.blip2.language_model import load_language
from capfilt.training.config import TeachConfig
from capfilt.training.language_model import make_tokenizer, rows, teach

OPT = LanguageConfig(
    kind="opt",
    settings={
        "hidden_size": 32,
        "word_embed_proj_dim": 32,
        "ffn_dim": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": 300,
        "max_position_embeddings": 24,
        "dropout": 0.0,
        "init_std": 0.15,
    },
)
WORDS = ["red", "green", "blue", "white"]
DOCUMENTS = [[f"a {colour} square", f"the {colour} one", f"{colour} it is"] for colour in WORDS]


@pytest.mark.slow
def test_it_learns_that_texts_of_one_image_go_together(tmp_path: Path) -> None:
    """A second text is told by the first, and by nothing else."""
    teach(tmp_path, OPT, DOCUMENTS, TeachConfig(steps=200, batch_size=16, lr=5e-3), seed=0)
    tokenizer = LanguageTokenizer.load(tmp_path)
    model = load_language(str(tmp_path), OPT, "fp32").model
    tried = {}
    for colour in WORDS:
        first, begun = (tokenizer.encode([text], 20)[0][0].tolist() for text in (f"a {colour} square", "the"))
        ids = torch.tensor([first + begun[:-1]])
        logits = model(ids).logits[0, -1]
        names = {word: tokenizer.encode([f"the {word}"], 20)[0][0][len(begun) - 1] for word in WORDS}
        tried[colour] = max(names, key=lambda word: logits[names[word]])
    assert tried == {colour: colour for colour in WORDS}


def test_the_same_seed_teaches_the_same_weights(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        teach(tmp_path / name, OPT, DOCUMENTS, TeachConfig(steps=2, batch_size=4), seed=seed)
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b != c


def test_rows_are_whole_documents_end_to_end() -> None:
    documents = [[[1, 2], [3, 4]], [[5, 6], [7, 8]]]
    found = rows(documents, 64, 8, np.random.default_rng(0))
    assert found.shape == (64, 8)
    halves = {tuple(half.tolist()) for row in found for half in row.split(4)}
    assert halves == {(1, 2, 3, 4), (3, 4, 1, 2), (5, 6, 7, 8), (7, 8, 5, 6)}


def test_a_tokenizer_has_room_for_what_stands_for_images() -> None:
    assert len(make_tokenizer(DOCUMENTS, 280)) <= 280


def test_nothing_to_read_and_no_opt_are_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no text from which"):
        teach(tmp_path, OPT, [[], []], TeachConfig(), seed=0)
    t5 = LanguageConfig(kind="t5", settings={"d_model": 16, "vocab_size": 300})
    with pytest.raises(ModelError, match=r"is an OPT, and language\.kind is t5"):
        teach(tmp_path, t5, DOCUMENTS, TeachConfig(), seed=0)
