"""Puts a model before held-out pairs, and before web texts of known truth, and turns its answers into figures.

The figures' formulas are in the modules beside this one. Nothing that trains or filters may read the truth.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from capfilt.config import Config
from capfilt.data import shards
from capfilt.data.images.preprocess import Preprocess
from capfilt.data.policy import failure
from capfilt.data.sample import FailedSample, Sample
from capfilt.data.text.tokenizer import Tokenizer
from capfilt.errors import DataError
from capfilt.evaluation.metrics import captioning, matching, retrieval
from capfilt.inference.batches import BLIP, pictures
from capfilt.inference.captioners.local import Captioner
from capfilt.inference.filters.fusion import Filter
from capfilt.inference.generation.decode import DecodeConfig
from capfilt.models import Model
from capfilt.printable import printable, short_repr
from capfilt.runs.tally import OTHER

T = TypeVar("T")
Figures = dict[str, float]
Truth = tuple[bool, str]
"""Whether a web text matches its image, and what kind of text it is: "right", or the way in which it is wrong."""
MAX_KIND = 64
"""Characters of a kind; the shard that names it is anybody's."""
MAX_KINDS = 64
"""Kinds that have a figure of their own; what comes after them is "other"."""

COLUMN = {"itm": 0, "itc": 1}
"""The place of each score in what a filter answers."""


class EvaluateConfig(Config):
    """How a model is examined."""

    rerank: int = Field(default=0, ge=0)
    """Retrieval: re-score so many ITC candidates with ITM (BLIP: 256 on COCO); 0 = cosines alone."""
    decode: DecodeConfig = DecodeConfig(method="greedy")
    batch_size: int = Field(default=64, ge=1)
    score: Literal["itm", "itc"] = "itm"
    """The filter's score by which web texts of known truth are judged."""
    threshold: float = 0.5
    """From which score on such a text counts as kept."""


EXECUTION_FIELDS = {"batch_size": True}
"""What EvaluateConfig says of how figures are computed, and not of which: no part of plan and fingerprint."""


@dataclass(frozen=True)
class EncodedBatch:
    """Some images with their tokens [B, N, D], and why others beside them could not be read."""

    tokens: Tensor
    samples: list[Sample]
    unreadable: Counter[str] = field(default_factory=Counter)

    def only(self, chosen: Sequence[bool]) -> EncodedBatch:
        """The chosen ones of them."""
        return EncodedBatch(self.tokens[torch.tensor(chosen)], list(itertools.compress(self.samples, chosen)))

    def aside(self) -> EncodedBatch:
        """The same, off the accelerator."""
        return replace(self, tokens=self.tokens.cpu())


@dataclass(frozen=True)
class EvalSet:
    """Images as a model sees them, each once, with the human texts of each: one at least."""

    tokens: Tensor
    """[I, N, D], not on the accelerator: of COCO's 5,000 images they are 9 GB"""
    uids: list[str]
    texts: list[list[str]]
    device: torch.device
    """Where they are looked at."""
    without_text: int = 0
    """Pictures that were left out since they came without a text."""

    @property
    def image_of_text(self) -> np.ndarray:
        """[T]: which image each text belongs to, texts counted image after image."""
        return np.repeat(np.arange(len(self.texts)), [len(own) for own in self.texts])

    @property
    def flat_texts(self) -> list[str]:
        """All texts, image after image."""
        return [text for own in self.texts for text in own]

    def split(self, size: int) -> Iterator[Tensor]:
        """The tokens of `size` images at a time."""
        return (part.to(self.device) for part in self.tokens.split(size))

    def of_images(self, indices: np.ndarray) -> Tensor:
        """The tokens of these images."""
        return self.tokens[torch.from_numpy(indices)].to(self.device)


class UniqueImages:
    """Gathers a held-out set: a picture that stands under several keys is one image, with the texts of all of them.

    Pictures are the same where their uids are equal or their bytes are, and so are two that are the same as a third.
    """

    def __init__(self) -> None:
        self.without_text = 0
        self._tokens: list[Tensor] = []
        self._uids: list[str] = []
        self._texts: list[list[str]] = []
        self._same: list[int] = []
        """For each image the number of one before it that it turned out to be, else its own."""
        self._known: dict[str, int] = {}
        """The image by its uid and by its sha256 (32 and 64 digits)."""

    def add(self, batch: EncodedBatch) -> None:
        """Take up a batch; pictures that are known already give only their texts, so they need no memory twice."""
        new = [self._add(sample) for sample in batch.samples]
        if any(new):
            self._tokens.append(batch.only(new).aside().tokens)

    def _add(self, sample: Sample) -> bool:
        if not sample.captions:
            self.without_text += 1
            return False
        names = (sample.uid, sample.sha256)
        found = sorted({self._first(self._known[name]) for name in names if name in self._known})
        if not found:
            self._uids.append(sample.uid)
            self._texts.append([])
            self._same.append(len(self._same))
        image, *others = found or [len(self._same) - 1]
        for other in others:
            self._same[other] = image
            self._texts[image] += self._texts[other]
        self._known |= dict.fromkeys(names, image)
        self._texts[image] += [caption["text"] for caption in sample.captions]
        return not found

    def _first(self, image: int) -> int:
        while self._same[image] != image:
            image = self._same[image]
        return image

    def held_out(self, device: torch.device) -> EvalSet | None:
        """All of them, in the order in which they came; None where no picture with a text did."""
        if not self._tokens:
            return None
        images = [image for image, first in enumerate(self._same) if image == first]
        tokens = torch.cat(self._tokens)
        if len(images) < len(tokens):
            tokens = tokens[torch.tensor(images)]
        uids, texts = [self._uids[i] for i in images], [self._texts[i] for i in images]
        return EvalSet(tokens, uids, texts, device, self.without_text)


@dataclass
class ScoredTexts:
    """Web texts of known truth, with a filter's scores."""

    scores: list[float] = field(default_factory=list)
    matches: list[bool] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)
    counted_kinds: set[str] = field(default_factory=set)

    def add(self, score: float, told: Truth) -> None:
        """One more text."""
        self.scores.append(score)
        self.matches.append(told[0])
        if len(self.counted_kinds) < MAX_KINDS:
            self.counted_kinds.add(told[1])
        self.kinds.append(told[1] if told[1] in self.counted_kinds else OTHER)

    def ask(self, judge: Filter, score: str, seen: EncodedBatch) -> None:
        """Have a filter score the web texts of some images; one whose web text was dropped has none."""
        texts = [[str(c["text"]) for c in sample.captions if c["source"] == "web"][:1] for sample in seen.samples]
        for sample, scores in zip(seen.samples, judge.score(seen.tokens, texts), strict=True):
            for own in scores:
                self.add(own[COLUMN[score]], truth(sample) or (False, ""))

    def figures(self, threshold: float) -> dict[str, Any]:
        """Threshold, AUC, precision, recall and AUC by kind; {} when there is no such text."""
        if not self.scores:
            return {}
        return dict(matching.report(np.array(self.scores), np.array(self.matches), self.kinds, threshold))


def examine(
    model: Model,
    tokenizer: Tokenizer,
    urls: Sequence[str],
    config: EvaluateConfig,
    device: torch.device,
    preprocess: Preprocess = BLIP,
) -> dict[str, Any]:
    """Everything that can be measured: retrieval, captioning, filter, each where model and shards allow it.

    Web texts of known truth are put before the filter; all other texts are taken for human ones. `unreadable` and
    `without_text` count pictures that are in no figure. DataError when nothing can be measured.
    """
    judge, writer = roles(model, tokenizer, config)
    judged, human, unreadable = ScoredTexts(), UniqueImages(), Counter[str]()
    for batch in seen(model, urls, config.batch_size, device, preprocess):
        unreadable.update(batch.unreadable)
        known = [truth(sample) is not None for sample in batch.samples]
        if judge is not None and any(known):
            judged.ask(judge, config.score, batch.only(known))
        if not all(known):
            human.add(batch.only([not is_known for is_known in known]))
    figures: dict[str, Any] = {}
    if (held := human.held_out(device)) is not None:
        if judge is not None:
            figures["retrieval"] = retrieve(judge, held, config)
        if writer is not None:
            figures["captioning"] = caption(writer, held, config.batch_size)
    if found := judged.figures(config.threshold):
        figures["filter"] = found
    if not figures:
        why = "".join(f", mostly {reason}" for reason, _ in unreadable.most_common(1))
        where = ", ".join(urls)
        raise DataError(
            f"nothing can be measured on {where}: no pair that can be read ({unreadable.total()} unreadable{why},"
            f" {human.without_text} without a text) and that this model can be asked about; give other shards."
        )
    left_out = {"unreadable": unreadable.total(), "without_text": human.without_text}
    return figures | {why: count for why, count in left_out.items() if count}


@torch.inference_mode()
def seen(
    model: Model, urls: Sequence[str], batch_size: int, device: torch.device, preprocess: Preprocess = BLIP
) -> Iterator[EncodedBatch]:
    """Read shards and encode their images."""
    for url in urls:
        for batch in pictures(shards.read(url), batch_size, model.config.image_size, preprocess=preprocess):
            tokens = model.encode_image(batch.on(device, preprocess)) if batch.samples else torch.empty(0)
            yield EncodedBatch(tokens, batch.samples, Counter(failure(fault.reason) for fault in batch.faults))


def look(
    model: Model, urls: Sequence[str], batch_size: int, device: torch.device, preprocess: Preprocess = BLIP
) -> EvalSet:
    """A held-out set as a model sees it, without the pictures that cannot be read or have no text."""
    found = UniqueImages()
    for batch in seen(model, urls, batch_size, device, preprocess):
        found.add(batch)
    if (held := found.held_out(device)) is None:
        where = ", ".join(urls) or "(no shard)"
        raise DataError(f"the held-out set {where} has no picture that can be read and has a text")
    return held


def retrieve(filter_: Filter, held: EvalSet, config: EvaluateConfig) -> Figures:
    """TR and IR recalls, in percent; with `rerank` by BLIP's two-stage rule (ITM logit + cosine on the candidates)."""
    texts = held.flat_texts
    image = np.concatenate([filter_.image_features(part) for part in held.split(config.batch_size)])
    text = np.concatenate([filter_.text_features(part) for part in _parts(texts, config.batch_size)])
    itc = filter_.similarities(image, text)
    if not config.rerank:
        return dict(retrieval.recalls(itc, held.image_of_text))

    def itm(images: np.ndarray, chosen: np.ndarray) -> np.ndarray:
        step = 4 * config.batch_size
        logits = [
            filter_.match_logits(held.of_images(images[i : i + step]), [texts[t] for t in chosen[i : i + step]])
            for i in range(0, len(images), step)
        ]
        return np.concatenate(logits)

    i2t, t2i = retrieval.rerank(itc, config.rerank, itm)
    return dict(retrieval.recalls(i2t, held.image_of_text, t2i))


def caption(captioner: Captioner, held: EvalSet, batch_size: int) -> dict[str, float | str]:
    """CIDEr and BLEU-4 of one text per image against its human texts, in percent, and how varied the texts are; and by
    what they were scored (`tokenisation`)."""
    written: list[str] = []
    for tokens, uids in zip(held.split(batch_size), _parts(held.uids, batch_size), strict=True):
        written += [own[0] for own in captioner.write(tokens, uids, seed=0, round_=0)]
    return {
        **captioning.cider(written, held.texts),
        **captioning.bleu4(written, held.texts),
        **captioning.diversity(written),
        "tokenisation": captioning.tokenisation(text for own in held.texts for text in own),
    }


def calibrate(filter_: Filter, held: EvalSet, score: str, recall: float, batch_size: int) -> matching.Calibration:
    """Set a threshold on human pairs: the highest that lets `recall` of them pass, checked against shuffled pairs.

    Each image keeps its own texts (right) and is given those of the next image in a fixed shuffle (wrong).
    """
    order = np.random.default_rng(0).permutation(len(held.texts))
    wrong = [held.texts[0]] * len(order)
    for image, stranger in zip(order, np.roll(order, 1), strict=True):
        wrong[image] = held.texts[stranger]
    column = COLUMN[score]

    def scores(texts: list[list[str]]) -> list[float]:
        parts = zip(held.split(batch_size), _parts(texts, batch_size), strict=True)
        return [pair[column] for tokens, own in parts for row in filter_.score(tokens, own) for pair in row]

    return matching.calibrate(scores(held.texts), scores(wrong), recall)


def truth(sample: Sample) -> Truth | None:
    """Whether the web text of a sample matches, and its kind, where the sample says so."""
    told = sample.meta.get("truth")
    if isinstance(told, dict) and {"matches", "kind"} <= told.keys():
        kind = told["kind"]
        return bool(told["matches"]), printable(kind if isinstance(kind, str) else short_repr(kind), MAX_KIND)
    return None


def truths(url: str) -> dict[str, Truth]:
    """The truth of every web text of a shard by uid; {}, after one look, for a shard whose first sample has none."""
    known: dict[str, Truth] = {}
    for item in shards.read(url):
        if isinstance(item, FailedSample):
            continue
        told = truth(item)
        if told is not None:
            known[item.uid] = told
        elif not known:
            break
    return known


def roles(model: Model, tokenizer: Tokenizer, config: EvaluateConfig) -> tuple[Filter | None, Captioner | None]:
    """The roles that a model can play in an examination."""
    judge = Filter(model, tokenizer) if "fuse" in model.capabilities else None
    writer = Captioner(model, tokenizer, config.decode) if "decode" in model.capabilities else None
    return judge, writer


def _parts(items: Sequence[T], size: int) -> list[list[T]]:
    return [list(items[i : i + size]) for i in range(0, len(items), size)]
