"""The Ray Train adapter: runs a function in many workers with torch.distributed initialised.

Ray's checkpoints are not used: the function resumes from its own files, and is called again after a death. Ray Train
runs inside an actor, so that the driver is free to show progress, and ends a training (on Ctrl-C too) by killing that
one actor; Ray ends the workers that it started.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from capfilt.cluster.failures import Failure
from capfilt.cluster.session import Session
from capfilt.cluster.training_actor import TrainingActor
from capfilt.cluster.training_group import Function
from capfilt.errors import CapfiltError, ClusterError
from capfilt.storage import write_guard
from capfilt.storage.paths import StoragePath

TRIES = 3
"""How often a training is started whose workers die without progress in between: a long one may lose some every hour.
An exception of the function ends it at once."""

POLL_SECONDS = 0.5


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

    Inside, torch.distributed is initialised (gloo, or nccl with GPUs), with RANK, WORLD_SIZE and so on set. In a local
    session there is one worker, this process, and no torch.distributed.

    Args:
        config: its paths must be absolute, since a worker may start in another folder.
        storage: a folder that every node sees, on a store for instance: `storage`/`name` gets a few small files of Ray.
        poll: called twice a second in the caller's thread, and once at the end in a local session, where that thread
            is busy. What it returns grows with the progress of the function.

    Raises:
        CapfiltError: one of the function as it was; anything else as a ClusterError with the traceback in its notes.
    """
    if workers < 1:
        raise ClusterError(f"{name} was given workers={workers}. Allowed: 1 or more.")
    if session.local:
        _run_locally(function, config, workers, name)
        if poll is not None:
            poll()
        return
    _check_room(session, workers, cpus, gpus, name)
    size = {"workers": workers, "cpus": cpus, "gpus": gpus}
    folder = {"storage": str(storage.absolute()), "name": name}
    function = _with_guards(function, write_guard.active_guards())
    deaths, reached = 0, 0.0
    while (failure := _run_in_actor(session, poll, (function, config, size, folder))) is not None:
        if not failure.died:
            raise failure.to_exception(name)
        now = poll() if poll is not None else 0.0
        deaths, reached = (deaths + 1, reached) if now <= reached else (1, now)
        if deaths == TRIES:
            error = ClusterError(
                f"{name} lost a worker {TRIES} times and got no further in between, last so: {failure.message}"
            )
            if failure.traceback:
                error.add_note(failure.traceback)
            raise error


def prepare(
    session: Session,
    workers: int,
    cpus: float,
    gpus: float,
    storage: StoragePath,
    name: str,
    modules: Sequence[str] = (),
) -> None:
    """Start the processes of the next `fit` of the same arguments while something else is done, on a Ray of this
    command and without GPUs; elsewhere nothing. They import `modules`, what its function will need. What goes wrong
    with them is an error of that `fit`."""
    if not session.started_ray or gpus or session.training_actor is not None or session.capacity(cpus) < workers:
        return
    session.others_reserved, session.training_actor = _reserved(), _start_actor(session, workers, modules)
    size, folder = {"workers": workers, "cpus": cpus, "gpus": gpus}, {"storage": str(storage.absolute()), "name": name}
    session.training_actor.prepare.remote(size, folder)


def _run_locally(function: Function, config: dict[str, Any], workers: int, name: str) -> None:
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
        raise Failure.of_exception(error).to_exception(name) from error


def _check_room(session: Session, workers: int, cpus: float, gpus: float, name: str) -> None:
    capacity = session.capacity(cpus, gpus)
    # A running cluster may grow: Ray Train waits START_TRIES minutes for that.
    if capacity < workers and session.started_ray:
        raise ClusterError(
            f"{name} asks for {workers} workers of {cpus:g} CPUs and {gpus:g} GPUs, and {capacity} fit here. "
            "Ask for fewer or smaller ones."
        )


def _run_in_actor(
    session: Session, poll: Callable[[], float] | None, task: tuple[Function, dict[str, Any], Any, Any]
) -> Failure | None:
    import ray

    if session.training_actor is None or not session.started_ray:
        session.others_reserved = _reserved()
    if session.training_actor is None:
        session.training_actor = _start_actor(session, workers=task[2]["workers"])
    ended = False
    try:
        call = session.training_actor.fit.options(name=f"train {task[3]['name']}").remote(*task)
        while not ray.wait([call], timeout=POLL_SECONDS)[0]:
            if poll is not None:
                poll()
        failure: Failure | None = ray.get(call)
        ended = failure is None or not failure.died
    except ray.exceptions.RayActorError as error:
        failure = Failure.of_death(error)
    finally:
        if not ended:
            end_training_actor(session)
        elif not session.started_ray:
            _release(_reserved() - session.others_reserved)
    return failure


def end_training_actor(session: Session) -> None:
    """End the actor that runs trainings and the processes that it keeps, if there are any."""
    import ray

    if session.training_actor is not None:
        ray.kill(session.training_actor)  # and with it all the actors that it started
        session.training_actor = None
        _release(_reserved() - session.others_reserved)


def _reserved() -> set[str]:
    """The placement groups of this job; their ids end in the id of the job."""
    import ray

    job = ray.get_runtime_context().get_job_id()
    table = ray.util.placement_group_table()
    return {key for key, group in table.items() if key.endswith(job) and group["state"] != "REMOVED"}


def _release(groups: set[str]) -> None:
    """Release the CPUs that a dead actor reserved, which Ray itself keeps until the driver ends."""
    from ray import PlacementGroupID
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    for group in groups:
        remove_placement_group(PlacementGroup(PlacementGroupID.from_hex(group)))


def _start_actor(session: Session, workers: int, modules: Sequence[str] = ()) -> Any:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # On the node of the driver if possible: Ray's controller and its files are on the node of this actor.
    strategy = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    # Calls at once: a training, what its processes say, and all of them asking for the next.
    calls = workers + 2 if session.started_ray else 1
    actor = ray.remote(num_cpus=0, max_restarts=0)(TrainingActor)
    return actor.options(scheduling_strategy=strategy, max_concurrency=calls).remote(session.started_ray, modules)


def _with_guards(function: Function, guards: Sequence[write_guard.WriteGuard]) -> Function:
    """The function with the write guards of the driver active wherever it runs."""

    def attempt(config: dict[str, Any]) -> None:
        write_guard.activate_only(guards)
        function(config)

    return attempt
