"""Training processes that take one training after the other: starting them takes longer than a short training.

Ray Train runs one function in its processes, from start to end. Here that function is a loop, which asks the actor that
called Ray Train for the next training, until it is told that there is none.
"""

from __future__ import annotations

import gc
import importlib
import threading
from collections.abc import Callable
from typing import Any

from capfilt.cluster.failures import Failure

Function = Callable[[dict[str, Any]], None]

ASK_SECONDS = 2.0
"""Seconds after which an idle process asks for a training again; one that comes meanwhile is its answer at once."""

ENDED = Failure("its processes ended before it was done", died=True)
"""Of a training whose processes ended without a failure of their own, for instance because another size was wanted."""


class TrainingGroup:
    """The trainings of one group of processes. A failure ends the group: nobody knows what it left in them."""

    def __init__(self, size: dict[str, Any], run: Callable[[], Failure | None]):
        """`size`: its number of processes and their resources; `run` starts them and returns when all have ended."""
        self.size = size
        self._changed = threading.Condition()
        self._trainings: list[tuple[Function, dict[str, Any]] | None] = []  # all that there were; None = end
        self._num_done: dict[int, int] = {}  # by rank
        self._failure: Failure | None = None
        self.alive = True
        """Whether its processes can take another training."""
        self._thread = threading.Thread(target=self._run, args=(run,), name="training group", daemon=True)
        self._thread.start()

    def train(self, function: Function, config: dict[str, Any]) -> Failure | None:
        """Run `function(config)` in all of its processes; returns when all are done, or the group has failed."""
        with self._changed:
            self._trainings.append((function, config))
            self._changed.notify_all()
            wanted = len(self._trainings)
            self._changed.wait_for(lambda: self._is_done(wanted) or not self.alive)
            return None if self._is_done(wanted) else self._failure or ENDED

    def end(self) -> None:
        """End its processes, which are idle."""
        with self._changed:
            self._trainings.append(None)
            self._changed.notify_all()
        self._thread.join()

    def training(self, number: int) -> tuple[Function, dict[str, Any]] | bool | None:
        """For its processes: the training of this number; True where there is none yet, None to end."""
        with self._changed:
            there = self._changed.wait_for(lambda: number < len(self._trainings), ASK_SECONDS)
            return self._trainings[number] if there else True

    def done(self, rank: int, number: int) -> None:
        """For its processes: this rank is done with so many trainings."""
        with self._changed:
            self._num_done[rank] = number
            self._changed.notify_all()

    def _is_done(self, number: int) -> bool:
        return len(self._num_done) == self.size["workers"] and min(self._num_done.values()) >= number

    def _run(self, run: Callable[[], Failure | None]) -> None:
        try:
            failure = run()
        except Exception as error:  # noqa: BLE001 (it is raised in the driver)
            failure = Failure.of_exception(error)
        with self._changed:
            self._failure, self.alive = failure, False
            self._changed.notify_all()


def take_trainings(config: dict[str, Any]) -> None:
    """What a process of a group runs: one training after the other, as the actor `config["owner"]` hands them out;
    `config["modules"]` are imported before the first."""
    import ray
    from ray.train import get_context

    for module in config["modules"]:
        importlib.import_module(module)
    owner, rank, number = config["owner"], get_context().get_world_rank(), 0
    while (training := ray.get(owner.training.remote(number))) is not None:
        if training is True:
            continue
        function, settings = training
        function(settings)
        del function, settings, training
        gc.collect()  # a training's weights hang on its hooks in a circle, and would lie beside those of the next
        number += 1
        ray.get(owner.done.remote(rank, number))
