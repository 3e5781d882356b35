"""The log of a training: means of the losses and how fast it goes, a JSON line every `log_every` steps.

Figures are those of all ranks: losses their mean, unreadable pictures their sum, and of the waits for data the longest,
since the others wait for that rank.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from capfilt.data.loading.loader import Batch
from capfilt.errors import ModelError
from capfilt.objectives.collectives import all_reduce_sum
from capfilt.objectives.losses.itm import Alarm
from capfilt.storage import documents
from capfilt.storage.append_log import RemoteLog, append_line
from capfilt.storage.atomic import atomic, write_json
from capfilt.storage.paths import StoragePath
from capfilt.storage.remote_path import RemotePath
from capfilt.training.config import TrainConfig
from capfilt.training.distributed import data_parallel
from capfilt.training.flops import Speed

NOT_FINITE = "not_finite.json"

OnLog = Callable[[dict[str, Any]], None]
"""Gets each line of the log as it is written: where other meters connect."""


class StepLog:
    """Means of the losses, one JSON line every `log_every` steps, written by rank 0 and passed to `on_line`.

    Lines past step `done` tell of steps that a kill undid and that are done again: they are taken out.
    """

    def __init__(
        self,
        path: StoragePath,
        config: TrainConfig,
        done: int = 0,
        speed: Speed | None = None,
        on_line: OnLog | None = None,
    ):
        self.path, self.config, self.speed, self.on_line = path, config, speed, on_line
        self.alarm = Alarm(config.steps, match_share=config.objectives.match_share)
        self.warned = False
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        """How many steps had each figure."""
        self.count = self.skipped = self.unreadable = 0
        self.spoilt: list[tuple[int, tuple[str, ...]]] = []
        self.since = time.perf_counter()
        self.waited = 0.0
        self.since_mean: dict[str, Tensor] = {}
        self.taken = 0
        self.resumed = done
        self.unsaved = 0
        """States in a row that could not be written; in the lines where there are any."""
        kept = self._take_up(done) if data_parallel.rank() == 0 and path.exists() else b""
        self.journal = RemoteLog(path, kept) if isinstance(path, RemotePath) and data_parallel.rank() == 0 else None

    def _take_up(self, done: int) -> bytes:
        kept = []
        for entry in documents.read_json_lines(self.path, sys.maxsize - 1):
            if isinstance(step := entry.get("step"), int) and step <= done:
                kept.append(json.dumps(entry).encode() + b"\n")
                self._stuck(entry)
        with atomic(self.path) as file:
            file.writelines(kept)
        return b"".join(kept)

    def __enter__(self) -> StepLog:
        return self

    def __exit__(self, *raised: Any) -> None:
        if self.journal is not None:
            self.journal.__exit__(*raised)

    def _stuck(self, entry: dict[str, float]) -> bool:
        return isinstance(entry.get("itm"), int | float) and self.alarm.stuck(int(entry["step"]), entry["itm"])

    @property
    def _clock(self) -> float:
        return time.perf_counter()

    def mean_loss(self) -> float | None:
        """The mean of the total loss since this was called before, for `keep_best`; None where no step was taken.

        Every rank asks at the same step.
        """
        sums, taken = self.since_mean, self.taken
        self.since_mean, self.taken = {}, 0
        if not sums:
            return None
        weights = self.config.objectives.losses
        (total,) = mean([torch.stack([sums[name] * weight for name, weight in weights.items() if name in sums]).sum()])
        return total / taken

    def waiting(self) -> _Wait:
        """Time what happens inside as waiting for data."""
        return _Wait(self)

    def add(self, step: int, figures: dict[str, Tensor], unreadable: int, lr: float) -> None:
        """Add one step; write a line when it is due. Figures stay on the device until then."""
        for name, value in figures.items():
            value = value.detach()
            self.sums[name] = self.sums[name] + value if name in self.sums else value
            self.counts[name] = self.counts.get(name, 0) + 1
            if self.config.keep_best:
                self.since_mean[name] = self.since_mean[name] + value if name in self.since_mean else value
        self.count += 1
        self.taken += 1
        self.unreadable += unreadable
        self.spoilt = []
        self._write_if_due(step + 1, lr)

    def skip_step(self, step: int, batch: Batch, lr: float) -> None:
        """Count a step that was not taken because its gradients are not finite.

        Raises:
            ModelError: `skips` steps in a row were left out before; the images of all are in `NOT_FINITE` then.
        """
        self.skipped += 1
        self.unreadable += batch.unreadable
        self.spoilt.append((step + 1, batch.uids))
        if len(self.spoilt) > self.config.skips:
            self._give_up(step + 1)
        self._write_if_due(step + 1, lr)

    def _give_up(self, step: int) -> None:
        path, every = self.path.with_name(NOT_FINITE), data_parallel.of_all(self.spoilt)
        if data_parallel.rank() == 0:
            batches = [
                {"step": skipped[0][0], "uids": [uid for _, uids in skipped for uid in uids]}
                for skipped in zip(*every, strict=True)
            ]
            write_json(path, {"step": step, "batches": batches})
        data_parallel.barrier()  # the first rank to raise ends the others
        raise ModelError(
            f"the gradients of {len(self.spoilt)} steps in a row, up to step {step}, are not finite. Go on from the "
            "newest state with a lower optimizer.lr, or with optimizer.clip, in another folder: --fork NEW_OUT. "
            f"The images of those steps are in {path}."
        )

    def _write_if_due(self, step: int, lr: float) -> None:
        if step % self.config.log_every == 0 or step == self.config.steps:
            self._write(step, lr)

    def _write(self, step: int, lr: float) -> None:
        seconds, steps = self._clock - self.since, self.count + self.skipped
        sums = mean(list(self.sums.values()))
        means = {name: value / self.counts[name] for name, value in zip(self.sums, sums, strict=True)}
        waited, unreadable = zip(*data_parallel.of_all((self.waited, self.unreadable)), strict=True)
        line = {
            "step": step,
            "steps": self.config.steps,
            **{name: round(value, 5) for name, value in means.items()},
            "lr": lr,
            "step_seconds": round(seconds / steps, 4),
            "samples_per_second": round(steps * self.config.loader.batch_size / seconds, 1),
            **(self.speed.metrics(steps, seconds) if self.speed is not None else {}),
            "data_wait": round(max(waited) / seconds, 4),
            "unreadable": sum(unreadable),
            "skipped": self.skipped,
            **({"unsaved": self.unsaved} if self.unsaved else {}),
            **({"resumed": self.resumed} if self.resumed else {}),
        }
        if data_parallel.rank() == 0:
            if self._stuck(line):
                line["itm_stuck"] = True
                self._warn(step)
            self._add(json.dumps(line).encode() + b"\n")
            if self.on_line is not None:
                self.on_line(line)
        self.sums, self.counts, self.count, self.skipped, self.unreadable = {}, {}, 0, 0, 0
        self.since, self.waited, self.resumed = self._clock, 0.0, 0

    def _add(self, line: bytes) -> None:
        if self.journal is None:
            append_line(self.path, line)
        else:
            self.journal.add(line)

    def _warn(self, step: int) -> None:
        if not self.warned:
            logging.getLogger(__name__).warning(
                "step %d: itm has stood at %.4f since step %d, which is guessing: lower optimizer.lr, "
                "raise loader.batch_size, or check whether the texts belong to the images",
                step, self.alarm.level, self.alarm.moved,
            )  # fmt: skip
        self.warned = True


def mean(figures: list[Tensor]) -> list[float]:
    """The means over ranks."""
    if not figures:
        return []
    return (all_reduce_sum(torch.stack([figure.float() for figure in figures])) / data_parallel.world_size()).tolist()


class _Wait:
    """A stopwatch around the loader."""

    def __init__(self, log: StepLog):
        self.log = log

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.log.waited += time.perf_counter() - self.start
