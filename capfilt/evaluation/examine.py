"""Puts a model before a held-out set and turns its answers into figures; the figures' formulas are in the modules
beside this one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from capfilt.config import Config
from capfilt.data import shards
from capfilt.data.tokens import Tokenizer
from capfilt.engine.batches import pictures
from capfilt.engine.captioner import Captioner
from capfilt.engine.decode import DecodeConfig
from capfilt.engine.filter import Filter
from capfilt.errors import DataError
from capfilt.evaluation import captioning, matching, retrieval
from capfilt.models.blip import Blip

Figures = dict[str, float]


class EvaluateConfig(Config):
    """How a model is examined."""

    rerank: int = Field(default=0, ge=0)
    """Retrieval: re-score so many ITC candidates with ITM (BLIP: 256 on COCO); 0 = cosines alone."""
    decode: DecodeConfig = DecodeConfig(method="greedy")
    batch_size: int = Field(default=64, ge=1)


@dataclass(frozen=True)
class HeldOut:
    """Images as a model sees them, with the human texts of each."""

    tokens: Tensor
    """[I, N, D]"""
    uids: list[str]
    texts: list[list[str]]

    @property
    def image_of_text(self) -> np.ndarray:
        """[T]: which image each text belongs to, texts counted image after image."""
        return np.repeat(np.arange(len(self.texts)), [len(own) for own in self.texts])

    @property
    def flat_texts(self) -> list[str]:
        """All texts, image after image."""
        return [text for own in self.texts for text in own]


@torch.inference_mode()
def look(model: Blip, urls: Sequence[str], batch_size: int, device: torch.device) -> HeldOut:
    """Read a held-out set and encode its images. DataError when a picture of it cannot be read: figures would not
    compare."""
    tokens, uids, texts = [], [], []
    for url in urls:
        for batch in pictures(url, batch_size, model.config.vision.image_size):
            if batch.faults:
                fault = batch.faults[0]
                raise DataError(f"{url}: {fault.key}: {fault.reason}; every picture of a held-out set must be readable")
            tokens.append(model.encode_image(batch.pixels.to(device)))
            uids += [sample.uid for sample in batch.samples]
            texts += [[str(caption["text"]) for caption in sample.captions] for sample in batch.samples]
    if not tokens:
        raise DataError(f"the held-out set {', '.join(urls) or '(no shard)'} is empty")
    return HeldOut(torch.cat(tokens), uids, texts)


def retrieve(filter_: Filter, held: HeldOut, config: EvaluateConfig) -> Figures:
    """TR and IR recalls, in percent; with `rerank` by BLIP's two-stage rule (ITM logit + cosine on the candidates)."""
    texts = held.flat_texts
    image = np.concatenate([filter_.image_features(part) for part in held.tokens.split(config.batch_size)])
    text = np.concatenate([filter_.text_features(part) for part in _parts(texts, config.batch_size)])
    itc = image @ text.T
    if not config.rerank:
        return dict(retrieval.recalls(itc, held.image_of_text))

    def itm(images: np.ndarray, chosen: np.ndarray) -> np.ndarray:
        step = 4 * config.batch_size
        logits = [
            filter_.match_logits(
                held.tokens[torch.from_numpy(images[i : i + step])], [texts[t] for t in chosen[i : i + step]]
            )
            for i in range(0, len(images), step)
        ]
        return np.concatenate(logits)

    i2t, t2i = retrieval.rerank(itc, config.rerank, itm)
    return dict(retrieval.recalls(i2t, held.image_of_text, t2i))


def caption(captioner: Captioner, held: HeldOut, batch_size: int) -> Figures:
    """CIDEr and BLEU-4 of one text per image against its human texts, in percent, and how varied the texts are."""
    written: list[str] = []
    for tokens, uids in zip(held.tokens.split(batch_size), _parts(held.uids, batch_size), strict=True):
        written += [own[0] for own in captioner.write(tokens, uids, seed=0, round_=0)]
    return {
        **captioning.cider(written, held.texts),
        **captioning.bleu4(written, held.texts),
        **captioning.diversity(written),
    }


def calibrate(filter_: Filter, held: HeldOut, score: str, recall: float, batch_size: int) -> matching.Calibration:
    """Set a threshold on human pairs: the highest that lets `recall` of them pass, checked against shuffled pairs.

    Each image keeps its own texts (right) and is given those of the next image in a fixed shuffle (wrong).
    """
    order = np.random.default_rng(0).permutation(len(held.texts))
    wrong = [held.texts[0]] * len(order)
    for image, stranger in zip(order, np.roll(order, 1), strict=True):
        wrong[image] = held.texts[stranger]
    column = {"itm": 0, "itc": 1}[score]

    def scores(texts: list[list[str]]) -> list[float]:
        parts = zip(held.tokens.split(batch_size), _parts(texts, batch_size), strict=True)
        return [pair[column] for tokens, own in parts for row in filter_.score(tokens, own) for pair in row]

    return matching.calibrate(scores(held.texts), scores(wrong), recall)


def truths(urls: Sequence[str]) -> Iterator[tuple[str, bool, str]]:
    """(uid, matches, kind) of the web text of every sample that says so. For evaluation only: nothing that trains or
    filters reads it."""
    for url in urls:
        for item in shards.read(url):
            meta = getattr(item, "meta", {})
            truth = meta.get("truth")
            if isinstance(truth, dict) and {"matches", "kind"} <= truth.keys():
                yield item.uid, bool(truth["matches"]), str(truth["kind"])  # type: ignore[union-attr]


def roles(model: Blip, tokenizer: Tokenizer, config: EvaluateConfig) -> tuple[Filter | None, Captioner | None]:
    """The roles that a model can play in an examination."""
    judge = Filter(model, tokenizer) if "fuse" in model.verbs else None
    writer = Captioner(model, tokenizer, config.decode) if "decode" in model.verbs else None
    return judge, writer


def _parts(items: Sequence[object], size: int) -> list[list]:
    return [list(items[i : i + size]) for i in range(0, len(items), size)]
