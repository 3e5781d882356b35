"""The Ray Train adapter: a function of a config, run by many workers with torch.distributed set up for them.

Ray's checkpoints are not used: the function resumes from files of its own, and after a death is called again.
Trainings run inside an actor of ours, the conductor. So the driver is free to draw progress, and ends a
training (Ctrl-C included) by killing that one actor; Ray takes down what it owned.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from capfilt.cluster.session import Session, Trouble
from capfilt.errors import CapfiltError, ClusterError
from capfilt.storage import write_guard
from capfilt.storage.paths import StoragePath

Function = Callable[[dict[str, Any]], None]

TRIES = 3
"""How often a training is begun whose workers die before it got any further: one of days may lose some every hour. An
exception of the function ends it at the first."""

START_TRIES = 10
"""How often Ray Train waits its minute for a cluster to find room, before that is an error."""

POLL_SECONDS = 0.5

_TRAIN = {
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths keep their meaning
    "RAY_TRAIN_METRICS_ENABLED": "0",  # our log.jsonl has them
}

_TRAIN_ALONE = {
    # How late the end of a training is seen: 2 s by default.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    # A process that watches for nodes being taken away: the only one is ours.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}


_NO_ANSWER = re.compile(r"closed by peer|reset by peer|[Cc]onnection refused|Broken pipe|NCCL|gloo|[Tt]imed out")
"""What torch.distributed says, in a plain RuntimeError, of a process that has gone."""


class Fault(Exception):
    """What the function raised, on its way from a training worker to the driver; `unanswered` where it was another
    worker that did not answer."""

    def __init__(self, trouble: Trouble, unanswered: bool = False) -> None:
        super().__init__(trouble, unanswered)
        self.trouble, self.unanswered = trouble, unanswered

    def __str__(self) -> str:
        return self.trouble.line


def fit(
    session: Session,
    function: Function,
    config: dict[str, Any],
    workers: int,
    cpus: float,
    gpus: float,
    storage: StoragePath,
    name: str,
    poll: Callable[[], float] | None = None,
) -> None:
    """Run `function(config)` in `workers` processes of `cpus` and `gpus` each, and wait for all of them.

    Inside, torch.distributed is initialised (gloo, or nccl with GPUs), with RANK and its kin set; in a
    local session there is one worker, this process, and no torch.distributed. Paths in `config` must be
    absolute: a worker may start in another folder. `storage`/`name` takes a few small files of Ray's; every
    node must see it, so a store will do. `poll` is called twice a second by the caller's own thread; once, at
    the end, in a local session, where that thread is the one at work. What it answers grows while the function
    gets on.
    A CapfiltError of the function is raised as it was, anything else as a ClusterError with the traceback in
    its notes.
    """
    if workers < 1:
        raise ClusterError(f"{name} was given workers={workers}. Allowed: 1 or more.")
    if session.local:
        _here(function, config, workers, name)
        if poll is not None:
            poll()
        return
    _check_room(session, workers, cpus, gpus, name)
    size = {"workers": workers, "cpus": cpus, "gpus": gpus}
    place = {"storage": str(storage.absolute()), "name": name}
    function = _fenced(function, write_guard.active_guards())
    deaths, reached = 0, 0.0
    while (trouble := _conducted(session, poll, (function, config, size, place))) is not None:
        if not trouble.died:
            raise trouble.as_error(name)
        now = poll() if poll is not None else 0.0
        deaths, reached = (deaths + 1, reached) if now <= reached else (1, now)
        if deaths == TRIES:
            error = ClusterError(
                f"{name} lost a worker {TRIES} times and got no further in between, last so: {trouble.line}"
            )
            if trouble.trace:
                error.add_note(trouble.trace)
            raise error


def _here(function: Function, config: dict[str, Any], workers: int, name: str) -> None:
    if workers != 1:
        raise ClusterError(
            f"{name} asks for {workers} workers, and a local session is one process. "
            'Set workers to 1, or use the address "start".'
        )
    try:
        function(config)
    except CapfiltError:
        raise
    except Exception as error:
        raise Trouble.of(error).as_error(name) from error


def _check_room(session: Session, workers: int, cpus: float, gpus: float, name: str) -> None:
    fits = session.fits(cpus, gpus)
    # A cluster that is not ours may grow; Ray Train waits for that, START_TRIES minutes long.
    if fits < workers and session.owned:
        raise ClusterError(
            f"{name} asks for {workers} workers of {cpus:g} CPUs and {gpus:g} GPUs, and {fits} fit here. "
            "Ask for fewer or smaller ones."
        )


def _conducted(
    session: Session, poll: Callable[[], float] | None, task: tuple[Function, dict[str, Any], Any, Any]
) -> Trouble | None:
    import ray

    if session.conductor is None:
        session.conductor = _conductor(session)
    answered = False
    reserved = _reserved()
    try:
        call = session.conductor.fit.options(name=f"train {task[3]['name']}").remote(*task)
        while not ray.wait([call], timeout=POLL_SECONDS)[0]:
            if poll is not None:
                poll()
        trouble: Trouble | None = ray.get(call)
        answered = trouble is None or not trouble.died
    except ray.exceptions.RayActorError as error:
        trouble = Trouble.death(error)
    finally:
        if not answered:
            conductor, session.conductor = session.conductor, None
            ray.kill(conductor)  # and with it all the actors that it owns
        _release(_reserved() - reserved)
    return trouble


def _reserved() -> set[str]:
    """The placement groups that this job holds; their ids end in the job's."""
    import ray

    job = ray.get_runtime_context().get_job_id()
    table = ray.util.placement_group_table()
    return {key for key, group in table.items() if key.endswith(job) and group["state"] != "REMOVED"}


def _release(groups: set[str]) -> None:
    """Give back the cores that a dead actor reserved. Ray itself keeps them until the driver ends."""
    from ray import PlacementGroupID
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    for group in groups:
        remove_placement_group(PlacementGroup(PlacementGroupID.from_hex(group)))


def _conductor(session: Session) -> Any:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # Beside the driver where that can be: Ray's controller and its files follow the conductor.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    actor = ray.remote(num_cpus=0, max_restarts=0)(Conductor).options(scheduling_strategy=here)
    return actor.remote(session.owned)


class Conductor:
    """The actor that calls Ray Train. Ray's settings are environment variables, and here they are our own."""

    def __init__(self, alone: bool) -> None:
        self._alone = alone
        environment = _TRAIN | _TRAIN_ALONE if alone else _TRAIN
        for key, value in environment.items():
            os.environ.setdefault(key, value)

    def __repr__(self) -> str:
        return "conductor"

    def fit(
        self, function: Function, config: dict[str, Any], size: dict[str, Any], place: dict[str, str]
    ) -> Trouble | None:
        """One training, from start to end."""
        from ray.train import FailureConfig, RunConfig, ScalingConfig

        # max_failures=0: Ray would also repeat what the function raised, so fit() in the driver begins again.
        failure = FailureConfig(max_failures=0, controller_failure_limit=START_TRIES)
        trainer = _trainer_kind(self._alone)(
            _guarded(function, size["cpus"]),
            train_loop_config=config,
            scaling_config=ScalingConfig(
                num_workers=size["workers"],
                use_gpu=size["gpus"] > 0,
                resources_per_worker={"CPU": size["cpus"], "GPU": size["gpus"]},
            ),
            run_config=RunConfig(name=place["name"], failure_config=failure, **_storage(place["storage"])),
        )
        return _run(trainer)


def _storage(where: str) -> dict[str, Any]:
    """How Ray is told of a place. It knows fewer stores than fsspec, but takes a file system."""
    if "://" not in where:
        return {"storage_path": where}
    import fsspec
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    class Handler(FSSpecHandler):
        """A folder on a store is there when something is in it; s3fs would look for the bucket, or make it."""

        def create_dir(self, path: str, recursive: bool) -> None:
            """Nothing."""

    files, path = fsspec.core.url_to_fs(where, use_listings_cache=False)
    return {"storage_path": path, "storage_filesystem": PyFileSystem(Handler(files))}


def _trainer_kind(alone: bool) -> Any:
    from ray.train.torch import TorchTrainer

    if not alone:
        return TorchTrainer

    class Lean(TorchTrainer):
        """Starts two processes fewer: one serves Ray Datasets, of which there are none,
        one outlives the controller to clear up after it, and here Ray itself ends with the driver.

        The method is Ray's own affair. Where a later Ray has none of that name, the start is slower again.
        """

        def _create_default_callbacks(self) -> list[Any]:
            needless = ("DatasetsCallback", "PlacementGroupCleanerCallback")
            callbacks: list[Any] = super()._create_default_callbacks()
            return [callback for callback in callbacks if type(callback).__name__ not in needless]

    return Lean


def _run(trainer: Any) -> Trouble | None:
    from ray.exceptions import RayError, RayTaskError
    from ray.train import ControllerError, WorkerGroupError

    try:
        trainer.fit()
    except WorkerGroupError as error:
        return _verdict(list(error.worker_failures.values()))
    except ControllerError as error:
        # A worker that dies while its group still starts, for its peers have begun.
        cause = error.controller_failure
        gone = isinstance(cause, RayError) and not isinstance(cause, RayTaskError)
        return Trouble.death(cause) if gone else Trouble.of(cause)
    return None


def _verdict(failures: list[Exception]) -> Trouble:
    """The failure that explains the others: when a worker dies, its peers fail for want of an answer."""
    troubles = [failure.trouble for failure in failures if isinstance(failure, Fault)]
    for trouble in troubles:
        if trouble.refusal is not None:
            return trouble
    for failure in failures:
        if not isinstance(failure, Fault):
            return Trouble.death(failure)
    for failure in failures:
        if isinstance(failure, Fault) and not failure.unanswered:
            return failure.trouble
    return replace(troubles[0], died=True)  # of the worker that did not answer nothing is known yet


def _fenced(function: Function, fences: Sequence[write_guard.WriteGuard]) -> Function:
    """The function, checked by the driver's fences wherever it runs."""

    def attempt(config: dict[str, Any]) -> None:
        write_guard.activate(fences)
        function(config)

    return attempt


def _guarded(function: Function, cpus: float) -> Function:
    def attempt(config: dict[str, Any]) -> None:
        import torch

        torch.set_num_threads(max(1, int(cpus)))
        try:
            function(config)
        except Exception as error:
            raise Fault(Trouble.of(error), _unanswered(error)) from error

    return attempt


def _unanswered(error: Exception) -> bool:
    """Whether this is what torch.distributed raises where another process has gone."""
    import torch.distributed as dist

    return isinstance(error, dist.DistError) or (type(error) is RuntimeError and bool(_NO_ANSWER.search(str(error))))
