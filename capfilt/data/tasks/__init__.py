"""What the downstream tasks read of a sample: rows of its json, a second picture, its class (docs/tasks.md).

A picture has many rows (questions, statements, ...), and each is used or fails on its own: every reader here raises
DataError at the first row that cannot be used, or goes on and appends it to `failed`, where that list is given.
The boxes of grounding are in `capfilt/data/regions.py`.
"""

from __future__ import annotations

from capfilt.data.tasks.classes import ClassList, class_of, read_classes, read_names, read_templates
from capfilt.data.tasks.dialogs import Dialog, DialogRound, dialog_of
from capfilt.data.tasks.rows import (
    ENTAILMENT_LABELS,
    FailedRow,
    Hypothesis,
    Question,
    Statement,
    hypotheses_of,
    questions_of,
    right_picture,
    statements_of,
)
