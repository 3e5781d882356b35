"""Our ViLT beside transformers' own, random weights in both: how far apart every answer is. A part of docs/parity.md.

    python benchmarks/parity_vilt.py

The same comparisons are the tests of tests/models/vilt/test_parity.py; this prints what they measure.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from capfilt.models.checkpoints import store
from capfilt.models.vilt.checkpoint import CLASSES
from capfilt.models.vilt.config import ViltConfig
from capfilt.models.vilt.model import Vilt

LIMIT = 1e-5
SHAPES = ((32, 8, 32, 3, 2, 64), (96, 16, 48, 2, 3, 96))
"""image_size, patch_size, width, depth, heads, hidden."""
PICTURES = ((3, 5), (4, 2), (5, 3))
"""Height and width of each picture, in patches."""
LENGTHS = (7, 4, 9)


@dataclass(frozen=True)
class Pair:
    """One model twice: transformers' and ours."""

    theirs: Any
    ours: Vilt


def architecture(name: str, shape: int, eps: float = 1e-12) -> ViltConfig:
    """Our architecture of a class of transformers; `eps` is that of the blocks."""
    size, patch, width, depth, heads, hidden = SHAPES[shape]
    return ViltConfig.model_validate(
        {
            "vision": {
                "image_size": size,
                "patch_size": patch,
                "grid": size // patch,
                "width": width,
                "depth": depth,
                "heads": heads,
                "hidden": hidden,
                "dropout": 0.0,
                "layer_norm_eps": eps,
            },
            "text": {"vocab_size": 90, "width": width, "dropout": 0.0},
            "heads": CLASSES[name],
            "images": 2 if name == "ViltForImagesAndTextClassification" else 1,
            "labels": 5 if name.endswith(("Answering", "Classification")) else 0,
        }
    )


def scramble(model: nn.Module, seed: int) -> None:
    """Random weights of a size that lets every part matter."""
    draw = torch.Generator().manual_seed(seed)
    for name, weight in sorted(model.named_parameters()):
        noise = torch.randn(weight.shape, generator=draw)
        if weight.ndim < 2:
            weight.data.copy_(0.1 * noise + float(name.endswith("weight")))
        else:
            looked_up = any(word in name for word in ("embed", "words", "positions", "types", "modality", "cls"))
            weight.data.copy_(noise * (0.5 if looked_up else weight[0].numel() ** -0.5))


def theirs_to_ours(name: str, shape: int, folder: Path) -> Pair:
    """A model of transformers, saved by it and loaded here."""
    described = store.transformers_format(config := architecture(name, shape)).write(
        config, Vilt(config).state_dict(), {}
    )[0]
    theirs = getattr(transformers, name)(transformers.ViltConfig(**described))
    scramble(theirs, shape)
    theirs.eval().save_pretrained(folder)
    return Pair(theirs, store.load(store.find(str(folder))).eval())  # type: ignore[arg-type]


def ours_to_theirs(name: str, shape: int, folder: Path) -> Pair:
    """A model of ours, written here and opened by transformers, which must find every tensor and no other."""
    ours = Vilt(architecture(name, shape))
    scramble(ours, shape)
    store.save_hf(ours.eval(), folder, {})
    theirs, report = getattr(transformers, name).from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    return Pair(theirs.eval(), ours)


DIRECTIONS = {"in": theirs_to_ours, "out": ours_to_theirs}


def batch(config: ViltConfig, padded: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures [3, 4, H, W], of unequal shapes if `padded`, and texts of unequal lengths with their mask."""
    draw = torch.Generator().manual_seed(7)
    patch = config.patch_size
    shapes = PICTURES if padded else [(3, 4)] * 3
    images = torch.zeros(3, 4, max(h for h, _ in shapes) * patch, max(w for _, w in shapes) * patch)
    for image, (h, w) in zip(images, shapes, strict=True):
        image[:, : h * patch, : w * patch] = torch.randn(4, h * patch, w * patch, generator=draw)
        image[3, : h * patch, : w * patch] = 1
    ids = torch.randint(1, config.text.vocab_size, (3, max(LENGTHS)), generator=draw)
    mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).long()
    return images, ids * mask, mask


@torch.no_grad()
def compare(pair: Pair, padded: bool) -> dict[str, float]:
    """The largest difference of every answer.

    transformers takes the patches of the largest pictures in a random order: ours are chosen in that order.
    """
    theirs, ours = pair.theirs, pair.ours
    images, ids, mask = batch(ours.config, padded)
    name, count = type(theirs).__name__, ours.config.images
    base = getattr(theirs, "vilt", theirs)
    seen: list[Tensor] = []
    embed = base.embeddings.visual_embed

    def watched(*args: Any, **kwargs: Any) -> Any:
        out = embed(*args, **kwargs)
        seen.append(out[2][0][..., 0] * out[2][1][1] + out[2][0][..., 1])
        return out

    base.embeddings.visual_embed = watched
    pixels, where = images[:, :3], images[:, 3].long()
    inputs: dict[str, Tensor] = {"input_ids": ids, "attention_mask": mask}
    if count > 1:
        inputs |= {"pixel_values": torch.stack([pixels, -pixels], 1), "pixel_mask": torch.stack([where, where], 1)}
    else:
        inputs |= {"pixel_values": pixels, "pixel_mask": where}
    answer = theirs(**inputs)
    base.embeddings.visual_embed = embed
    states = []
    for number, chosen in enumerate(seen):
        pictures = torch.cat([images[:, :3] * (-1) ** number, images[:, 3:]], dim=1)
        context = ours.image_context(ours.encode_image(pictures, chosen, number + 1), "encoder")
        states.append(ours.fuse(ids, mask, context))
    far: dict[str, float] = {}
    if name == "ViltModel":
        there = torch.cat([mask.bool(), context.tensors[1]], dim=1)
        far["states of words and patches"] = _far(answer.last_hidden_state[there], states[0][there])
        far["pooled"] = _far(answer.pooler_output, ours.summary(states[0]))
        every = ours.fuse(ids, mask, ours.image_context(ours.encode_image(images), "encoder"))
        far["pooled, patches in their own order"] = _far(answer.pooler_output, ours.summary(every))
    elif name == "ViltForMaskedLM":
        far["words' logits"] = _far(
            answer.logits[mask.bool()], ours.guess_words(states[0][:, : ids.shape[1]])[mask.bool()]
        )
    elif name == "ViltForImageAndTextRetrieval":
        far["rank"] = _far(answer.logits[:, 0], ours.match(states[0])[:, 1])
    elif name == "ViltForTokenClassification":
        far["tokens' logits"] = _far(
            answer.logits[mask.bool()], ours.task_logits(states)[:, : ids.shape[1]][mask.bool()]
        )
    else:
        far["logits"] = _far(answer.logits, ours.task_logits(states))
    return far


def _far(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return float((a - b).abs().max())


def main() -> None:
    """Print the table."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    print("| class | weights | what | largest difference |\n|---|---|---|---|")
    for name in CLASSES:
        for direction, told in (("in", "theirs, loaded here"), ("out", "ours, opened there")):
            worst: dict[str, float] = {}
            for shape in range(len(SHAPES)):
                for padded in (False, True):
                    with tempfile.TemporaryDirectory() as folder:
                        far = compare(DIRECTIONS[direction](name, shape, Path(folder)), padded)
                    worst |= {what: max(value, worst.get(what, 0.0)) for what, value in far.items()}
            for what, value in worst.items():
                print(f"| {name} | {told} | {what} | {value:.1e} |")


if __name__ == "__main__":
    main()
