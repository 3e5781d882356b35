"""capfilt's annotator beside transformers' BLIP, the same weights, pictures and texts in both: images per second.

    python benchmarks/annotate.py --captions 1
    python benchmarks/annotate.py --captions 10 --images 16

Every competitor captions each picture and scores the captions and one web text by itm and itc, from normalised pixels
in memory to texts and scores as Python objects, with one tokenizer. Before anything is timed, all must give the same
greedy captions in fp32 and, to 1e-4, the same scores. Medians of `--repeats`, in turns.

    transformers     its API, batched as well as it allows: a vision pass a `generate` and a vision pass a `forward`
    by hand          transformers' parts, the vision pass and its output shared by hand: an afternoon's work
    capfilt          capfilt's annotator, as `capfilt annotate` uses it

each in fp32, under autocast to bf16 and, of transformers, with its weights in bf16. A ratio of a format is capfilt's
against each of the others' in it; `best` is each at the format that is fastest for it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import BlipForConditionalGeneration, BlipForImageTextRetrieval

from capfilt import config as configs
from capfilt import presets
from capfilt.data.sample import Sample
from capfilt.data.text.tokenizer import Tokenizer, clean_caption
from capfilt.evaluation import speed
from capfilt.inference.annotator import Annotator
from capfilt.inference.batches import Images
from capfilt.inference.captioners.local import LocalCaptioner
from capfilt.inference.config import DecodeConfig
from capfilt.inference.device import autocast
from capfilt.inference.filters.fusion import FusionFilter
from capfilt.inference.local_model import LocalModel
from capfilt.inference.timer import StageTimer
from capfilt.models import Blip, BlipConfig
from capfilt.models.checkpoints import store
from capfilt.pipelines.bench.made_up import made_up_words, word

CPU = torch.device("cpu")
Scored = list[list[tuple[str, float, float]]]
"""The texts of each image, the web's first, with itm and itc."""


@dataclass(frozen=True)
class Pairs:
    """Pictures and their web texts."""

    pixels: Tensor
    uids: list[str]
    web: list[str]

    def batches(self, size: int) -> list[Pairs]:
        """In batches."""
        starts = range(0, len(self.uids), size)
        return [Pairs(self.pixels[i : i + size], self.uids[i : i + size], self.web[i : i + size]) for i in starts]


class Phases(StageTimer):
    """Processor seconds of each phase of capfilt's."""

    @contextmanager
    def stage(self, name: str, on_device: bool = True) -> Iterator[None]:
        before = time.process_time()
        yield
        self.seconds[name] += time.process_time() - before

    def take(self) -> dict[str, float]:
        """The seconds so far, which are then forgotten."""
        taken = dict(self.seconds)
        self.seconds.clear()
        return taken


@dataclass(frozen=True)
class Ours:
    """capfilt."""

    annotator: Annotator

    def annotate(self, pairs: Pairs) -> Scored:
        (image_format,) = self.annotator.filter.image_formats
        samples = [Sample(uid, b"", "jpg", "", {"uid": uid}) for uid in pairs.uids]
        images = Images({image_format: pairs.pixels})
        annotated = self.annotator.annotate(images, samples, [[text] for text in pairs.web])
        return [[(text.text, text.itm or 0.0, text.itc or 0.0) for text in of_image] for of_image in annotated]


@dataclass(frozen=True)
class Theirs:
    """transformers, by its API."""

    captioner: Any
    filter: Any
    tokenizer: Tokenizer
    decode: DecodeConfig
    captions: int
    max_length: int = 35

    def annotate(self, pairs: Pairs) -> Scored:
        pixels = pairs.pixels.to(self.captioner.dtype)
        rows = self._generate(lambda **how: self.captioner.generate(pixels, **how), len(pairs.uids))
        texts = self._texts(pairs.web, rows)
        itm, itc = [], None
        for j in range(1 + self.captions):  # a forward scores one text an image
            ids, mask = self._ids([own[j] for own in texts])
            answers = self.filter(ids, pixels, attention_mask=mask)
            itm.append(answers.itm_score.softmax(dim=1)[:, 1])
        ids, mask = self._ids([text for own in texts for text in own])
        answers = self.filter(ids, pixels, attention_mask=mask, use_itm_head=False)  # every image, every text
        itc = answers.itm_score.view(len(texts), len(texts), 1 + self.captions).diagonal().T
        return self._scored(texts, torch.stack(itm, dim=1), itc)

    def _generate(self, generate: Callable[..., Tensor], images: int) -> list[list[int]]:
        begin = torch.tensor([[self.tokenizer.dec, self.tokenizer.sep]]).repeat(images, 1)
        how: dict[str, Any] = {"max_length": self.decode.max_length, "min_length": self.decode.min_length}
        if self.decode.method == "nucleus":
            how |= {"do_sample": True, "top_p": self.decode.top_p, "top_k": 0}
        if self.captions > 1:
            how["num_return_sequences"] = self.captions
        rows: list[list[int]] = generate(input_ids=begin, num_beams=1, **how).tolist()
        return rows

    def _texts(self, web: Sequence[str], rows: Sequence[Sequence[int]]) -> list[list[str]]:
        written = [self.tokenizer.decode(row) for row in rows]
        each = self.captions
        return [[text, *written[i * each : (i + 1) * each]] for i, text in enumerate(web)]

    def _ids(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        ids, mask = self.tokenizer.encode([clean_caption(text) for text in texts], self.max_length)
        return torch.from_numpy(ids), torch.from_numpy(mask)

    def _scored(self, texts: list[list[str]], itm: Tensor, itc: Tensor) -> Scored:
        columns = zip(texts, itm.tolist(), itc.tolist(), strict=True)
        return [list(zip(*own, strict=True)) for own in columns]


@dataclass(frozen=True)
class ByHand(Theirs):
    """transformers' parts: each vision tower looks once."""

    shared: bool = False

    def annotate(self, pairs: Pairs) -> Scored:
        pixels = pairs.pixels.to(self.captioner.dtype)
        seen = self.captioner.vision_model(pixels).last_hidden_state
        sep, pad = self.tokenizer.sep, self.tokenizer.pad

        def generate(input_ids: Tensor, **how: Any) -> Tensor:
            written: Tensor = self.captioner.text_decoder.generate(
                input_ids=input_ids[:, :-1],
                eos_token_id=sep,
                pad_token_id=pad,
                encoder_hidden_states=seen,
                encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long),
                **how,
            )
            return written

        texts = self._texts(pairs.web, self._generate(generate, len(pairs.uids)))
        if not self.shared:
            seen = self.filter.vision_model(pixels).last_hidden_state
        ids, mask = self._ids([text for own in texts for text in own])
        beside = seen.repeat_interleave(1 + self.captions, dim=0)
        fused = self.filter.text_encoder(ids, attention_mask=mask, encoder_hidden_states=beside).last_hidden_state
        itm = self.filter.itm_head(fused[:, 0]).softmax(dim=1)[:, 1].view(len(texts), -1)
        alone = self.filter.text_encoder(ids, attention_mask=mask).last_hidden_state
        text = normalize(self.filter.text_proj(alone[:, 0]), dim=-1).view(len(texts), 1 + self.captions, -1)
        itc = (text @ normalize(self.filter.vision_proj(seen[:, 0]), dim=-1)[:, :, None])[:, :, 0]
        return self._scored(texts, itm, itc)


def models(architecture: BlipConfig, shared: bool) -> tuple[Blip, Blip]:
    """Our captioner and filter with random weights; ITM reads behind [CLS], as transformers does."""
    made = []
    for seed, role in enumerate(("decoder", "encoder")):
        torch.manual_seed(seed)
        text = architecture.text.model_copy(update={"roles": (role,)})
        made.append(Blip(architecture.model_copy(update={"text": text, "itm_token": "cls"})).eval())
    if shared:
        made[1].vision.load_state_dict(made[0].vision.state_dict())
        for one, two in zip(made[0].text.layers, made[1].text.layers, strict=True):
            two.cross_attention.load_state_dict(one.cross_attention.state_dict())
    return made[0], made[1]


def competitors(
    architecture: BlipConfig, shared: bool, decode: DecodeConfig, captions: int
) -> dict[str, Ours | Theirs]:
    """The same two models three times, in fp32."""
    tokenizer = made_up_words(architecture.text.vocab_size)
    captioner_model, filter_model = models(architecture, shared)
    special = {"pad": tokenizer.pad, "sep": tokenizer.sep}
    theirs: list[Any] = []
    for model, kind in ((captioner_model, BlipForConditionalGeneration), (filter_model, BlipForImageTextRetrieval)):
        with tempfile.TemporaryDirectory() as folder:
            store.save_hf(model, Path(folder), special)
            theirs.append(kind.from_pretrained(folder).eval())
    captioner, filter_ = (LocalModel(model, tokenizer) for model in (captioner_model, filter_model))
    engine = Annotator(LocalCaptioner(captioner, decode, captions), FusionFilter(filter_), Phases(CPU))
    assert engine.shared_context == shared
    return {
        "transformers": Theirs(theirs[0], theirs[1], tokenizer, decode, captions),
        "by hand": ByHand(theirs[0], theirs[1], tokenizer, decode, captions, shared=shared),
        "capfilt": Ours(engine),
    }


@dataclass(frozen=True)
class Entry:
    """A competitor in a number format."""

    one: Ours | Theirs
    format: str
    """fp32 | bf16 (autocast) | bf16 weights"""

    def annotate(self, pairs: Pairs) -> Scored:
        with autocast(CPU, torch.bfloat16 if self.format == "bf16" else torch.float32):
            return self.one.annotate(pairs)


def entries(every: dict[str, Ours | Theirs], without: Sequence[str]) -> dict[str, Entry]:
    """Each competitor in each format, by both names."""
    field = {}
    for name, one in every.items():
        if name in without:
            continue
        field |= {f"{name} {format_}": Entry(one, format_) for format_ in ("fp32", "bf16")}
        if isinstance(one, Theirs):
            weights = {role: deepcopy(getattr(one, role)).to(torch.bfloat16) for role in ("captioner", "filter")}
            field[f"{name} bf16 weights"] = Entry(replace(one, **weights), "bf16 weights")
    return {name: entry for name, entry in field.items() if name not in without}


def pairs(count: int, architecture: BlipConfig) -> Pairs:
    """Random pictures, and texts of 4 to 16 words of one token."""
    random = np.random.default_rng(0)
    size, words = architecture.vision.image_size, architecture.text.vocab_size - 7
    web = [" ".join(map(word, random.integers(0, words, random.integers(4, 17)))) for _ in range(count)]
    pixels = torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))
    return Pairs(pixels, [f"{i:032x}" for i in range(count)], web)


@torch.inference_mode()
def check(architecture: BlipConfig, shared: bool, tokens: int, asked: Pairs) -> float:
    """Refuse to time what does not do the same: greedy captions must be equal; returns the largest score difference."""
    decode = DecodeConfig(method="greedy", min_length=tokens, max_length=tokens + 1)
    answers = {name: one.annotate(asked) for name, one in competitors(architecture, shared, decode, 1).items()}
    far = 0.0
    for name, annotated_texts in answers.items():
        for own, wanted in zip(annotated_texts, answers["capfilt"], strict=True):
            assert [text for text, *_ in own] == [text for text, *_ in wanted], f"{name} writes otherwise"
            mine, others = (np.array([scores for _, *scores in texts]) for texts in (wanted, own))
            far = max(far, float(np.abs(mine - others).max()))
    assert far < 1e-4, f"scores are {far} apart"
    return far


Seconds = dict[str, list[float]]
"""Of each competitor, one figure a turn."""


@torch.inference_mode()
def measure(options: argparse.Namespace, architecture: BlipConfig) -> tuple[Seconds, Seconds, Seconds]:
    """Seconds by the clock and of processor time, in turns, and capfilt's of processor time by phase; the first turn is
    for warming up."""
    decode = DecodeConfig(method=options.method, min_length=options.tokens, max_length=options.tokens + 1)
    asked = pairs(options.images, architecture).batches(options.batch_size)
    field = entries(competitors(architecture, options.shared, decode, options.captions), options.without)
    took: Seconds = {name: [] for name in field}
    worked: Seconds = {name: [] for name in field}
    phases: Seconds = {}
    for turn in range(options.repeats + 1):
        for name, entry in field.items():
            before = time.process_time()
            spent = speed.seconds(CPU, lambda entry=entry: [entry.annotate(batch) for batch in asked])
            if turn:
                took[name].append(spent)
                worked[name].append(time.process_time() - before)
            if isinstance(entry.one, Ours):
                assert isinstance(entry.one.annotator.timer, Phases)
                for phase, seconds in entry.one.annotator.timer.take().items():
                    phases.setdefault(f"{name} {phase}", []).extend([seconds] if turn else [])
    return took, worked, phases


def rates(seconds: Seconds, images: int) -> dict[str, Any]:
    """Images per second, and how many times the others' that capfilt's is: in each format, and each at its best."""
    speeds = {name: images / statistics.median(times) for name, times in seconds.items()}
    best: dict[str, dict[str, float]] = {}
    for name, rate in speeds.items():
        one, format_ = name.split(" fp32")[0].split(" bf16")[0], "fp32" if name.endswith("fp32") else "bf16"
        for column in (format_, "best"):
            best.setdefault(column, {})[one] = max(rate, best.get(column, {}).get(one, 0.0))
    return {
        "images_per_second": speeds,
        "ratio": {
            f"capfilt / {one}, {column}": own["capfilt"] / rate
            for column, own in best.items()
            for one, rate in own.items()
            if one != "capfilt" and "capfilt" in own
        },
    }


def arguments() -> argparse.Namespace:
    """What is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="blip/small")
    parser.add_argument("--captions", type=int, default=1)
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=20)
    parser.add_argument("--method", choices=("nucleus", "greedy"), default="nucleus")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--shared", action="store_true", help="captioner and filter look through the same eyes")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--without", action="append", default=[], metavar="NAME", help="e.g. 'by hand', 'by hand fp32'")
    return parser.parse_args()


def main() -> None:
    """Check, measure, print the record."""
    options = arguments()
    torch.set_num_threads(options.threads)
    architecture = configs.read(presets.find("models", options.model), BlipConfig)
    far = check(architecture, options.shared, options.tokens, pairs(4, architecture))
    took, worked, phases = measure(options, architecture)
    record = {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "options": vars(options),
        "by_the_clock": rates(took, options.images),
        "by_processor_time": rates(worked, options.images),
        "score_difference": far,
        "phases_processor_ms_an_image": {
            name: 1000 * statistics.median(seconds) / options.images for name, seconds in phases.items()
        },
        "seconds": took,
        "processor_seconds": worked,
        "machine": speed.machine(CPU),
        "versions": {**speed.versions(), "transformers": version("transformers")},
    }
    sys.stdout.write(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
