"""Texts as the web has them: true captions, and the ways in which web texts are wrong; and the world's vocabulary."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from capfilt.data.synthetic.captions import (
    BACKGROUND_TEMPLATE,
    SPELLINGS,
    TEMPLATES,
    draw_claim,
    draw_voice,
    falsify,
    pick,
    say,
)
from capfilt.data.synthetic.scenes import BACKGROUNDS, COLOURS, RELATIONS, SHAPES, SIZES, TEXTURES, Scene, holds

BOILERPLATE: tuple[str, ...] = (
    *(f"{verb} to {deed}" for verb in ("click", "tap") for deed in ("enlarge", "view", "download", "share")),
    *(f"{what} {fate}" for what in ("image", "photo") for fate in ("not available", "coming soon", "may contain text")),
    *(f"{verb} {what}" for verb in ("read", "view", "click for") for what in ("more", "full page")),
    *("all rights reserved", "photo by admin", "default thumbnail", "no image", "home page", "loading"),
)
FILE_NAMES = ("img_{n:04d}.jpg", "dsc_{n:04d}.jpg", "photo_{n:04d}.png")
SEO = (
    "buy cheap {colour} {shape} wallpaper hd free",
    "free {colour} {shape} wallpaper download",
    "best {colour} {shape} stock photo hd",
    "{shape} sale online best price",
    "{colour} wallpaper hd free download",
    "buy {shape} online free shipping",
)

_SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_DIGITS = "0123456789"
_PUNCTUATION = "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"


def right(scene: Scene, rng: np.random.Generator) -> str:
    """A true caption as the web writes it."""
    return _web_style(say(draw_claim(scene, rng), draw_voice(rng)), rng)


def other(scene: Scene, rng: np.random.Generator, elsewhere: Callable[[int], Scene]) -> str:
    """A true caption of another scene, `elsewhere(index)`, that is false of this one."""
    while True:
        claim = draw_claim(elsewhere(int(rng.integers(1 << 31))), rng)
        if not holds(scene, claim):
            return _web_style(say(claim, draw_voice(rng)), rng)


def boilerplate(rng: np.random.Generator) -> str:
    """What web pages write beside any picture."""
    return _web_style(pick(rng, BOILERPLATE), rng)


def seo(scene: Scene, rng: np.random.Generator) -> str:
    """A file name, or words for search engines; what it names is not in the picture."""
    if rng.random() < 0.4:
        return pick(rng, FILE_NAMES).format(n=int(rng.integers(10_000)))
    absent = [
        (colour, shape)
        for colour in COLOURS
        for shape in SHAPES
        if all(colour != thing.colour and shape != thing.shape for thing in scene.things)
    ]
    colour, shape = pick(rng, absent)
    return _web_style(pick(rng, SEO).format(colour=colour, shape=shape), rng)


def truncated(scene: Scene, rng: np.random.Generator) -> str:
    """The first word or two of a true caption, sometimes cut inside a word, so that no shape is named."""
    words = say(draw_claim(scene, rng), draw_voice(rng)).split()[: int(rng.integers(1, 3))]
    if len(words[-1]) > 2 and rng.random() < 0.5:
        words[-1] = words[-1][: int(rng.integers(1, len(words[-1])))]
    return _web_style(" ".join(words), rng)


def attribute(scene: Scene, rng: np.random.Generator) -> str:
    """A true caption in which one colour, shape, size, texture or relation was changed and is now false."""
    return _web_style(say(falsify(draw_claim(scene, rng), scene, rng), draw_voice(rng)), rng)


def _web_style(text: str, rng: np.random.Generator) -> str:
    if rng.random() < 0.3:
        text = text[0].upper() + text[1:]
    return f"{text}." if rng.random() < 0.15 else text


def vocabulary() -> list[str]:
    """The WordPiece vocabulary of the world: lower case, [PAD] at 0, able to spell any printable ASCII.

    Its order is part of every checkpoint trained on it: the words are sorted, a new one moves those after it.
    """
    texts = [template for templates in TEMPLATES.values() for template in templates]
    texts += [BACKGROUND_TEMPLATE, *BOILERPLATE, *SEO, "img dsc photo jpg png"]
    for meanings in (SHAPES, COLOURS, SIZES, TEXTURES, BACKGROUNDS, RELATIONS):
        texts += [spelling for word in meanings for spelling in SPELLINGS.get(word, (word,))]
    words = {word.strip(",.") for text in texts for word in text.split() if "{" not in word}
    pieces = [f"##{character}" for character in _LETTERS + _DIGITS]
    return [*_SPECIALS, *_PUNCTUATION, *_DIGITS, *_LETTERS, *sorted(words - set(_LETTERS)), *pieces]
