"""The language of the embedded world: what a scene holds, what is true of it, how web texts go wrong.

A caption is drawn as a `Claim` (what is said) plus a voice (how it is said), so "one word is false" is
decided on the meaning against the scene; two texts that merely differ are never taken for right and wrong.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import permutations, product
from typing import TypeVar

import numpy as np

T = TypeVar("T")

SHAPES = ("circle", "square", "triangle", "cross", "ring")
COLOURS = ("red", "yellow", "green", "blue", "purple", "white")
SIZES = ("large", "small")
TEXTURES = ("solid", "striped")
BACKGROUNDS = ("gray", "black", "brown", "navy")
RELATIONS = ("left", "right", "above", "below")

Look = tuple[str, str, str, str]
"""Colour, shape, size, texture."""

LOOKS: tuple[Look, ...] = tuple(product(COLOURS, SHAPES, SIZES, TEXTURES))

# One size and texture of every colour and shape is shown and told in the test split only: each word of it, and each
# colour with each shape, is common elsewhere. (Held-out pairs of colour and shape leave too few.)
HELD_OUT = frozenset(
    (colour, shape, *tuple(product(SIZES, TEXTURES))[(i + j) % 4])
    for i, colour in enumerate(COLOURS)
    for j, shape in enumerate(SHAPES)
)

# The first surface is the usual one; few words have a second, so that the words can be learnt in minutes.
SURFACES: dict[str, tuple[str, ...]] = {
    "circle": ("circle", "disc"),
    "cross": ("cross", "plus"),
    "ring": ("ring", "hoop"),
    "red": ("red", "crimson"),
    "purple": ("purple", "violet"),
    "large": ("large", "big"),
    "small": ("small", "little"),
    "solid": ("solid", "plain"),
    "left": ("left of",),
    "right": ("right of",),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
_SECOND_SURFACE = 0.3
_DETAIL = 0.25  # how often a size, or a texture, is said: short texts are learned in fewer steps

# Keyed by (objects told, is a relation told). With three, the third comes first: "A left of B and C" could
# mean that A is left of both.
TEMPLATES: dict[tuple[int, bool], tuple[str, ...]] = {
    (1, False): ("{0}", "a picture of {0}"),
    (2, False): ("{0} and {1}", "{0} with {1}"),
    (2, True): ("{0} {r} {1}", "{0} is {r} {1}"),
    (3, False): ("{0}, {1} and {2}",),
    (3, True): ("{2}, and {0} {r} {1}",),
}
BACKGROUND_TEMPLATE = " on a {0} background"

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

# Across a row or column of the 2 x 2 grid centres differ by at most 0.16 of the side, between two rows or
# columns by at least 0.34: nothing is borderline.
_APART = 0.25


@dataclass(frozen=True, slots=True)
class Thing:
    """One object: four words, and its place in fractions of the side (x to the right, y downwards)."""

    shape: str
    colour: str
    size: str
    texture: str
    x: float
    y: float
    radius: float

    @property
    def pair(self) -> tuple[str, str]:
        return self.colour, self.shape

    @property
    def look(self) -> Look:
        return self.colour, self.shape, self.size, self.texture


@dataclass(frozen=True, slots=True)
class Scene:
    """What a picture shows: one to three things, no two of them alike in both colour and shape."""

    things: tuple[Thing, ...]
    background: str


@dataclass(frozen=True, slots=True)
class Phrase:
    """What is said of one thing; None is left unsaid."""

    colour: str
    shape: str
    size: str | None = None
    texture: str | None = None

    def fits(self, thing: Thing) -> bool:
        return (
            (self.colour, self.shape) == thing.pair
            and self.size in (None, thing.size)
            and self.texture in (None, thing.texture)
        )


@dataclass(frozen=True, slots=True)
class Claim:
    """What one caption says: its phrases, how the first lies to the second, and the background."""

    phrases: tuple[Phrase, ...]
    relation: str | None = None
    background: str | None = None


def relates(first: Thing, relation: str, second: Thing) -> bool:
    """Whether `first` is clearly left of, right of, above or below `second` (of a diagonal, two hold)."""
    dx, dy = second.x - first.x, second.y - first.y
    return {"left": dx, "right": -dx, "above": dy, "below": -dy}[relation] > _APART


def holds(scene: Scene, claim: Claim) -> bool:
    """Whether everything `claim` says is true of `scene`, each phrase being about another thing."""
    if claim.background not in (None, scene.background):
        return False
    for things in permutations(scene.things, len(claim.phrases)):
        if all(phrase.fits(thing) for phrase, thing in zip(claim.phrases, things, strict=True)) and (
            claim.relation is None or relates(things[0], claim.relation, things[1])
        ):
            return True
    return False


def pick(rng: np.random.Generator, options: Sequence[T]) -> T:
    """One of `options`, evenly (`rng.choice` is ten times slower and turns strings into numpy ones)."""
    return options[int(rng.integers(len(options)))]


def draw_claim(scene: Scene, rng: np.random.Generator) -> Claim:
    """Something true of `scene`: colour and shape always, size and texture often, the background rarely."""
    told = len(scene.things)
    if told == 3 and rng.random() < 0.8:
        told = 2
    things = [scene.things[i] for i in rng.permutation(len(scene.things))[:told]]
    relation = None
    if told > 1 and rng.random() < 0.7:
        relation = pick(rng, [r for r in RELATIONS if relates(things[0], r, things[1])])
    phrases = tuple(
        Phrase(
            colour=thing.colour,
            shape=thing.shape,
            size=thing.size if rng.random() < _DETAIL else None,
            texture=thing.texture if rng.random() < _DETAIL else None,
        )
        for thing in things
    )
    return Claim(phrases, relation, scene.background if rng.random() < 0.1 else None)


def say(claim: Claim, voice: int) -> str:
    """`claim` in words; the same voice takes the same template and synonyms for any claim of its form."""
    draws = random.Random(voice)
    template_draw = draws.random()
    nouns = [_say_phrase(phrase, draws) for phrase in claim.phrases]
    relation = _surface(claim.relation, draws)
    templates = TEMPLATES[len(nouns), claim.relation is not None]
    text = templates[int(template_draw * len(templates))].format(*nouns, r=relation)
    if claim.background is not None:
        text += BACKGROUND_TEMPLATE.format(claim.background)
    return text


def _say_phrase(phrase: Phrase, draws: random.Random) -> str:
    # One draw per slot, said or not, so that a changed word never shifts the synonyms of its neighbours.
    words = [_surface(word, draws) for word in (phrase.size, phrase.texture, phrase.colour, phrase.shape)]
    noun = " ".join(filter(None, words))
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def _surface(word: str | None, draws: random.Random) -> str:
    second = draws.random() < _SECOND_SURFACE
    if word is None:
        return ""
    surfaces = SURFACES.get(word, (word,))
    return surfaces[-1] if second else surfaces[0]


def _voice(rng: np.random.Generator) -> int:
    return int(rng.integers(1 << 62))


def captions(scene: Scene, rng: np.random.Generator, n: int) -> list[str]:
    """`n` true captions of `scene`, all different unless `20 n` draws found fewer: then they repeat."""
    found: dict[str, None] = {}
    for _ in range(20 * n):
        if len(found) == n:
            break
        found[say(draw_claim(scene, rng), _voice(rng))] = None
    texts = list(found)
    return [texts[i % len(texts)] for i in range(n)]


def right(scene: Scene, rng: np.random.Generator) -> str:
    """A true caption as the web writes it."""
    return _web_style(say(draw_claim(scene, rng), _voice(rng)), rng)


def other(scene: Scene, rng: np.random.Generator, elsewhere: Callable[[int], Scene]) -> str:
    """A true caption of another scene, `elsewhere(index)`, that is false of this one."""
    while True:
        claim = draw_claim(elsewhere(int(rng.integers(1 << 31))), rng)
        if not holds(scene, claim):
            return _web_style(say(claim, _voice(rng)), rng)


def boilerplate(rng: np.random.Generator) -> str:
    """What pages say around any picture."""
    return _web_style(pick(rng, BOILERPLATE), rng)


def seo(scene: Scene, rng: np.random.Generator) -> str:
    """A file name, or words to be found by; what it names is not in the picture."""
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
    """The first word or two of a true caption, sometimes cut inside a word: no shape is ever reached."""
    words = say(draw_claim(scene, rng), _voice(rng)).split()[: int(rng.integers(1, 3))]
    if len(words[-1]) > 2 and rng.random() < 0.5:
        words[-1] = words[-1][: int(rng.integers(1, len(words[-1])))]
    return _web_style(" ".join(words), rng)


def attribute(scene: Scene, rng: np.random.Generator) -> str:
    """A true caption in which one colour, shape, size, texture or relation was changed and is now false.

    The word to change is drawn evenly among those said, then what it becomes: so what is said most is also wrong most.
    """
    claim = draw_claim(scene, rng)
    false: dict[tuple[str, int], list[Claim]] = {}
    for slot, changed in _changes(claim):
        if not holds(scene, changed) and not _betrays(changed, scene):
            false.setdefault(slot, []).append(changed)
    changed = pick(rng, false[pick(rng, sorted(false))])
    return _web_style(say(changed, _voice(rng)), rng)


def _changes(claim: Claim) -> Iterator[tuple[tuple[str, int], Claim]]:
    """Every claim that differs in one word, with the slot of that word: its kind, and whose it is."""
    for kind, values in (("colour", COLOURS), ("shape", SHAPES), ("size", SIZES), ("texture", TEXTURES)):
        for i, phrase in enumerate(claim.phrases):
            old = getattr(phrase, kind)
            for value in values if old is not None else ():
                if value != old:
                    changed = replace(phrase, **{kind: value})
                    yield (kind, i), replace(claim, phrases=(*claim.phrases[:i], changed, *claim.phrases[i + 1 :]))
    if claim.relation is not None:
        for relation in RELATIONS:
            if relation != claim.relation:
                yield ("relation", 0), replace(claim, relation=relation)


def _betrays(claim: Claim, scene: Scene) -> bool:
    """Whether the words alone give it away: a pair told twice, or one that no true text of the split has."""
    pairs = [(phrase.colour, phrase.shape) for phrase in claim.phrases]
    shown = {thing.look for thing in scene.things}
    told = {(phrase.colour, phrase.shape, phrase.size, phrase.texture) for phrase in claim.phrases}
    return len(set(pairs)) < len(pairs) or bool(told & HELD_OUT - shown)


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
        texts += [surface for word in meanings for surface in SURFACES.get(word, (word,))]
    words = {word.strip(",.") for text in texts for word in text.split() if "{" not in word}
    pieces = [f"##{character}" for character in _LETTERS + _DIGITS]
    return [*_SPECIALS, *_PUNCTUATION, *_DIGITS, *_LETTERS, *sorted(words - set(_LETTERS)), *pieces]
