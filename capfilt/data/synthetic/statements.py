"""Statements about pairs of pictures (NLVR2), and hypotheses about one picture in three classes (SNLI-VE).

Their labels follow from what they say: whether its claim holds of a scene, and whether it says more than a picture
can show.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from capfilt.data.synthetic.captions import draw_claim, draw_voice, falsify, pick, say, say_phrase, spelling
from capfilt.data.synthetic.drawing import Weights, allowed, draw_scene
from capfilt.data.synthetic.scenes import COLOURS, SHAPES, Appearance, Claim, Scene, changes, holds

Label = Literal["entailment", "neutral", "contradiction"]

UNSEEN = (", on sale", ", price reserved", ", with free shipping", ", photo by admin", ", and more on a home page")
"""What may be said beside a claim and no picture shows: price, owner, what else there is."""
OUTSIDE = ", and a {0} {1} outside the picture"


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """A claim about a scene, and what else it says that no picture decides ("" for nothing)."""

    claim: Claim
    unseen: str = ""

    def label(self, scene: Scene) -> Label:
        """Entailment: true of the scene. Contradiction: false of it. Neutral: it may be either."""
        if not holds(scene, self.claim):
            return "contradiction"
        return "neutral" if self.unseen else "entailment"


def draw_hypotheses(
    scene: Scene, rng: np.random.Generator, elsewhere: Callable[[], Scene]
) -> list[tuple[str, Hypothesis]]:
    """A hypothesis of each class with its text, shuffled.

    A contradiction is a true claim with one word changed, or true of another scene, `elsewhere()`; half of them say
    what is unseen too, so that words alone tell neutral ones apart no better than two times in three.
    """
    true = draw_claim(scene, rng)
    if rng.random() < 0.5:
        false = falsify(draw_claim(scene, rng), scene, rng)
    else:
        false = draw_claim(elsewhere(), rng)
        while holds(scene, false):
            false = draw_claim(elsewhere(), rng)
    drawn = [
        Hypothesis(true),
        Hypothesis(draw_claim(scene, rng), _unseen(rng)),
        Hypothesis(false, _unseen(rng) if rng.random() < 0.5 else ""),
    ]
    return [(say(drawn[i].claim, draw_voice(rng)) + drawn[i].unseen, drawn[i]) for i in rng.permutation(3)]


def _unseen(rng: np.random.Generator) -> str:
    if rng.random() < 0.3:
        return OUTSIDE.format(pick(rng, COLOURS), pick(rng, SHAPES))
    return pick(rng, UNSEEN)


# ---- pairs of pictures ----

Where = Literal["left", "right", "both", "no", "one"]
PLACES: dict[Where, str] = {
    "left": "on the left picture",
    "right": "on the right picture",
    "both": "on both pictures",
    "no": "on no picture",
    "one": "on only one picture",
}
GROUP = 4
"""Pairs that each statement is made about; it is true of half of them."""


@dataclass(frozen=True, slots=True)
class PairClaim:
    """In which of two pictures a claim holds."""

    claim: Claim
    where: Where

    def holds(self, left: Scene, right: Scene) -> bool:
        """Whether it is true of a pair."""
        return self.decide(holds(left, self.claim), holds(right, self.claim))

    def decide(self, left: bool, right: bool) -> bool:
        """Whether it is true where the claim holds of these pictures."""
        number = left + right
        return {"left": left, "right": right, "both": number == 2, "no": number == 0, "one": number == 1}[self.where]


def draw_pair_claim(scene: Scene, rng: np.random.Generator) -> tuple[str, PairClaim]:
    """A statement about pairs, made of a claim that is true of `scene`, and its text."""
    claim = draw_claim(scene, rng)
    keeps_relation = claim.relation is not None and rng.random() < 0.4
    claim = Claim(claim.phrases[:2], claim.relation) if keeps_relation else Claim(claim.phrases[:1])
    where = pick(rng, tuple(PLACES))
    voice = random.Random(draw_voice(rng))
    first, *second = (say_phrase(phrase, voice) for phrase in claim.phrases)
    words = [first, "is", spelling(claim.relation, voice), *second, PLACES[where]]
    return " ".join(filter(None, words)), PairClaim(claim, where)


def draw_pair(
    stated: PairClaim, label: bool, rng: np.random.Generator, weights: Weights, held_out: bool
) -> tuple[Scene, Scene]:
    """Two scenes of which the statement is true, or false; of the ways to make it so, each is as likely."""
    ways = [(left, right) for left in (True, False) for right in (True, False) if stated.decide(left, right) == label]
    left, right = (_scene_where(stated.claim, wanted, rng, weights, held_out) for wanted in pick(rng, ways))
    return left, right


def _scene_where(claim: Claim, wanted: bool, rng: np.random.Generator, weights: Weights, held_out: bool) -> Scene:
    """A scene of which the claim holds or not; where not, half of them show what differs from it in one word."""
    near = [changed for _, changed in changes(claim)]
    while True:
        like = claim if wanted else pick(rng, near) if rng.random() < 0.5 else None
        shown = _appearances(like, rng, held_out) if like else ()
        scene = draw_scene(rng, weights, held_out, shown)
        if holds(scene, claim) == wanted:
            return scene


def _appearances(claim: Claim, rng: np.random.Generator, held_out: bool) -> tuple[Appearance, ...]:
    """What the things of a claim may look like; () where none of the split do, or two would be alike."""
    shown: list[Appearance] = []
    for phrase in claim.phrases:
        words = (phrase.colour, phrase.shape, phrase.size, phrase.texture)
        fitting = [
            appearance
            for appearance in allowed(held_out)
            if all(word in (None, seen) for word, seen in zip(words, appearance, strict=True))
            and all(appearance[:2] != other[:2] for other in shown)
        ]
        if not fitting:
            return ()
        shown.append(pick(rng, fitting))
    return tuple(shown)
