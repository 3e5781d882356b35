"""Our CLIP beside transformers' own, random weights in both: how far apart every answer is. Writes its section of
docs/parity.md.

    python benchmarks/parity_clip.py

The same comparisons are the tests of tests/models/clip/test_parity.py; this prints what they measure.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import CLIPConfig as HfConfig
from transformers import CLIPModel

from capfilt.models.checkpoints import store
from capfilt.models.clip.model import Clip
from capfilt.objectives.losses.info_nce import info_nce

LIMIT = 1e-5
HEADING = "## CLIP"
SHAPES = (
    {"vision": (32, 8, 24, 2, 3, 48), "text": (16, 2, 2, 40), "act": "quick_gelu", "projection": 12},
    {"vision": (64, 16, 64, 3, 4, 256), "text": (48, 4, 3, 96), "act": "gelu", "projection": 32},
)
"""image_size, patch_size, width, depth, heads, hidden; and width, depth, heads, hidden."""
WORDS, TOKENS = 120, 20


@dataclass(frozen=True)
class Pair:
    """The same model twice."""

    theirs: CLIPModel
    ours: Clip


def hf_config(shape: dict[str, Any]) -> HfConfig:
    """transformers' description of a small model."""
    image_size, patch_size, *vision = shape["vision"]
    keys = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    act = {"hidden_act": shape["act"]}
    sizes = {"image_size": image_size, "patch_size": patch_size}
    ends = {
        "vocab_size": WORDS,
        "max_position_embeddings": TOKENS,
        "bos_token_id": WORDS - 2,
        "eos_token_id": WORDS - 1,
    }
    return HfConfig(
        vision_config={**dict(zip(keys, vision, strict=True)), **sizes, **act},
        text_config={**dict(zip(keys, shape["text"], strict=True)), **ends, **act},
        projection_dim=shape["projection"],
    )


def noisy(model: nn.Module) -> None:
    """Move every weight, norms and biases too, so that none could be anything."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)


def theirs_to_ours(shape: dict[str, Any], folder: Path) -> Pair:
    """A model of transformers, saved and loaded here."""
    theirs = CLIPModel(hf_config(shape)).eval()
    noisy(theirs)
    theirs.save_pretrained(folder)
    ours = store.load(folder).eval()
    assert isinstance(ours, Clip)
    return Pair(theirs, ours)


def ours_to_theirs(shape: dict[str, Any], folder: Path) -> Pair:
    """A model of ours, exported and opened by transformers."""
    first = theirs_to_ours(shape, folder / "first").ours
    noisy(first)
    (folder / "second").mkdir()
    store.save_hf(first, folder / "second", {"pad": 0, "sep": WORDS - 1})
    return Pair(CLIPModel.from_pretrained(folder / "second").eval(), first)


DIRECTIONS = {"in": theirs_to_ours, "out": ours_to_theirs}
TITLES = {"in": "theirs, loaded here", "out": "ours, opened there"}


def batch(image_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures, and texts of several lengths, padded with 0."""
    torch.manual_seed(2)
    ids = torch.zeros(5, TOKENS, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, length in enumerate((2, 5, 9, 14, TOKENS)):
        ids[row, :length] = torch.randint(1, WORDS - 2, (length,))
        ids[row, 0], ids[row, length - 1], mask[row, :length] = WORDS - 2, WORDS - 1, 1
    return torch.randn(5, 3, image_size, image_size), ids, mask


@torch.no_grad()
def compare(pair: Pair) -> dict[str, float]:
    """The largest difference of each answer; theirs reads a mask, ours the padding."""
    pictures, ids, mask = batch(pair.ours.config.image_size)
    out = pair.theirs(input_ids=ids, attention_mask=mask, pixel_values=pictures, return_loss=True)
    ours = pair.ours
    image, text = ours.project_image(ours.encode_image(pictures)), ours.project_text(ours.encode_text(ids, mask))
    tokens = pair.theirs.vision_model.post_layernorm(out.vision_model_output.last_hidden_state)
    scale = ours.logit_scale.exp()
    return {
        "image tokens": far(tokens, ours.vision(pictures)),
        "text states": far(out.text_model_output.last_hidden_state * mask[..., None], ours.text(ids) * mask[..., None]),
        "image projection": far(out.image_embeds, image),
        "text projection": far(out.text_embeds, text),
        "logits": far(out.logits_per_image, scale * ours.similarity(image, text)),
        "loss": far(out.loss, info_nce(image, text, scale).loss),
    }


def far(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def section() -> str:
    """The section of docs/parity.md."""
    rows = []
    for direction, make in DIRECTIONS.items():
        worst: dict[str, float] = {}
        for shape in SHAPES:
            with tempfile.TemporaryDirectory() as folder:
                for what, difference in compare(make(shape, Path(folder))).items():
                    worst[what] = max(worst.get(what, 0.0), difference)
        rows += [f"| CLIPModel | {TITLES[direction]} | {what} | {value:.1e} |" for what, value in worst.items()]
    made = f"{datetime.now(UTC):%Y-%m-%d}"
    versions = f"transformers {transformers.__version__}, torch {torch.__version__}, Python {platform.python_version()}"
    table = "\n".join(["| class | weights | what | largest difference |", "|---|---|---|---|", *rows])
    return f"""{HEADING}

Two sizes of model, one of QuickGELU and one of GELU, texts padded with 0; the tests ask for {LIMIT}:
`tests/models/clip/test_parity.py`.

Measured {made} with {versions}:

    python benchmarks/parity_clip.py

{table}

Tokens are those of transformers' `CLIPTokenizer` (`tests/data/text/test_byte_bpe.py`). What differs on purpose:

- OpenAI's code runs ftfy over a text, transformers and capfilt do not; character references (`&amp;`) are resolved as
  in OpenAI's code, and not in transformers.
- "<|endoftext|>" written in a text is ordinary characters here; both other codes end the text there.
- A picture is cut at `(long - short) // 2`, as in transformers; torchvision, which OpenAI and open_clip use, rounds.
- The ViT's fresh weights are drawn as transformers draws them; OpenAI's code leaves them to torch's defaults.
- An export by OpenAI's names (`--as pth`) is a state dict, which `clip.load` and open_clip read, and no TorchScript.
"""


def main() -> None:
    """Measure, and write the section."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", type=Path, default=Path(__file__).parent.parent / "docs" / "parity.md")
    page: Path = parser.parse_args().page
    torch.set_num_threads(1)
    above, _, below = page.read_text().partition(f"\n{HEADING}\n")
    _, mark, others = below.partition("\n## ")  # sections that no script writes stay
    page.write_text(above.rstrip() + "\n\n" + section() + mark + others)


if __name__ == "__main__":
    main()
