"""capfilt's annotator beside transformers' BLIP on one GPU, the same weights, pictures and texts in both: images/s.

    python benchmarks/annotate_gpu.py --batches 16,64,256
    python benchmarks/annotate_gpu.py --model blip/small --image-size 224 --batches 4 --images 8   # tried on a CPU

As benchmarks/annotate.py, which it takes its competitors from: each captions every picture and scores the captions and
one web text. transformers is held in bf16 throughout, its fastest way; capfilt computes as `annotate` does with
precision=bf16. What share of greedy captions the two write alike in fp32 is printed beside the rates. The floor is the
arithmetic of the models at the rate of this GPU's largest product (docs/cost.md), so no program could be faster.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from annotate import ByHand, Ours, Pairs, Scored, Theirs, models, pairs
from torch import Tensor
from transformers import BlipForConditionalGeneration, BlipForImageTextRetrieval

from capfilt import presets
from capfilt.evaluation import speed
from capfilt.inference.annotator import Annotator
from capfilt.inference.captioners.local import LocalCaptioner
from capfilt.inference.config import DecodeConfig
from capfilt.inference.device import autocast, local_device
from capfilt.inference.filters.fusion import FusionFilter
from capfilt.inference.local_model import LocalModel
from capfilt.models import BlipConfig, read_architecture
from capfilt.models.checkpoints import store
from capfilt.pipelines.bench.floor import AnnotateLoad, MachineRate, annotate_flops
from capfilt.pipelines.bench.made_up import made_up_words

Field = dict[str, "Ours | Theirs | AutocastOurs"]


class OnDevice(Theirs):
    """transformers with everything that it makes on the models' device."""

    def annotate(self, asked: Pairs) -> Scored:
        with torch.device(self.filter.device):
            found: Scored = super().annotate(_typed(asked, self.filter.dtype))
        return found

    def _ids(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        ids, mask = super()._ids(texts)
        return ids.to(self.filter.device), mask.to(self.filter.device)


class ByHandOnDevice(OnDevice, ByHand):
    """The parts shared by hand, likewise."""


@dataclass(frozen=True)
class AutocastOurs(Ours):
    """capfilt in a format, as a worker computes."""

    device: torch.device
    dtype: torch.dtype

    def annotate(self, asked: Pairs) -> Scored:
        with autocast(self.device, self.dtype) if self.dtype != torch.float32 else contextlib.nullcontext():
            return super().annotate(asked)


def _typed(asked: Pairs, dtype: torch.dtype) -> Pairs:
    return Pairs(asked.pixels.to(dtype), asked.uids, asked.web)


@dataclass(frozen=True)
class Saved:
    """Two models with random weights as folders, in our layout and the public one; made once, which takes longest."""

    folder: Path
    architecture: BlipConfig
    shared: bool
    device: torch.device

    def make(self) -> None:
        """Write them."""
        tokenizer = made_up_words(self.architecture.text.vocab_size)
        with torch.device(self.device):  # a GPU draws the weights of a BLIP-base in no time
            made = models(self.architecture, self.shared)
        for number, model in enumerate(made):
            store.save_hf(model, self.folder / f"public-{number}", {"pad": tokenizer.pad, "sep": tokenizer.sep})
            store.save(model, self.folder / f"own-{number}")
            tokenizer.save(self.folder / f"own-{number}")

    def competitors(self, decode: DecodeConfig, captions: int, dtype: torch.dtype) -> Field:
        """The same two models three times, on the device."""
        theirs, ours = [], []
        for number, kind in enumerate((BlipForConditionalGeneration, BlipForImageTextRetrieval)):
            public = kind.from_pretrained(self.folder / f"public-{number}", dtype=dtype)
            theirs.append(public.eval().to(self.device))
            ours.append(LocalModel.load(self.folder / f"own-{number}", self.device, dtype))
        engine = Annotator(LocalCaptioner(ours[0], decode, captions), FusionFilter(ours[1]))
        assert engine.shared_context == self.shared
        tokenizer = ours[0].tokenizer
        return {
            "transformers": OnDevice(theirs[0], theirs[1], tokenizer, decode, captions),
            "by hand": ByHandOnDevice(theirs[0], theirs[1], tokenizer, decode, captions, shared=self.shared),
            "capfilt": AutocastOurs(engine, self.device, dtype),
        }


@torch.inference_mode()
def check(saved: Saved, tokens: int) -> dict[str, float]:
    """The share of greedy captions that transformers and capfilt write alike in fp32, and how far their scores are
    apart where they do."""
    decode = DecodeConfig(method="greedy", min_length=tokens, max_length=tokens + 1)
    asked = _on(pairs(16, saved.architecture), saved.device)
    every = saved.competitors(decode, 1, torch.float32)
    mine, others = every["capfilt"].annotate(asked), every["transformers"].annotate(asked)
    both = [(a, b) for own, other in zip(mine, others, strict=True) for a, b in zip(own, other, strict=True)]
    alike = [(a, b) for a, b in both if a[0] == b[0]]
    far = max(abs(x - y) for a, b in alike for x, y in zip(a[1:], b[1:], strict=True))
    return {"same_texts": len(alike) / len(both), "score_difference": far}


def _on(asked: Pairs, device: torch.device) -> Pairs:
    return Pairs(asked.pixels.to(device), asked.uids, asked.web)


@torch.inference_mode()
def measure(options: argparse.Namespace, saved: Saved, dtype: torch.dtype) -> dict[str, Any]:
    """Images/s by batch size, medians of turns; the first turn is for warming up."""
    decode = DecodeConfig(method=options.method, min_length=options.tokens, max_length=options.tokens + 1)
    architecture, device = saved.architecture, saved.device
    field = saved.competitors(decode, options.captions, dtype)
    load = AnnotateLoad(
        architecture, architecture, *(2 * [options.shared]), *(2 * [options.captions]), *(2 * [options.tokens])
    )
    flops, rate_of_machine = sum(annotate_flops(load).values()), MachineRate(device, dtype)
    found: dict[str, Any] = {}
    for size in map(int, options.batches.split(",")):
        asked = _on(pairs(max(size, options.images), architecture), device).batches(size)
        images = sum(len(batch.uids) for batch in asked)
        took: dict[str, list[float]] = {name: [] for name in field if name not in options.without}
        for turn in range(options.repeats + 1):
            for name in took:
                spent = speed.seconds(device, partial(_annotate, field[name], asked))
                took[name] += [spent] if turn else []
        rate = {name: images / statistics.median(times) for name, times in took.items()}
        rate_of_machine.measure()
        most = rate_of_machine.flops / flops
        ratios = {f"capfilt / {name}": rate["capfilt"] / other for name, other in rate.items() if name != "capfilt"}
        found[str(size)] = {"images_per_second": rate, **ratios, "floor": most, "share": rate["capfilt"] / most}
        sys.stderr.write(f"batch {size}: {json.dumps(found[str(size)])}\n")
    return found


def _annotate(one: Ours | Theirs | AutocastOurs, batches: list[Pairs]) -> None:
    for batch in batches:
        one.annotate(batch)


def arguments() -> argparse.Namespace:
    """What is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="blip/base")
    parser.add_argument("--image-size", type=int, default=384)
    parser.add_argument("--captions", type=int, default=1)
    parser.add_argument("--images", type=int, default=128, help="at least so many, or one batch")
    parser.add_argument("--batches", default="16,64,256")
    parser.add_argument("--tokens", type=int, default=20)
    parser.add_argument("--method", choices=("nucleus", "greedy"), default="nucleus")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--shared", action="store_true", help="one vision tower for captioner and filter")
    parser.add_argument("--without", action="append", default=[], metavar="NAME", help="e.g. 'by hand'")
    return parser.parse_args()


def main() -> None:
    """Check, measure, print the record."""
    options = arguments()
    device = torch.device(local_device())
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    sizes = [f"vision.image_size={options.image_size}"]
    architecture = read_architecture(presets.find("models", options.model), sizes)
    assert isinstance(architecture, BlipConfig), "transformers has BLIP's counterpart alone"
    with tempfile.TemporaryDirectory() as folder:
        saved = Saved(Path(folder), architecture, options.shared, device)
        saved.make()
        checked, measured = check(saved, options.tokens), measure(options, saved, dtype)
    record = {
        "options": vars(options),
        "against_transformers_in_fp32": checked,
        "by_batch": measured,
        "machine": speed.machine(device),
        "torch": torch.__version__,
    }
    sys.stdout.write(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
