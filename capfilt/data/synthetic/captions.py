"""Captions of scenes in English: what is said, and in which words.

The same voice takes the same template and synonyms for any claim of its form, so a changed claim changes one word.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from capfilt.data.synthetic.scenes import RELATIONS, Claim, Phrase, Scene, Thing, changes, holds, is_obvious, relates

T = TypeVar("T")

# The first spelling is the usual one; few words have a second, so that the words can be learnt in minutes.
SPELLINGS: dict[str, tuple[str, ...]] = {
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
_SECOND_SPELLING = 0.3
_DETAIL = 0.25  # how often a size, or a texture, is named: short texts are learned in fewer steps

# Keyed by (objects named, is a relation named). With three, the third comes first: "A left of B and C" could
# mean that A is left of both.
TEMPLATES: dict[tuple[int, bool], tuple[str, ...]] = {
    (1, False): ("{0}", "a picture of {0}"),
    (2, False): ("{0} and {1}", "{0} with {1}"),
    (2, True): ("{0} {r} {1}", "{0} is {r} {1}"),
    (3, False): ("{0}, {1} and {2}",),
    (3, True): ("{2}, and {0} {r} {1}",),
}
BACKGROUND_TEMPLATE = " on a {0} background"


def pick(rng: np.random.Generator, options: Sequence[T]) -> T:
    """One of `options`, uniformly (`rng.choice` is ten times slower and makes numpy strings)."""
    return options[int(rng.integers(len(options)))]


def draw_claim(scene: Scene, rng: np.random.Generator) -> Claim:
    """Something true of `scene`: colour and shape always, size and texture often, the background rarely."""
    num_things = len(scene.things)
    if num_things == 3 and rng.random() < 0.8:
        num_things = 2
    things = [scene.things[i] for i in rng.permutation(len(scene.things))[:num_things]]
    relation = None
    if num_things > 1 and rng.random() < 0.7:
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


def falsify(claim: Claim, scene: Scene, rng: np.random.Generator) -> Claim:
    """A true claim with one word changed, so that it is false of `scene`.

    The word to change is drawn uniformly among those of the claim, then what it becomes: so words that are used most
    are also wrong most.
    """
    false: dict[tuple[str, int], list[Claim]] = {}
    for slot, changed in changes(claim):
        if not holds(scene, changed) and not is_obvious(changed, scene):
            false.setdefault(slot, []).append(changed)
    return pick(rng, false[pick(rng, sorted(false))])


def say_thing(thing: Thing, rng: np.random.Generator) -> str:
    """What one thing is: colour and shape, often its size and its texture."""
    size, texture = (word if rng.random() < _DETAIL else None for word in (thing.size, thing.texture))
    return say_phrase(Phrase(thing.colour, thing.shape, size, texture), random.Random(draw_voice(rng)))


def say(claim: Claim, voice: int) -> str:
    """`claim` in words; the same voice takes the same template and synonyms for any claim of its form."""
    draws = random.Random(voice)
    template_draw = draws.random()
    nouns = [say_phrase(phrase, draws) for phrase in claim.phrases]
    relation = spelling(claim.relation, draws)
    templates = TEMPLATES[len(nouns), claim.relation is not None]
    text = templates[int(template_draw * len(templates))].format(*nouns, r=relation)
    if claim.background is not None:
        text += BACKGROUND_TEMPLATE.format(claim.background)
    return text


def say_phrase(phrase: Phrase, draws: random.Random) -> str:
    """What is said of one thing, with an article."""
    noun = say_noun(phrase, draws)
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def say_noun(phrase: Phrase, draws: random.Random) -> str:
    """What is said of one thing, without an article."""
    # One draw per slot, said or not, so that a changed word never shifts the synonyms of its neighbours.
    words = [spelling(word, draws) for word in (phrase.size, phrase.texture, phrase.colour, phrase.shape)]
    return " ".join(filter(None, words))


def spelling(word: str | None, draws: random.Random) -> str:
    """One of the spellings of a word, the second one less often; "" for none."""
    second = draws.random() < _SECOND_SPELLING
    if word is None:
        return ""
    spellings = SPELLINGS.get(word, (word,))
    return spellings[-1] if second else spellings[0]


def draw_voice(rng: np.random.Generator) -> int:
    """The random choice of template and synonyms."""
    return int(rng.integers(1 << 62))


def captions(scene: Scene, rng: np.random.Generator, n: int) -> list[str]:
    """`n` true captions of `scene`, all different unless `20 n` draws give fewer: then they repeat."""
    texts: dict[str, None] = {}
    for _ in range(20 * n):
        if len(texts) == n:
            break
        texts[say(draw_claim(scene, rng), draw_voice(rng))] = None
    distinct = list(texts)
    return [distinct[i % len(distinct)] for i in range(n)]
