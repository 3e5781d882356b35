"""Scenes of the embedded world, and which claims are true of them.

A caption begins as a `Claim`, what it says, so "one word is false" is decided on the meaning against the scene; two
texts that merely differ are never taken for right and wrong.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import permutations, product

SHAPES = ("circle", "square", "triangle", "cross", "ring")
COLOURS = ("red", "yellow", "green", "blue", "purple", "white")
SIZES = ("large", "small")
TEXTURES = ("solid", "striped")
BACKGROUNDS = ("gray", "black", "brown", "navy")
RELATIONS = ("left", "right", "above", "below")
QUARTERS = ("top left", "top right", "bottom left", "bottom right")

Appearance = tuple[str, str, str, str]
"""Colour, shape, size, texture."""

APPEARANCES: tuple[Appearance, ...] = tuple(product(COLOURS, SHAPES, SIZES, TEXTURES))

# One size and texture of every colour and shape is shown and named in the test split only: each word of it, and each
# colour with each shape, is common elsewhere. (Held-out pairs of colour and shape leave too few.)
HELD_OUT = frozenset(
    (colour, shape, *tuple(product(SIZES, TEXTURES))[(i + j) % 4])
    for i, colour in enumerate(COLOURS)
    for j, shape in enumerate(SHAPES)
)

# Centres differ by at most 0.16 of the side within a row or column of the 2 x 2 grid, and by at least 0.34 between two:
# no relation is borderline.
_MIN_DISTANCE = 0.25


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
    def appearance(self) -> Appearance:
        return self.colour, self.shape, self.size, self.texture

    @property
    def quarter(self) -> str:
        return f"{'top' if self.y < 0.5 else 'bottom'} {'left' if self.x < 0.5 else 'right'}"


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
    """What one caption says: its phrases, how the first lies to the second, and the background.

    An answer may also say in which quarter of the picture the first lies; captions do not.
    """

    phrases: tuple[Phrase, ...]
    relation: str | None = None
    background: str | None = None
    quarter: str | None = None


def relates(first: Thing, relation: str, second: Thing) -> bool:
    """Whether `first` is clearly left of, right of, above or below `second` (of a diagonal, two hold)."""
    dx, dy = second.x - first.x, second.y - first.y
    return {"left": dx, "right": -dx, "above": dy, "below": -dy}[relation] > _MIN_DISTANCE


def holds(scene: Scene, claim: Claim) -> bool:
    """Whether everything `claim` says is true of `scene`, each phrase being about another thing."""
    return claim.background in (None, scene.background) and any(
        all(phrase.fits(thing) for phrase, thing in zip(claim.phrases, things, strict=True))
        and (claim.relation is None or relates(things[0], claim.relation, things[1]))
        and claim.quarter in (None, things[0].quarter)
        for things in permutations(scene.things, len(claim.phrases))
    )


def changes(claim: Claim) -> Iterator[tuple[tuple[str, int], Claim]]:
    """Every claim that differs in one word, with the slot of that word: its kind, and the number of its phrase."""
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


def is_obvious(claim: Claim, scene: Scene) -> bool:
    """Whether the words alone show that it is false: a pair named twice, or one that no true text of the split has."""
    pairs = [(phrase.colour, phrase.shape) for phrase in claim.phrases]
    shown = {thing.appearance for thing in scene.things}
    named = {(phrase.colour, phrase.shape, phrase.size, phrase.texture) for phrase in claim.phrases}
    return len(set(pairs)) < len(pairs) or bool(named & HELD_OUT - shown)
