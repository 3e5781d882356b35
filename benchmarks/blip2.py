"""What a tiny BLIP-2 learns on the embedded world: stage 1 by its retrieval, stage 2 by its captions.

    capfilt bootstrap --rounds 1 --out runs/demo
    python benchmarks/blip2.py --tower runs/demo/round-1/pretrain/checkpoint --out runs/blip2

The eyes are those of the demo's BLIP, frozen; the language model is an OPT of two layers that has read the captions,
image by image, and seen none, frozen too (`--apart`: it read them one by one, without those of the same image beside).
Captions are written once beside the right images and once beside wrong ones: what the second lacks is what the language
model was told.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch

from capfilt import presets
from capfilt.data import shards
from capfilt.data.synthetic import world
from capfilt.evaluation.config import EvaluateConfig
from capfilt.evaluation.eval_set import EvalSet, encode_pairs
from capfilt.evaluation.evaluate import caption, retrieve
from capfilt.inference.captioners.local import LocalCaptioner
from capfilt.inference.config import DecodeConfig
from capfilt.inference.filters.fusion import FusionFilter
from capfilt.inference.local_model import LocalModel
from capfilt.models import read_architecture
from capfilt.pipelines.bootstrap.roles.taught import documents
from capfilt.training.config import TeachConfig
from capfilt.training.language_model import teach

IMAGES = 250


CPU = torch.device("cpu")


def eval_set(local: LocalModel, folder: Path) -> EvalSet:
    """The images of a folder as the model encodes them, with their texts."""
    return encode_pairs(local, shards.expand(str(folder)), 64, CPU)


def pretrain(recipe: str, out: Path, **sets: object) -> Path:
    """Run `capfilt pretrain` and return the folder of the model."""
    words = [word for key, value in sets.items() for word in ("--set", f"{key.replace('__', '.')}={value}")]
    command = [sys.executable, "-m", "capfilt", "pretrain", recipe, "--out", str(out), *words, "--address", "local"]
    subprocess.run(command, check=True)
    return out / "pretrain" / "checkpoint"


def main() -> None:
    """Train both stages and print what they can."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tower", type=Path, required=True, help="a BLIP whose eyes are taken")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--images", type=int, default=2000, help="clean images to learn from")
    parser.add_argument("--steps", type=int, default=400, help="of each stage")
    parser.add_argument("--apart", action="store_true", help="teach the language model one caption at a time")
    asked = parser.parse_args()
    out: Path = asked.out
    settings = world.WorldConfig(web=0, human=asked.images, val=0, test=IMAGES)
    for split in ("human", "test"):
        world.write(settings, 0, out / "data", split)
    human, test = out / "data" / "human", out / "data" / "test"
    config = read_architecture(presets.find("models", "blip2/tiny-opt"))
    assert config.family == "blip2"
    assert config.language is not None
    read = list(documents(shards.expand(str(human))))
    read = [[text] for document in read for text in document] if asked.apart else read
    loss = teach(out / "language", config.language, read, TeachConfig(), seed=0)
    print(f"language model: {loss:.3f} nats a token")
    common = {"data": human, "train__steps": asked.steps, "resources__workers": 1, "train__features": out / "features"}
    first = pretrain("blip2-tiny-stage1", out / "stage1", initial__vision=asked.tower, **common)
    local = LocalModel.load(first, CPU)
    figures = {"stage 1": retrieve(FusionFilter(local), eval_set(local, test), EvaluateConfig())}
    second = pretrain(
        "blip2-tiny-stage2",
        out / "stage2",
        start=first,
        tokenizer=out / "language",
        initial__language=out / "language",
        **common,
    )
    local = LocalModel.load(second, CPU)
    pairs = eval_set(local, test)
    captioner = LocalCaptioner(local, DecodeConfig(method="greedy", min_length=3, max_length=40))
    for name, shift in (("right", 0), ("wrong", IMAGES // 2)):
        shifted = replace(pairs, tokens=pairs.tokens.roll(shift, dims=0))
        figures[f"stage 2, {name} images"] = caption(captioner, shifted, 64)
        print(f"beside the {name} image:", *captioner.write(shifted.tokens[:1], pairs.uids[:1])[0])
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
