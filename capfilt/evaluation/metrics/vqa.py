"""Visual question answering: VQAv2's accuracy, overall and by type of question and of answer.

Formulas and text normalisation are in `capfilt.data.text.answers`, since training chooses its answers by them.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from statistics import fmean
from typing import Any

from capfilt.data.text.answers import normalise, one_line, soft_accuracy, soft_targets
from capfilt.evaluation.metrics.rows import check_columns, check_unique

Types = Sequence[str | None]


def accuracy(
    answers: Sequence[str],
    references: Sequence[Sequence[str]],
    question_types: Types | None = None,
    answer_types: Types | None = None,
    ids: Sequence[Hashable] | None = None,
) -> dict[str, Any]:
    """Measure accuracy, by_question_type and by_answer_type, in percent, and questions, so many as were scored.

    `references` are each question's answers by annotators (ten in VQAv2). A question without any is counted in
    without_answers and is in no other figure. A type that is None is in no figure by type. What has nothing to
    average is absent. Source: PythonEvaluationTools of VQAv2, of March 2021 and later.

    Raises DataError when columns differ in length or an id stands twice.
    """
    check_columns(
        "answers",
        len(answers),
        references=references,
        question_types=question_types,
        answer_types=answer_types,
        ids=ids,
    )
    check_unique("question", ids)
    scores = [soft_accuracy(answer, wanted) for answer, wanted in zip(answers, references, strict=True)]
    scored = [score for score in scores if score is not None]
    figures: dict[str, Any] = {"questions": len(scored)}
    if len(scored) < len(scores):
        figures["without_answers"] = len(scores) - len(scored)
    if scored:
        figures["accuracy"] = 100.0 * fmean(scored)
    for name, types in (("by_question_type", question_types), ("by_answer_type", answer_types)):
        if types is not None and (by_type := _by_type(scores, types)):
            figures[name] = by_type
    return figures


def best_constants(references: Sequence[Sequence[str]], question_types: Types | None = None) -> dict[str, Any]:
    """The accuracies to beat, in percent: majority (majority_answer to every question) and prior_by_question_type.

    Both answers are the best that there are for these very questions, so no constant chosen on a training split
    does better. Questions without a type are one type. Questions without answers count nothing; with no other,
    {} is returned. Raises DataError when the columns differ in length.
    """
    check_columns("questions", len(references), question_types=question_types)
    everywhere, by_type = _Credit(), defaultdict[str | None, _Credit](_Credit)
    for row, wanted in enumerate(references):
        if wanted:
            everywhere.add(wanted)
            by_type[question_types[row] if question_types else None].add(wanted)
    if not everywhere.questions:
        return {}
    answer, total = everywhere.best()
    figures = {"majority": 100.0 * total / everywhere.questions, "majority_answer": answer}
    if question_types is not None:
        figures["prior_by_question_type"] = (
            100.0 * sum(credit.best()[1] for credit in by_type.values()) / everywhere.questions
        )
    return figures


class _Credit:
    """What each answer would earn, were it given to all questions added."""

    def __init__(self) -> None:
        self.questions = 0
        self._verbatim = Counter[str]()
        """Of questions on which all annotators agree, and which are compared letter by letter."""
        self._normalised: dict[str, float] = defaultdict(float)

    def add(self, references: Sequence[str]) -> None:
        self.questions += 1
        if len({one_line(text) for text in references}) == 1:
            self._verbatim[one_line(references[0])] += 1
        else:
            for answer, share in soft_targets(references).items():
                self._normalised[answer] += share

    def best(self) -> tuple[str, float]:
        """The answer that earns most, and how much; of equal ones the first of the alphabet."""
        candidates = sorted({*self._verbatim, *self._normalised})
        earned = {text: self._verbatim[text] + self._normalised.get(normalise(text), 0.0) for text in candidates}
        best = max(candidates, key=lambda text: earned[text])
        return best, earned[best]


def _by_type(scores: Sequence[float | None], types: Types) -> dict[str, float]:
    of_type = defaultdict[str, list[float]](list)
    for score, name in zip(scores, types, strict=True):
        if score is not None and name is not None:
            of_type[name].append(score)
    return {name: 100.0 * fmean(of_type[name]) for name in sorted(of_type)}
