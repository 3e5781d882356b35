"""Which score is meant: `side`, `sieve=ENCODER`, `clip:MODEL`, `aesthetic=HEAD.safetensors@MODEL`; read without torch.

A spec knows what it needs to be checked, fingerprinted and opened; `--scores` and `--add-score` take the same ones.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

from capfilt.config import Config
from capfilt.data.scores import is_score, range_of
from capfilt.errors import ModelError, UsageError
from capfilt.inference.roles import check_filter
from capfilt.inference.scores import encoder, heads
from capfilt.models.checkpoints import store
from capfilt.runs.ledger import fingerprint as digest_of
from capfilt.storage.atomic import sha256_file
from capfilt.storage.local_copies import local_copy
from capfilt.storage.paths import StoragePath, storage_path

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from capfilt.inference.local_model import LocalModel
    from capfilt.inference.scores.interface import Scorer

RULES = ("side", "aspect", "entropy")
HEADS = ("aesthetic", "nsfw", "watermark")
FORMS = (
    "side, aspect, entropy, sieve=ENCODER, clip:MODEL, clip-NAME=MODEL, and aesthetic, nsfw or"
    " watermark=HEAD.safetensors@MODEL"
)

_HEAD = re.compile(r"(.+\.safetensors)@(.+)")

Load = Callable[[StoragePath], "LocalModel"]
"""Gives a model in this process; the same one each time, so that what it computes of pictures is shared."""


class RuleSpec(Config):
    """A measure of the picture."""

    name: str
    """side | aspect | entropy"""
    reads_pictures: Literal[True] = True
    computes: Literal[False] = False
    """Whether it depends on the number format of the matrix products."""

    def check(self) -> None:
        """Nothing to check."""

    def fingerprint(self) -> str:
        """Raised when the measure changes."""
        return f"{self.name} 1"

    def open(self, load: Load, device: torch.device) -> Scorer:
        from capfilt.inference.scores.rules import RuleScorer

        return RuleScorer(self.name)


class SieveSpec(Config):
    """Agreement with the captions, by a sentence encoder."""

    name: Literal["sieve"] = "sieve"
    encoder: StoragePath
    reads_pictures: Literal[False] = False
    computes: Literal[True] = True

    def check(self) -> None:
        """Refuse a folder that holds no sentence encoder. ModelError."""
        encoder.check_encoder(self.encoder)

    def fingerprint(self) -> str:
        """The encoder's, and the version of the phrases that are left out."""
        from capfilt.inference.scores.sieve import VERSION

        return digest_of("sieve", VERSION, encoder.encoder_fingerprint(self.encoder))

    def open(self, load: Load, device: torch.device) -> Scorer:
        from capfilt.inference.scores.sieve import SieveScorer

        return SieveScorer(encoder.SentenceEncoder(self.encoder, device))


class ClipSpec(Config):
    """The cosine by a dual encoder."""

    name: str
    """clip-NAME"""
    model: StoragePath
    reads_pictures: Literal[True] = True
    computes: Literal[True] = True

    def check(self) -> None:
        """Refuse a model that does not encode images and texts apart. RecipeError."""
        check_filter(self.model, ["itc"])

    def fingerprint(self) -> str:
        return store.fingerprint(self.model)

    def open(self, load: Load, device: torch.device) -> Scorer:
        from capfilt.inference.scores.clip import ClipScorer

        return ClipScorer(load(self.model))


class HeadSpec(Config):
    """A head on the vectors of a dual encoder."""

    name: str
    """aesthetic | nsfw | watermark"""
    head: StoragePath
    model: StoragePath
    reads_pictures: Literal[True] = True
    computes: Literal[True] = True

    def check(self) -> None:
        """Refuse a head in no known layout, or for vectors of another width. ModelError."""
        architecture = check_filter(self.model, ["itc"])
        heads.read_layout(self._file(), architecture.feature_width, self.model)

    def fingerprint(self) -> str:
        return digest_of(sha256_file(self._file()), store.fingerprint(self.model))

    def open(self, load: Load, device: torch.device) -> Scorer:
        """The scorer, with its model and head loaded."""
        return heads.HeadScorer(load(self.model), self._file(), range_of(self.name))

    def _file(self) -> Path:
        try:
            return local_copy(self.head)
        except OSError as error:
            raise ModelError(f"no head at {self.head} ({error})") from None


ScoreSpec = RuleSpec | SieveSpec | ClipSpec | HeadSpec


def score_specs(texts: Sequence[str]) -> tuple[ScoreSpec, ...]:
    """The scores that are asked for, each once; nothing is loaded. UsageError, or what `store.find` raises."""
    specs = tuple(map(score_spec, texts))
    names = [spec.name for spec in specs]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UsageError(f"two scores are called {twice}; give each its own name, as in clip-NAME=MODEL.")
    return specs


def score_spec(text: str) -> ScoreSpec:
    """One score as it is written on the command line. UsageError for what is none."""
    if text.startswith("clip:"):
        model = text.removeprefix("clip:")
        return _clip(f"clip-{_last_part(model)}", model, text)
    name, separator, value = text.partition("=")
    if name in RULES and not separator:
        return RuleSpec(name=name)
    if name == "sieve" and value:
        return SieveSpec(encoder=storage_path(value).absolute())
    if name.startswith("clip-") and value:
        return _clip(name, value, text)
    if name in HEADS and (match := _HEAD.fullmatch(value)):
        return HeadSpec(name=name, head=storage_path(match[1]).absolute(), model=store.find(match[2]))
    raise UsageError(f"{text!r} is no score; scores are {FORMS}.")


def name_of(text: str) -> str:
    """The column that a score would have, whether or not its model can be found."""
    clip, colon, model = text.partition(":")
    return f"clip-{_last_part(model)}" if clip == "clip" and colon else text.partition("=")[0]


def paths_of(text: str) -> list[str]:
    """The models and files that a score names, as they are written."""
    clip, _, model = text.partition(":")
    value = model if clip == "clip" else text.partition("=")[2]
    head = _HEAD.fullmatch(value)
    return [*head.groups()] if head else [value] if value else []


def _clip(name: str, model: str, text: str) -> ClipSpec:
    if not model or not is_score(name):
        raise UsageError(f"{text!r} is no score: a NAME is of a-z, 0-9 and -, as in clip-b32=MODEL.")
    return ClipSpec(name=name, model=store.find(model))


def _last_part(model: str) -> str:
    """What a model is called: the last part of its path, of a training the folder above its `checkpoint`."""
    parts = [part for part in model.rstrip("/").split("/") if part] or [""]
    last = parts[-2] if parts[-1] == "checkpoint" and len(parts) > 1 else parts[-1]
    return re.sub(r"[^a-z0-9]+", "-", last.lower()).strip("-")
