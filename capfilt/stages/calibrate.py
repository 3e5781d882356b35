"""calibrate: set a filter's threshold on human validation pairs, or on labels that people gave to the texts themselves.

A step of bootstrap and of select, not a verb.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any, ClassVar

import capfilt.data.annotations as tables
from capfilt.cluster.session import Session
from capfilt.cluster.worker_pool import Resources
from capfilt.config import Config
from capfilt.data import labels, shards
from capfilt.data.policy import PolicyConfig
from capfilt.errors import DataError
from capfilt.evaluation.metrics import matching
from capfilt.inference.device import Compute, autocast
from capfilt.models.checkpoints import store
from capfilt.runs import round_figures
from capfilt.runs.ledger import Ledger, fingerprint
from capfilt.runs.progress import Progress
from capfilt.runs.tally import Tally
from capfilt.stages.runner import run_stage
from capfilt.storage.atomic import write_json
from capfilt.storage.paths import StoragePath


class CalibrateJob(Config):
    """A filter before human validation pairs; its outcome is `out/calibration.json`."""

    loads: ClassVar[str] = "the filter to load and to score the pairs"

    out: StoragePath
    model: StoragePath
    shards: tuple[str, ...]
    contents: dict[str, str]
    """The sha256 of each shard, by its url."""
    score: str
    recall: float
    batch_size: int = 64
    max_length: int = 35
    """Tokens of a text; as when annotating, since the threshold is for those scores."""
    compute: Compute

    @property
    def name(self) -> str:
        """The stage."""
        return "calibrate"

    def identity(self, item: str) -> str:
        """The filter's weights, the validation shards and the settings."""
        return fingerprint(
            item,
            store.fingerprint(self.model),
            [(shards.name(url), self.contents[url]) for url in self.shards],
            self.model_dump(mode="json", exclude={"out", "model", "shards", "contents", "batch_size"}),
        )

    def open(self) -> Callable[[str], str]:
        """Load the filter."""
        from capfilt.evaluation import evaluate
        from capfilt.evaluation.eval_set import encode_pairs
        from capfilt.inference.filters import local_filter
        from capfilt.inference.local_model import LocalModel

        device, dtype = self.compute.open(), self.compute.dtype
        filter_ = local_filter(LocalModel.load(self.model, device, dtype), self.max_length)

        def work(item: str) -> str:
            with autocast(device, dtype):
                pairs = encode_pairs(filter_.local, self.shards, self.batch_size, device)
                calibration = evaluate.calibrate(filter_, pairs, self.score, self.recall, self.batch_size)
            path = self.out / "calibration.json"
            write_json(path, {"score": self.score, **asdict(calibration)})
            Ledger(self.out, self.name).commit(item, self.identity(item), [path], Tally.zero())
            return f"{self.score} >= {calibration.threshold:.3f}"

        return work


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
    for name in names:
        for row in tables.rows(tables.read(source / "annotations" / f"{name}.parquet")):
            value, label = (row.itm if policy.score == "itm" else row.itc), given.get((row.uid, row.text))
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
