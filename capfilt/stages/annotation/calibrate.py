"""calibrate: set a filter's threshold on human validation pairs, or on labels that people gave to the texts themselves.

A step of bootstrap and of select, not a verb.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import capfilt.data.annotations as tables
from capfilt.cluster.session import Session
from capfilt.cluster.worker_pool import Resources
from capfilt.data import labels
from capfilt.data.policy import PolicyConfig, Pool, fuse, with_scores
from capfilt.errors import DataError
from capfilt.evaluation.metrics import matching
from capfilt.runs import round_figures
from capfilt.runs.progress import Progress
from capfilt.stages.annotation.human_pairs import PairsJob
from capfilt.stages.runner import run_stage
from capfilt.storage.paths import StoragePath


class CalibrateJob(PairsJob):
    """The threshold of one score."""

    file = "calibration.json"
    name = "calibrate"

    score: str
    recall: float

    def measure(self, filter_: Any, pairs: Any) -> dict[str, Any]:
        """The threshold that keeps `recall` of the pairs, and what it was taken of."""
        from capfilt.evaluation import evaluate

        return {
            "score": self.score,
            **asdict(evaluate.calibrate(filter_, pairs, self.score, self.recall, self.batch_size)),
        }

    def summary(self, figures: dict[str, Any]) -> str:
        return f"{self.score} >= {figures['threshold']:.3f}"


def calibrate(
    session: Session, job: CalibrateJob, resources: Resources, show: Progress, label: str = "calibrate"
) -> float:
    """The threshold that the validation pairs give."""
    run_stage(session, job, {"calibration": "calibration"}, resources, show, label)
    return round_figures.read_threshold(job.out / "calibration.json")


MIN_RIGHT = 20
"""Labels "right" without which no threshold is set: with 20, a recall of 0.8 has an interval of 0.58 to 0.92."""


def calibrate_on_labels(source: StoragePath, names: Iterable[str], policy: PolicyConfig) -> dict[str, Any]:
    """The threshold that keeps `policy.recall` of the texts that people called right; for calibration.json.

    Only labels given at random count: close calls alone would set it too high. DataError where there are too few.
    """
    given = {key: label for key, label in labels.read(labels.run_folder_of(source)).items() if label.at_random}
    labelled: list[tuple[float, bool]] = []
    folder, names = source / "annotations", list(names)
    rule = policy.rule(0.0, fuse(policy, Pool(folder, names, policy.sources)) if policy.fused else ())
    for name in names:
        for row in tables.rows(with_scores(tables.read(folder / f"{name}.parquet"), folder, name, rule)):
            value, label = row.score(policy.score), given.get((row.uid, row.text))
            if label is not None and value is not None:
                labelled.append((float(value), label.verdict == "right"))
    right = [score for score, is_right in labelled if is_right]
    wrong = [score for score, is_right in labelled if not is_right]
    if len(right) < MIN_RIGHT or not wrong:
        raise DataError(
            f"{len(right)} texts of these shards are labelled right and {len(wrong)} wrong, in random order;"
            f" at least {MIN_RIGHT} right and 1 wrong are needed. Give more:"
            f" capfilt review {labels.run_folder_of(source)}"
        )
    calibration = matching.calibrate(right, wrong, policy.recall)
    figures_of_labels = labels.precision_and_recall(labelled, calibration.threshold)
    return {"score": policy.score, **asdict(calibration), "labels": figures_of_labels}
