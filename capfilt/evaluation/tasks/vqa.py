"""Visual question answering by VQAv2's rule, beside the best that one answer, or one for each type of question, can do.

An answer that the model does not know is still asked for: questions that none of its answers would be right for are
counted in `outside`, and count as wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from capfilt.data.tasks import Question, questions_of
from capfilt.data.text.answers import normalise
from capfilt.evaluation.metrics import vqa
from capfilt.evaluation.result_files import write_vqa
from capfilt.evaluation.tasks import Measured
from capfilt.evaluation.tasks.config import VqaEvalConfig
from capfilt.evaluation.tasks.rows import RowReader
from capfilt.inference.answers import answer
from capfilt.inference.local_model import LocalModel


def measure(local: LocalModel, urls: Sequence[str], config: VqaEvalConfig, device: torch.device) -> Measured:
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
