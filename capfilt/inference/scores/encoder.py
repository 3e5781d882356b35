"""A sentence encoder: the mean of a BERT's last states over the tokens of a text, as a unit vector.

Any encoder of transformers that is laid out like BERT will do, such as all-MiniLM-L6-v2. Only its safetensors are
read, and code beside them is never run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from capfilt.errors import ModelError
from capfilt.runs.ledger import fingerprint as digest_of
from capfilt.storage.atomic import sha256_file
from capfilt.storage.documents import read_model_object
from capfilt.storage.local_copies import local_copy
from capfilt.storage.paths import StoragePath

if TYPE_CHECKING:
    import torch

KINDS = ("bert", "distilbert", "mpnet", "roberta", "xlm-roberta")
"""The `model_type` of encoders that are laid out like BERT."""
MAX_TOKENS = 256
"""Tokens of a text that are read, as all-MiniLM-L6-v2 does; less where a model has fewer positions."""
BATCH_TOKENS = {"cpu": 2_048, "cuda": 65_536}
"""Tokens at a time, padding included; on a CPU more of them take longer, since they leave its cache."""

_WEIGHTS, _CONFIG, _POOLING = "model.safetensors", "config.json", "1_Pooling/config.json"
_TOKENIZERS = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt", "vocab.json", "merges.txt"),
    "sentencepiece.bpe.model",
)


def check_encoder(where: StoragePath) -> Path:
    """The local folder of a sentence encoder. ModelError for one that is none, or pools otherwise than by the mean."""
    try:
        folder = local_copy(where)
        config = read_model_object(folder / _CONFIG)
        pooling = read_model_object(folder / _POOLING) if (folder / _POOLING).is_file() else {}
    except (OSError, ValueError) as error:
        raise ModelError(f"{where} is no folder of a sentence encoder ({error}); give one of transformers.") from None
    if (kind := config.get("model_type")) not in KINDS:
        raise ModelError(
            f"{where} is of the kind {str(kind)[:40]!r}; a sentence encoder is one of: {', '.join(KINDS)}."
        )
    if not (folder / _WEIGHTS).is_file():
        raise ModelError(f"{where} has no {_WEIGHTS}; fetch it, or save the encoder with safe serialization.")
    if not any((folder / name).is_file() for name in _TOKENIZERS):
        raise ModelError(f"{where} has no tokenizer beside its weights; fetch all files of the encoder.")
    if pooling and not pooling.get("pooling_mode_mean_tokens"):
        raise ModelError(f"{where} does not pool by the mean of its tokens, which is all that is known here.")
    return folder


def encoder_fingerprint(where: StoragePath) -> str:
    """Which encoder this is: the sha256 of its weights, its config and its tokenizer."""
    folder = check_encoder(where)
    names = (_WEIGHTS, _CONFIG, *_TOKENIZERS)
    return digest_of({name: sha256_file(folder / name) for name in names if (folder / name).is_file()})


class SentenceEncoder:
    """Texts to unit vectors."""

    def __init__(self, where: StoragePath, device: torch.device):
        from transformers import AutoModel, AutoTokenizer

        folder = check_encoder(where)
        try:
            self.model: Any = AutoModel.from_pretrained(
                str(folder), local_files_only=True, use_safetensors=True, trust_remote_code=False
            )
            self.tokenizer: Any = AutoTokenizer.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False
            )
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            why = " ".join(str(error).split())[:160]
            raise ModelError(f"{where} cannot be read as a sentence encoder ({why}); fetch all of its files.") from None
        self.model = self.model.eval().to(device)
        positions = int(getattr(self.model.config, "max_position_embeddings", MAX_TOKENS + 2))
        self.max_tokens = min(MAX_TOKENS, positions - 2)  # RoBERTa's positions begin at 2

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        import torch

        vectors = np.empty((len(texts), self.model.config.hidden_size), np.float32)
        ids = self.tokenizer(list(texts), truncation=True, max_length=self.max_tokens)["input_ids"]
        for rows in _batches([len(of_text) for of_text in ids], BATCH_TOKENS[self.model.device.type]):
            padded = self.tokenizer.pad({"input_ids": [ids[row] for row in rows]}, return_tensors="pt")
            padded = padded.to(self.model.device)
            with torch.inference_mode():
                states_BTD = self.model(input_ids=padded["input_ids"], attention_mask=padded["attention_mask"])[
                    0
                ].float()
                mask_BT1 = padded["attention_mask"].unsqueeze(-1)
                mean_BD = (states_BTD * mask_BT1).sum(dim=1) / mask_BT1.sum(dim=1)
                unit = torch.nn.functional.normalize(mean_BD, dim=1).cpu().numpy()
            vectors[rows] = unit
        return vectors


def _batches(lengths: Sequence[int], tokens: int) -> Iterator[list[int]]:
    """The numbers of texts, longest first, in batches of at most so many tokens, or of one text."""
    rows: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if rows and (len(rows) + 1) * lengths[rows[0]] > tokens:
            yield rows
            rows = []
        rows.append(row)
    if rows:
        yield rows
