"""Our BLIP beside transformers' own, random weights in both: how far apart every answer is. Writes docs/parity.md.

    python benchmarks/parity.py

The same comparisons are the tests of tests/models/blip/test_parity.py; this prints what they measure.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers.models.blip.configuration_blip import BlipConfig as HfConfig
from transformers.models.blip.modeling_blip import (
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipForQuestionAnswering,
)

from capfilt.inference.config import DecodeConfig
from capfilt.inference.generation.beam import beam_search
from capfilt.inference.generation.decode import generate
from capfilt.models import Blip, BlipConfig
from capfilt.models.blip.transformers_config import ROLES
from capfilt.models.checkpoints import store
from capfilt.models.layers.config import TextConfig, VisionConfig

LIMIT = 1e-5
PAD, CLS, SEP = 0, 2, 3
SPECIAL = {"pad": PAD, "sep": SEP}
CLASSES = {
    cls.__name__: cls for cls in (BlipForConditionalGeneration, BlipForImageTextRetrieval, BlipForQuestionAnswering)
}


@dataclass(frozen=True)
class Size:
    """A small model, and the second picture size that it is asked about."""

    name: str
    vision: VisionConfig
    text: TextConfig
    other_image_size: int


SIZES = (
    Size(
        "S",
        VisionConfig(image_size=224, patch_size=32, width=32, depth=1, heads=2, hidden=64, layer_norm_eps=1e-5),
        TextConfig(vocab_size=60, width=32, depth=1, heads=2, hidden=64, max_positions=40),
        384,
    ),
    Size(
        "M",
        VisionConfig(image_size=224, patch_size=16, width=48, depth=2, heads=3, hidden=96),
        TextConfig(vocab_size=99, width=64, depth=2, heads=4, hidden=128, max_positions=40, tie_lm_head=False),
        384,
    ),
    Size(
        "L",
        VisionConfig(image_size=384, patch_size=32, width=96, depth=3, heads=6, hidden=192),
        TextConfig(vocab_size=80, width=48, depth=3, heads=3, hidden=96, max_positions=64, layer_norm_eps=1e-6),
        480,
    ),
)


@dataclass(frozen=True)
class Pair:
    """One model twice: transformers' and ours."""

    theirs: Any
    ours: Blip

    def at(self, image_size: int, folder: Path) -> Pair:
        """The same for another picture size: ours is loaded for it, theirs interpolates while it runs."""
        return replace(self, ours=store.load(folder, image_size=image_size).eval())


def architecture(name: str, size: Size) -> BlipConfig:
    """Our architecture of a class of transformers at a size."""
    answers = name == "BlipForQuestionAnswering"
    vision = (
        size.vision.model_copy(update={"width": size.text.width, "heads": size.text.heads}) if answers else size.vision
    )
    share = "none" if answers else size.text.share
    text = size.text.model_copy(update={"roles": ROLES[name], "share": share})
    return BlipConfig(vision=vision, text=text, projection=24, answers=answers)


def scramble(model: nn.Module, seed: int) -> None:
    """Random weights of a size that lets every part matter: fresh ones are so small that a wrong part may hide."""
    draw = torch.Generator().manual_seed(seed)
    for name, weight in sorted(dict(model.named_parameters()).items()):
        noise = torch.randn(weight.shape, generator=draw)
        if weight.ndim < 2:
            weight.data.copy_(0.1 * noise + float(name.endswith("weight") or weight.ndim == 0))
        else:
            looked_up = any(word in name for word in ("embedding", "words", "positions", "vision.cls"))
            weight.data.copy_(noise * (0.2 if looked_up else weight[0].numel() ** -0.5))


def theirs_to_ours(name: str, size: Size, folder: Path, seed: int = 0) -> Pair:
    """A model of transformers, saved by it and loaded here."""
    from capfilt.models.blip.transformers_config import describe

    torch.manual_seed(seed)
    described = describe(architecture(name, size), 0.07, SPECIAL)
    theirs = CLASSES[name](HfConfig(**{key: value for key, value in described.items() if key != "architectures"}))
    scramble(theirs, seed)
    theirs.eval().save_pretrained(folder)
    return Pair(theirs, store.load(store.find(str(folder))).eval())


def ours_to_theirs(name: str, size: Size, folder: Path, seed: int = 0) -> Pair:
    """A model of ours, written here and opened by transformers, which must find every tensor and no other."""
    ours = Blip(architecture(name, size))
    scramble(ours, seed)
    store.save_hf(ours.eval(), folder, SPECIAL)
    theirs, told = CLASSES[name].from_pretrained(folder, output_loading_info=True)
    assert not any(told.values()), told
    return Pair(theirs.eval(), ours)


DIRECTIONS = {"in": theirs_to_ours, "out": ours_to_theirs}


@dataclass(frozen=True)
class Batch:
    """Pictures, and texts of unequal lengths behind [CLS]."""

    pixels: Tensor
    ids: Tensor
    mask: Tensor


def batch(vocab_size: int, image_size: int, lengths: tuple[int, ...] = (7, 4, 9)) -> Batch:
    """Random pictures and texts."""
    draw = torch.Generator().manual_seed(image_size)
    pixels = torch.randn(len(lengths), 3, image_size, image_size, generator=draw)
    ids = torch.randint(5, vocab_size - 2, (len(lengths), max(lengths)), generator=draw)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    ids = ids.where(mask.bool(), torch.tensor(PAD))
    ids[:, 0] = CLS
    return Batch(pixels, ids, mask)


def first(ids: Tensor, token: int) -> Tensor:
    """Texts behind another token."""
    return torch.cat([torch.full_like(ids[:, :1], token), ids[:, 1:]], dim=1)


@torch.no_grad()
def compare(pair: Pair, image_size: int) -> dict[str, float]:
    """The largest difference of every answer, at one picture size."""
    theirs, ours = pair.theirs, pair.ours
    asked = batch(ours.config.text.vocab_size, image_size)
    seen = theirs.vision_model(asked.pixels, interpolate_pos_encoding=True).last_hidden_state
    tokens = ours.encode_image(asked.pixels)
    of_class = {
        "BlipForConditionalGeneration": captioner,
        "BlipForImageTextRetrieval": judge,
        "BlipForQuestionAnswering": answerer,
    }[type(theirs).__name__]
    pairs = {"image tokens": (seen, tokens), **of_class(theirs, ours, asked, seen, tokens)}
    return {what: float((a - b).abs().max()) for what, (a, b) in pairs.items()}


Answers = dict[str, tuple[Tensor, Tensor]]


def captioner(theirs: Any, ours: Blip, asked: Batch, seen: Tensor, tokens: Tensor) -> Answers:
    """What a captioner answers: states and logits, as `forward` computes them."""
    ids = first(asked.ids, ours.config.text.dec)
    states = theirs.text_decoder.bert(
        input_ids=ids, attention_mask=asked.mask, encoder_hidden_states=seen, is_decoder=True
    ).last_hidden_state
    logits = theirs(asked.pixels, ids, attention_mask=asked.mask, interpolate_pos_encoding=True).logits
    keys = ours.image_context(tokens, "decoder")
    return {
        "decoder states": (states, ours.text(ids, "decoder", asked.mask, keys)),
        "LM logits": (logits, ours.decode(asked.ids, asked.mask, keys)),
    }


def judge(theirs: Any, ours: Blip, asked: Batch, seen: Tensor, tokens: Tensor) -> Answers:
    """What a filter answers, behind [CLS] as transformers asks and behind [ENC] as training did."""
    text = theirs.text_encoder(input_ids=asked.ids, attention_mask=asked.mask).last_hidden_state
    cosines = theirs(
        asked.ids, asked.pixels, use_itm_head=False, attention_mask=asked.mask, interpolate_pos_encoding=True
    )
    keys, states = ours.image_context(tokens, "encoder"), ours.encode_text(asked.ids, asked.mask)
    image_to, text_to = ours.project_image(tokens), ours.project_text(states)
    found = {
        "text states": (text, states),
        "image projection": (normalize(theirs.vision_proj(seen[:, 0]), dim=-1), image_to),
        "text projection": (normalize(theirs.text_proj(text[:, 0]), dim=-1), text_to),
        "ITC cosines": (cosines.itm_score, image_to @ text_to.T),
    }
    for token, ids in (("cls", asked.ids), ("enc", first(asked.ids, ours.config.text.enc))):
        told = theirs(ids, asked.pixels, attention_mask=asked.mask, interpolate_pos_encoding=True)
        reader = Blip(ours.config.model_copy(update={"itm_token": token})).eval()
        reader.load_state_dict(ours.state_dict())
        fused = reader.fuse(asked.ids, asked.mask, keys)
        found[f"fused states, [{token.upper()}]"] = (told.question_embeds, fused)
        found[f"ITM logits, [{token.upper()}]"] = (told.itm_score, reader.match(fused))
    return found


def answerer(theirs: Any, ours: Blip, asked: Batch, seen: Tensor, tokens: Tensor) -> Answers:
    """What a model that answers questions answers; its decoder sees padding too, in transformers as here."""
    question, answer = first(asked.ids, ours.config.text.enc), first(asked.ids.flip(0), ours.config.text.dec)
    mask = asked.mask.flip(0)
    states = theirs.text_encoder(input_ids=question, attention_mask=asked.mask, encoder_hidden_states=seen)
    logits = theirs.text_decoder(
        input_ids=answer,
        attention_mask=mask,
        encoder_hidden_states=states.last_hidden_state,
        encoder_attention_mask=asked.mask,
    ).logits
    fused = ours.fuse(asked.ids, asked.mask, ours.image_context(tokens, "encoder"))
    return {
        "question states": (states.last_hidden_state, fused),
        "answer logits": (logits, ours.decode(answer, mask, ours.image_context(fused, "decoder"))),
    }


GENERATIONS: dict[str, dict[str, Any]] = {
    "greedy": {"num_beams": 1},
    "greedy, repetition penalty 1.3": {"num_beams": 1, "repetition_penalty": 1.3},
    "beam 3": {"num_beams": 3},
    "beam 3, length penalty 2": {"num_beams": 3, "length_penalty": 2.0},
    "beam 5, all five, repetition penalty 1.3": {"num_beams": 5, "num_return_sequences": 5, "repetition_penalty": 1.3},
}
IMAGES = 64


def eager_captioner(folder: Path) -> Pair:
    """A small captioner whose texts end at all lengths: without a push, random ones hardly ever end."""
    size = Size("generation", SIZES[0].vision.model_copy(update={"image_size": 64}), SIZES[1].text, 64)
    name = "BlipForConditionalGeneration"
    pair = theirs_to_ours(name, size, folder)
    pair.theirs.text_decoder.cls.predictions.decoder.bias.data[SEP] += 2.0
    pair.theirs.save_pretrained(folder)
    return Pair(pair.theirs, store.load(folder).eval())


@torch.no_grad()
def texts(
    pair: Pair,
    how: str,
    prompt: tuple[int, ...] = (),
    lengths: tuple[int, int] = (5, 20),
    accounting: Literal["new_tokens", "original"] = "new_tokens",
) -> tuple[Any, Any]:
    """The texts of 64 random pictures: theirs and ours, as lists of ids."""
    theirs, ours, settings = pair.theirs, pair.ours, GENERATIONS[how]
    size = ours.config.vision.image_size
    pixels = torch.randn(IMAGES, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2
    begin = [ours.config.text.dec, *prompt]
    ids = torch.tensor([*begin, SEP]).repeat(IMAGES, 1)
    told = theirs.generate(pixels, ids, min_length=lengths[0], max_length=lengths[1], do_sample=False, **settings)
    config = DecodeConfig(
        method="greedy" if settings["num_beams"] == 1 else "beam",
        beams=settings["num_beams"],
        length_penalty=settings.get("length_penalty", 1.0),
        repetition_penalty=settings.get("repetition_penalty", 1.0),
        accounting=accounting,
        min_length=lengths[0],
        max_length=lengths[1],
    )
    image = ours.image_context(ours.encode_image(pixels), "decoder")
    if config.method == "beam":
        written = beam_search(ours, image, begin, SEP, config, settings.get("num_return_sequences", 1))
    else:
        written = generate(ours, image, begin, SEP, config, torch.zeros(IMAGES, lengths[1] - len(begin)))
    rows = [row[len(begin) :] for row in told.tolist()]
    return [row[: row.index(SEP)] if SEP in row else row for row in rows], written


def measured() -> Iterator[tuple[str, str, str, str]]:
    """The rows of the table: class, direction, what, difference."""
    for name in CLASSES:
        for direction, make in DIRECTIONS.items():
            worst: dict[str, float] = {}
            for size in SIZES:
                with tempfile.TemporaryDirectory() as folder:
                    pair = make(name, size, Path(folder))
                    for image_size in (pair.ours.config.vision.image_size, size.other_image_size):
                        for what, far in compare(pair.at(image_size, Path(folder)), image_size).items():
                            worst[what] = max(worst.get(what, 0.0), far)
            arrow = "theirs, loaded here" if direction == "in" else "ours, opened there"
            yield from ((name, arrow, what, f"{far:.1e}") for what, far in worst.items())
    with tempfile.TemporaryDirectory() as folder:
        pair = eager_captioner(Path(folder))
        for how in GENERATIONS:
            theirs, ours = texts(pair, how)
            wrong = sum(a != b for a, b in zip(theirs, ours, strict=True))
            yield type(pair.theirs).__name__, "theirs, loaded here", f"texts: {how}", f"{wrong} of {len(ours)} differ"


def page() -> str:
    """docs/parity.md."""
    rows = "\n".join(f"| {' | '.join(row)} |" for row in measured())
    sizes = ", ".join(f"{size.vision.image_size}/{size.other_image_size}" for size in SIZES)
    versions = f"transformers {transformers.__version__}, torch {torch.__version__}, Python {platform.python_version()}"
    return f"""# Parity with transformers

Our BLIP and transformers', the same random weights in both, fp32 on a CPU: the largest difference of any element over
three sizes of model, each at two sizes of picture ({sizes} px), with padded texts, LM heads tied and
not; and the texts of {IMAGES} random pictures. The tests ask for {LIMIT:g} and for equal texts:
`tests/models/blip/test_parity.py`.

Measured {datetime.now(UTC):%Y-%m-%d} with {versions}:

    python benchmarks/parity.py

| class | weights | what | largest difference |
|---|---|---|---|
{rows}

What differs on purpose: `BlipForImageTextRetrieval` reads a text behind [CLS] where training put [ENC]; both are
compared above, and `itm_token` chooses. The temperature of ITC has no place in transformers' classes; it travels in
`logit_scale_init_value`.
"""


def main() -> None:
    """Measure, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "docs" / "parity.md")
    out: Path = parser.parse_args().out
    torch.set_num_threads(1)
    out.parent.mkdir(parents=True, exist_ok=True)
    # What benchmarks/parity_blip2.py wrote below stays.
    _, heading, below = (out.read_text() if out.is_file() else "").partition("\n## BLIP-2")
    out.write_text(page() + heading + below)


if __name__ == "__main__":
    main()
