"""Our BLIP-2 beside transformers' own, random weights in both: how far apart every answer is. Ends docs/parity.md.

    python benchmarks/parity_blip2.py

The same comparisons are the tests of tests/models/blip2/test_parity.py; this prints what they measure.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import Blip2Config as HfConfig
from transformers import Blip2ForConditionalGeneration, Blip2ForImageTextRetrieval

from capfilt.models import Blip2, Blip2Config
from capfilt.models.blip2.config import LanguageConfig, QFormerConfig
from capfilt.models.blip2.transformers_config import describe
from capfilt.models.checkpoints import store
from capfilt.models.layers.config import VisionConfig

LIMIT = 1e-4
HEADING = "## BLIP-2"
CLASSES = {"Blip2ForImageTextRetrieval": Blip2ForImageTextRetrieval, "opt": Blip2ForConditionalGeneration}
CLASSES["t5"] = Blip2ForConditionalGeneration
TITLES = {
    "Blip2ForImageTextRetrieval": "Blip2ForImageTextRetrieval",
    "opt": "Blip2ForConditionalGeneration, OPT",
    "t5": "Blip2ForConditionalGeneration, T5",
}
SHAPES = (
    {"vision": (64, 32, 24, 1, 2, 48), "text": (16, 1, 2, 32, 3)},
    {"vision": (112, 14, 48, 2, 3, 96), "text": (64, 4, 4, 128, 8)},
)
"""image_size, patch_size, width, depth, heads, hidden; and width, depth, heads, hidden, queries."""
LANGUAGE: dict[str, dict[str, Any]] = {
    "opt": {
        "hidden_size": 32,
        "word_embed_proj_dim": 32,
        "ffn_dim": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 120,
        "max_position_embeddings": 64,
    },
    "t5": {
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 64,
        "num_layers": 2,
        "num_heads": 4,
        "vocab_size": 120,
        "feed_forward_proj": "gated-gelu",
        "dense_act_fn": "gelu",
        "decoder_start_token_id": 0,
    },
}


@dataclass(frozen=True)
class Pair:
    """One model twice: transformers' and ours."""

    theirs: Any
    ours: Blip2


def architecture(name: str, shape: int) -> Blip2Config:
    """Our architecture of a class of transformers; `name` is a class or the kind of a language model."""
    size, patch, width, depth, heads, hidden = SHAPES[shape]["vision"]
    vision = VisionConfig(
        image_size=size,
        patch_size=patch,
        width=width,
        depth=depth,
        heads=heads,
        hidden=hidden,
        key_bias=False,
        final_norm=False,
    )
    wide, layers, split, inner, queries = SHAPES[shape]["text"]
    text = QFormerConfig(
        vocab_size=90, width=wide, depth=layers, heads=split, hidden=inner, queries=queries, max_positions=40
    )
    language = LanguageConfig(kind=name, settings=LANGUAGE[name]) if name in LANGUAGE else None  # type: ignore[arg-type]
    roles = () if language else ("encoder",)
    return Blip2Config(
        vision=vision,
        text=text.model_copy(update={"roles": roles}),
        projection=24,
        language=language,
        frozen="fp32",
    )


def scramble(model: nn.Module, seed: int) -> None:
    """Random weights of a size that lets every part matter."""
    draw = torch.Generator().manual_seed(seed)
    for name, weight in sorted(dict(model.named_parameters()).items()):
        noise = torch.randn(weight.shape, generator=draw)
        if weight.ndim < 2:
            weight.data.copy_(0.1 * noise + float(name.endswith("weight") or weight.ndim == 0))
        else:
            looked_up = any(
                word in name for word in ("embed", "words", "positions", "vision.cls", "shared", "query_tok")
            )
            weight.data.copy_(noise * (0.2 if looked_up else weight[0].numel() ** -0.5))


def theirs_to_ours(name: str, shape: int, folder: Path) -> Pair:
    """A model of transformers, saved by it and loaded here."""
    torch.manual_seed(shape)
    described = describe(architecture(name, shape), 0.07)
    theirs = CLASSES[name](HfConfig(**{key: value for key, value in described.items() if key != "architectures"}))
    scramble(theirs, shape)
    theirs.eval().save_pretrained(folder)
    return Pair(theirs, store.load(store.find(str(folder))).eval())


def ours_to_theirs(name: str, shape: int, folder: Path) -> Pair:
    """A model of ours, written here and opened by transformers, which must find every tensor and no other."""
    torch.manual_seed(shape)
    ours = Blip2(architecture(name, shape))
    scramble(ours, shape)
    store.save_hf(ours.eval(), folder, {})
    theirs, told = CLASSES[name].from_pretrained(folder, output_loading_info=True)
    assert not any(told.values()), told
    return Pair(theirs.eval(), ours)


DIRECTIONS = {"in": theirs_to_ours, "out": ours_to_theirs}
Answers = dict[str, tuple[Tensor, Tensor]]


@torch.no_grad()
def compare(pair: Pair) -> dict[str, float]:
    """The largest difference of every answer."""
    theirs, ours = pair.theirs, pair.ours
    draw = torch.Generator().manual_seed(7)
    size, lengths = ours.config.vision.image_size, (7, 4, 9)
    pixels = torch.randn(3, 3, size, size, generator=draw)
    ids = torch.randint(5, 88, (3, 9), generator=draw)
    mask = (torch.arange(9) < torch.tensor(lengths)[:, None]).long()
    seen = theirs.vision_model(pixels).last_hidden_state
    queries = theirs.qformer(query_embeds=theirs.query_tokens.expand(3, -1, -1), encoder_hidden_states=seen)
    tokens = ours.encode_image(pixels)
    states, _ = ours.text.run_queries(ours.text.image_context(tokens))
    answers: Answers = {"image tokens": (seen, tokens), "query states": (queries.last_hidden_state, states)}
    ids = ids.masked_fill(mask == 0, 1 if ours.config.language and ours.config.language.kind == "opt" else 0)
    told = writer if ours.config.language else judge
    answers |= told(theirs, ours, pixels, ids, mask, tokens, queries.last_hidden_state)
    return {what: float((a - b).abs().max()) for what, (a, b) in answers.items()}


def judge(
    theirs: Any, ours: Blip2, pixels: Tensor, ids: Tensor, mask: Tensor, tokens: Tensor, queries: Tensor
) -> Answers:
    """What a filter answers: the projections, ITC, and ITM of padded pairs."""
    compared = theirs(pixels, ids, mask, use_image_text_matching_head=False)
    matched = theirs(pixels, ids, mask, use_image_text_matching_head=True)
    image, text = ours.project_image(tokens), ours.project_text(ours.encode_text(ids, mask))
    fused = ours.fuse(ids, mask, ours.image_context(tokens, "encoder"))
    width = ours.config.text.queries
    return {
        "text states": (compared.text_model_output.last_hidden_state, ours.encode_text(ids, mask)),
        "image projection": (normalize(theirs.vision_projection(queries), dim=-1), image),
        "text projection": (compared.text_embeds, text),
        "ITC cosines": (compared.logits_per_image, ours.similarity(image, text)),
        "fused states": (matched.text_model_output.last_hidden_state[:, :width], fused),
        "ITM logits": (matched.logits_per_image, ours.match(fused)),
    }


def writer(
    theirs: Any, ours: Blip2, pixels: Tensor, ids: Tensor, mask: Tensor, tokens: Tensor, queries: Tensor
) -> Answers:
    """What a captioner answers: the logits of padded texts, and those of the first step of a generation."""
    language = ours.config.language
    assert language is not None
    places = torch.full((3, ours.config.text.queries), language.for_images)
    prompt = 2 if language.kind == "t5" else 0
    end = torch.ones_like(ids[:, :1])  # T5's tokenizer sets it behind a prompt
    seen = ours.image_context(tokens, "decoder", () if language.kind == "opt" else ids[0, :prompt].tolist())
    logits, _ = ours.predict(tokens, ids, mask, prompt)
    if language.kind == "opt":
        every = theirs(
            pixels, torch.cat([places, ids], dim=1), attention_mask=torch.cat([torch.ones_like(places), mask], dim=1)
        ).logits[:, places.shape[1] - 1 : -1]
        first = ids[:, :1]
    else:
        begin = torch.cat([torch.zeros_like(ids[:, :1]), ids[:, prompt:-1]], dim=1)
        asked_of = torch.cat([places, ids[:, :prompt], end], dim=1)
        every = theirs(pixels, asked_of, decoder_input_ids=begin).logits
        first = torch.zeros_like(ids[:, :1])
    asked = mask[:, prompt:, None]
    step = ours.decode_step(first, seen, ours.cache(3, 9, seen))
    read = first if language.kind == "opt" else torch.cat([ids[:1, :prompt].expand(3, -1), end], dim=1)
    where = torch.cat([places, read], dim=1)
    kind = {"decoder_input_ids": first} if language.kind == "t5" else {}
    return {
        "projected queries": (theirs.language_projection(queries), ours.language_projection(queries)),
        "LM logits": (every * asked, logits * asked),
        "LM logits, one step": (theirs(pixels, where, **kind).logits[:, -1], step),
    }


def measured() -> Iterator[tuple[str, str, str, str]]:
    """The rows of the table: class, direction, what, difference."""
    for name, title in TITLES.items():
        for direction, make in DIRECTIONS.items():
            worst: dict[str, float] = {}
            for shape in range(len(SHAPES)):
                with tempfile.TemporaryDirectory() as folder:
                    for what, far in compare(make(name, shape, Path(folder))).items():
                        worst[what] = max(worst.get(what, 0.0), far)
            arrow = "theirs, loaded here" if direction == "in" else "ours, opened there"
            yield from ((title, arrow, what, f"{far:.1e}") for what, far in worst.items())


def section() -> str:
    """The end of docs/parity.md."""
    rows = "\n".join(f"| {' | '.join(row)} |" for row in measured())
    versions = f"transformers {transformers.__version__}, torch {torch.__version__}, Python {platform.python_version()}"
    return f"""{HEADING}

As above, two sizes of model, padded texts; the tests ask for {LIMIT:g}: `tests/models/blip2/test_parity.py`.

Measured {datetime.now(UTC):%Y-%m-%d} with {versions}:

    python benchmarks/parity_blip2.py

| class | weights | what | largest difference |
|---|---|---|---|
{rows}

What has no place in transformers' classes: the head that writes in stage 1 (ITG), which an export leaves out, and the
temperature of ITC, which travels in `itc_temperature`.
"""


def main() -> None:
    """Measure, and write the section."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", type=Path, default=Path(__file__).parent.parent / "docs" / "parity.md")
    page: Path = parser.parse_args().page
    torch.set_num_threads(1)
    above, _, below = page.read_text().partition(HEADING)
    _, mark, others = below.partition("\n## ")  # sections that no script writes stay
    page.write_text(above.rstrip() + "\n\n" + section() + mark + others)


if __name__ == "__main__":
    main()
