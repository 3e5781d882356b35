"""Questions about scenes with ten answers each, and dialogs made of such questions.

A question is a set of possible answers, each of which is a claim: the true answer is the one whose claim holds of the
scene, as with captions. The ten annotators mostly give it; some spell it otherwise ("crimson", "two"), some are wrong.

Of the words here the vocabulary of the embedded world lacks what, how, many, color, shape, where, are, there, the, it,
things, top, bottom and yes. It stays as it is, so that the models of existing runs can be fine-tuned on these tasks:
such words are read and written letter by letter. A question has 15 tokens (at most 23), of words it would have 7; a
dialog has 43 (at most 70, where blip/tiny reads 64).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import product

import numpy as np

from capfilt.data.synthetic.captions import SPELLINGS, draw_claim, draw_voice, falsify, pick, say, say_noun, spelling
from capfilt.data.synthetic.scenes import (
    COLOURS,
    QUARTERS,
    RELATIONS,
    SHAPES,
    SIZES,
    TEXTURES,
    Claim,
    Phrase,
    Scene,
    holds,
)

Pair = tuple[str, str]
"""A colour and a shape: no two things of a scene are alike in both."""

KINDS = ("what color", "what shape", "how many", "where", "is there", "is the")
"""The kinds of questions, by their first two words; those of the last two are answered with yes or no."""
NUMBERS = ("0", "1", "2", "3")
YES_NO = ("yes", "no")
ANSWERS = (*COLOURS, *SHAPES, *NUMBERS, *QUARTERS, *YES_NO)
"""Every true answer there is."""
_NUMBER_WORDS = dict(zip(NUMBERS, ("none", "one", "two", "three"), strict=True))
_DISSENTERS = (0, 0, 0, 0, 1, 1, 2, 3)
"""How many of ten annotators do not write the true answer; drawn evenly."""
ROUNDS, OPTIONS = 3, 10
"""Of a dialog: its rounds, and the candidate answers of each."""


@dataclass(frozen=True, slots=True)
class Question:
    """A question about one scene."""

    kind: str
    text: str
    answer: str
    others: tuple[str, ...]
    """What else a question of this kind may be answered with."""

    @property
    def answer_type(self) -> str:
        """As VQAv2 divides them."""
        return "yes/no" if self.answer in YES_NO else "number" if self.answer in NUMBERS else "other"


def ask(scene: Scene, rng: np.random.Generator, number: int) -> list[Question]:
    """Some questions about a scene, each of another kind; fewer than `number` where it does not allow as many."""
    asked: list[Question] = []
    for i in rng.permutation(len(_ASKED)):
        if len(asked) < number and (question := _ASKED[i](scene, rng)) is not None:
            asked.append(question)
    return asked


def ten_answers(question: Question, rng: np.random.Generator) -> list[str]:
    """What ten annotators answer: at least seven of them what is true."""
    answers = [question.answer] * 10
    for place in rng.permutation(10)[: pick(rng, _DISSENTERS)]:
        other = _respelt(question.answer)
        answers[place] = pick(rng, question.others) if other is None or rng.random() < 0.5 else other
    return answers


def _respelt(answer: str) -> str | None:
    """An answer in its second spelling; None where it has none."""
    second = SPELLINGS.get(answer, (answer,))[-1]
    return _NUMBER_WORDS.get(answer, None if second == answer else second)


def pairs_in(scene: Scene) -> list[Pair]:
    """The colours and shapes of which a scene shows a thing, in the order of the tables."""
    return [pair for pair in product(COLOURS, SHAPES) if holds(scene, Claim((Phrase(*pair),)))]


def _question(scene: Scene, kind: str, text: str, answers: Mapping[str, Claim]) -> Question:
    true = [answer for answer, claim in answers.items() if holds(scene, claim)]
    assert len(true) == 1, (text, true, scene)
    return Question(kind, text, true[0], tuple(answer for answer in answers if answer != true[0]))


def _yes_no(scene: Scene, kind: str, text: str, claim: Claim) -> Question:
    answer, other = YES_NO if holds(scene, claim) else YES_NO[::-1]
    return Question(kind, text, answer, (other,))


# ---- one of each kind, or None where the scene does not allow it ----


def _voice(rng: np.random.Generator) -> random.Random:
    return random.Random(draw_voice(rng))


def _unique(values: Iterable[str]) -> list[str]:
    listed = list(values)
    return [value for value in listed if listed.count(value) == 1]


def _ask_word(slot: int, scene: Scene, rng: np.random.Generator) -> Question | None:
    """The colour (slot 0) of the only thing of its shape, or the shape (slot 1) of the only thing of its colour."""
    others = _unique(pair[1 - slot] for pair in pairs_in(scene))
    return _word_of(slot, scene, pick(rng, others), rng) if others else None


def _word_of(slot: int, scene: Scene, other: str, rng: np.random.Generator) -> Question:
    pairs = {word: (word, other) if slot == 0 else (other, word) for word in (COLOURS, SHAPES)[slot]}
    named = spelling(other, _voice(rng)) + (" thing" if slot else "")
    answers = {word: Claim((Phrase(*pair),)) for word, pair in pairs.items()}
    return _question(scene, KINDS[slot], f"{KINDS[slot]} is the {named}?", answers)


def _ask_number(scene: Scene, rng: np.random.Generator) -> Question:
    """How many things, things of a colour or of a shape: the number is drawn first, so that all are common."""
    shown = pairs_in(scene)
    counts = {"things": len(shown)}
    counts |= {f"{colour} things": sum(colour == pair[0] for pair in shown) for colour in COLOURS}
    counts |= {_plural(shape): sum(shape == pair[1] for pair in shown) for shape in SHAPES}
    number = pick(rng, sorted(set(counts.values())))
    noun = pick(rng, [noun for noun, count in counts.items() if count == number])
    return _number_of(f"{noun} are there", number)


def _number_of(nouns: str, number: int) -> Question:
    others = tuple(other for other in NUMBERS if other != str(number))
    return Question(KINDS[2], f"how many {nouns}?", str(number), others)


def _plural(shape: str) -> str:
    return f"{shape}es" if shape.endswith("s") else f"{shape}s"


def _ask_place(scene: Scene, rng: np.random.Generator) -> Question:
    pair = pick(rng, pairs_in(scene))
    return _place_of(scene, pair, f"the {say_noun(Phrase(*pair), _voice(rng))}")


def _place_of(scene: Scene, pair: Pair, noun: str) -> Question:
    answers = {quarter: Claim((Phrase(*pair),), quarter=quarter) for quarter in QUARTERS}
    return _question(scene, KINDS[3], f"where is {noun}?", answers)


def _ask_presence(scene: Scene, rng: np.random.Generator) -> Question:
    claim = Claim(draw_claim(scene, rng).phrases[:1])
    if rng.random() < 0.5:
        claim = falsify(claim, scene, rng)
    return _yes_no(scene, KINDS[4], f"is there a {say_noun(claim.phrases[0], _voice(rng))}?", claim)


def _ask_property(scene: Scene, rng: np.random.Generator) -> Question:
    """Whether a thing that is there is large, striped, or left of another."""
    shown = pairs_in(scene)
    first, *rest = (shown[i] for i in rng.permutation(len(shown)))
    noun = f"the {say_noun(Phrase(*first), _voice(rng))}"
    if not rest or rng.random() < 0.5:
        return _is_it(scene, first, noun, rng)
    second = Phrase(*rest[0])
    claims = [Claim((Phrase(*first), second), relation) for relation in RELATIONS]
    wanted = rng.random() < 0.5
    claim = pick(rng, [claim for claim in claims if holds(scene, claim) == wanted])
    voice = _voice(rng)
    text = f"is {noun} {spelling(claim.relation, voice)} the {say_noun(second, voice)}?"
    return _yes_no(scene, KINDS[5], text, claim)


def _is_it(scene: Scene, pair: Pair, noun: str, rng: np.random.Generator) -> Question:
    word = pick(rng, (*SIZES, *TEXTURES))
    size, texture = (word if word in words else None for words in (SIZES, TEXTURES))
    claim = Claim((Phrase(*pair, size, texture),))
    return _yes_no(scene, KINDS[5], f"is {noun} {spelling(word, _voice(rng))}?", claim)


_ASKED: tuple[Callable[[Scene, np.random.Generator], Question | None], ...] = (
    partial(_ask_word, 0),
    partial(_ask_word, 1),
    _ask_number,
    _ask_place,
    _ask_presence,
    _ask_property,
)


# ---- dialogs ----


def draw_dialog(scene: Scene, rng: np.random.Generator) -> tuple[str, list[Question]]:
    """A caption that names one thing, and questions: "it" is the thing that was named last.

    A thing is named by the caption and by a question for its colour or its shape; a number of things names none.
    """
    shown = pairs_in(scene)
    topic = pick(rng, shown)
    caption = say(Claim((Phrase(*topic),)), draw_voice(rng))
    asked: list[Question] = []
    known: set[tuple[Pair | None, str]] = set()
    while len(asked) < ROUNDS:
        named, question = _next_round(scene, topic, shown, rng)
        about = (named, question.text if question.kind in KINDS[2:] else "")
        if about not in known:
            known.add(about)
            topic = named or topic
            asked.append(question)
    return caption, asked


def _next_round(scene: Scene, topic: Pair, shown: list[Pair], rng: np.random.Generator) -> tuple[Pair | None, Question]:
    """A question, and the thing that it is about; None of a number."""
    way = rng.random()
    if way < 0.15:
        return None, _number_of("things", len(shown))
    shapes, colours = _unique(shape for _, shape in shown), _unique(colour for colour, _ in shown)
    others = [pair for pair in shown if pair != topic and (pair[1] in shapes or pair[0] in colours)]
    if others and way < 0.5:
        other = pick(rng, others)
        by_shape = other[1] in shapes and (other[0] not in colours or rng.random() < 0.5)
        return other, _word_of(0, scene, other[1], rng) if by_shape else _word_of(1, scene, other[0], rng)
    if way < 0.7:
        return topic, _place_of(scene, topic, "it")
    return topic, _is_it(scene, topic, "it", rng)


def options(question: Question, rng: np.random.Generator) -> tuple[list[str], list[float]]:
    """The candidate answers of a round, shuffled, and how many annotators call each right, as a share.

    The true answer is among them, its second spelling where it has one, what else may answer such a question, and
    answers of other kinds.
    """
    relevance = {question.answer: 1.0}
    if (other := _respelt(question.answer)) is not None:
        relevance[other] = 0.6
    rest = [answer for answer in ANSWERS if answer not in (question.answer, *question.others)]
    pool = [*_shuffled(question.others, rng), *_shuffled(rest, rng)]
    listed = _shuffled([*relevance, *pool[: OPTIONS - len(relevance)]], rng)
    return listed, [relevance.get(answer, 0.0) for answer in listed]


def _shuffled(texts: Iterable[str], rng: np.random.Generator) -> list[str]:
    listed = list(texts)
    return [listed[i] for i in rng.permutation(len(listed))]
