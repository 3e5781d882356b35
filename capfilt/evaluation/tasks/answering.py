"""Questions, statements and hypotheses about pictures, answered by choosing or by writing.

VQAv2's rule is given beside the best that one answer, or one for each type of question, can do. An answer that the
model does not know is still asked for: questions that none of its answers would be right for are counted in `outside`,
and count as wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch

from capfilt.data.loading.task_texts import TRUE_FALSE
from capfilt.data.tasks import (
    ENTAILMENT_LABELS,
    Hypothesis,
    Question,
    Statement,
    hypotheses_of,
    questions_of,
    statements_of,
)
from capfilt.data.text.answers import normalise
from capfilt.evaluation.metrics import classification, nlvr2, vqa
from capfilt.evaluation.result_files import write_vqa
from capfilt.evaluation.tasks import Measured
from capfilt.evaluation.tasks.config import EntailmentEvalConfig, Nlvr2EvalConfig, VqaEvalConfig
from capfilt.evaluation.tasks.rows import RowReader
from capfilt.inference.answers import answer, classify
from capfilt.inference.local_model import LocalModel


def measure_vqa(local: LocalModel, urls: Sequence[str], config: VqaEvalConfig, device: torch.device) -> Measured:
    """The accuracy of the model's answers to the questions of shards, and these. DataError where there is none."""
    reader = RowReader(local, lambda sample, failed: questions_of(sample.meta, failed), config.batch_size, device)
    questions: list[Question] = []
    answers: list[str] = []
    for batch in reader.batches(urls):
        texts = [question.question for question in batch.flat]
        listed = () if config.write else None
        answers += answer(local, batch.pixels, texts, batch.sample_of_row, listed, config.ranked)
        questions += batch.flat
    references = [question.answers for question in questions]
    types = [question.question_type for question in questions]
    figures = vqa.accuracy(answers, references, types, [question.answer_type for question in questions])
    figures |= vqa.best_constants(references, types if any(types) else None)
    known = {normalise(one) for one in local.model.config.known_answers or ()}
    if known and not config.write:
        wrong = [known.isdisjoint(map(normalise, of_question)) for of_question in references if of_question]
        figures["outside"] = sum(wrong)
    rows = [(question.id, text) for question, text in zip(questions, answers, strict=True)]
    return Measured({"vqa": figures} | reader.left_out.figures(), partial(write_vqa, answers=rows))


def measure_nlvr2(local: LocalModel, urls: Sequence[str], config: Nlvr2EvalConfig, device: torch.device) -> Measured:
    """Accuracy and consistency over the statements of shards. DataError where there is none."""
    how = (config.batch_size, device)
    reader = RowReader(local, lambda sample, failed: statements_of(sample.meta, failed), *how, pairs=True)
    true = (local.model.config.known_answers or ()).index(TRUE_FALSE[True])
    statements: list[Statement] = []
    answers: list[bool] = []
    for batch in reader.batches(urls):
        likely_RC = classify(local, batch.pixels, [one.text for one in batch.flat], batch.sample_of_row)
        answers += (likely_RC.argmax(dim=1) == true).tolist()
        statements += batch.flat
    labels, groups = [one.label for one in statements], [one.group for one in statements]
    return Measured({"nlvr2": nlvr2.accuracy(answers, labels, groups)} | reader.left_out.figures())


def measure_entailment(
    local: LocalModel, urls: Sequence[str], config: EntailmentEvalConfig, device: torch.device
) -> Measured:
    """Accuracy over the hypotheses of shards, and by class. DataError where there is none."""
    reader = RowReader(local, lambda sample, failed: hypotheses_of(sample.meta, failed), config.batch_size, device)
    hypotheses: list[Hypothesis] = []
    scores = []
    for batch in reader.batches(urls):
        texts = [one.text for one in batch.flat]
        scores.append(classify(local, batch.pixels, texts, batch.sample_of_row).cpu().numpy())
        hypotheses += batch.flat
    own = local.model.config.known_answers or ()
    scores_NC = np.concatenate(scores)[:, [own.index(label) for label in ENTAILMENT_LABELS]]
    labels = [None if one.label is None else ENTAILMENT_LABELS.index(one.label) for one in hypotheses]
    figures = classification.accuracy(scores_NC, labels)
    for number, label in enumerate(ENTAILMENT_LABELS):
        rows = [row for row, one in enumerate(labels) if one == number]
        if rows:
            figures[label] = 100.0 * float((scores_NC[rows].argmax(axis=1) == number).mean())
    return Measured({"entailment": figures} | reader.left_out.figures())
