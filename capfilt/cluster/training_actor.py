"""The actor that calls Ray Train, and what its training workers run.

Ray Train is configured by environment variables: in an actor of its own they affect nothing else.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from capfilt.cluster.failures import Failure
from capfilt.cluster.training_group import Function, TrainingGroup, take_trainings
from capfilt.errors import is_out_of_memory

START_TRIES = 10
"""How often Ray Train waits a minute for a cluster to have room, before that is an error."""

_TRAIN_ENV = {
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths keep their meaning
    "RAY_TRAIN_METRICS_ENABLED": "0",  # our log.jsonl has them
}

_SINGLE_NODE_ENV = {
    # The delay after which the end of the processes is noticed: 2 s by default.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",
    # A process that watches for preemption of nodes: a Ray that we started has only this one.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}


_PEER_GONE = re.compile(r"closed by peer|reset by peer|[Cc]onnection refused|Broken pipe|NCCL|gloo|[Tt]imed out")
"""What torch.distributed says, in a plain RuntimeError, when another process has gone."""


class TrainingFailure(Exception):
    """What the function raised in a training worker, for the driver; `peer_gone`: because another worker has gone."""

    def __init__(self, failure: Failure, peer_gone: bool = False) -> None:
        super().__init__(failure, peer_gone)
        self.failure, self.peer_gone = failure, peer_gone

    def __str__(self) -> str:
        return self.failure.message


class TrainingActor:
    """The actor that calls Ray Train."""

    def __init__(self, single_node: bool, modules: Sequence[str] = ()) -> None:
        """`single_node`: on a Ray that this command started. `modules`: what kept processes import at first."""
        self._single_node, self._modules = single_node, modules
        self._group: TrainingGroup | None = None
        self._starts = threading.Lock()
        environment = _TRAIN_ENV | _SINGLE_NODE_ENV if single_node else _TRAIN_ENV
        for key, value in environment.items():
            os.environ.setdefault(key, value)

    def __repr__(self) -> str:
        return "training"

    def fit(
        self, function: Function, config: dict[str, Any], size: dict[str, Any], folder: dict[str, str]
    ) -> Failure | None:
        """Run one training from start to end.

        On a Ray of this command its processes are kept for the next training of their number and size, unless they hold
        GPUs, which other stages want in between; it has no other use for CPUs that they reserve.
        """
        attempt = _with_failures(function, size["cpus"])
        if self._single_node and size["gpus"] == 0:
            return self.group(size, folder).train(attempt, config)
        if self._group is not None and self._group.alive:
            self._group.end()
        return _run(self._trainer(attempt, config, size, folder))

    def prepare(self, size: dict[str, Any], folder: dict[str, str]) -> None:
        """Start the processes of a training that is to come."""
        self.group(size, folder)

    def group(self, size: dict[str, Any], folder: dict[str, str]) -> TrainingGroup:
        """The processes that are kept, started if there are none of this number and size."""
        import ray

        with self._starts:
            if self._group is not None and self._group.alive and self._group.size != size:
                self._group.end()
            if self._group is None or not self._group.alive:
                config = {"owner": ray.get_runtime_context().current_actor, "modules": self._modules}
                trainer = self._trainer(take_trainings, config, size, folder)
                self._group = TrainingGroup(size, partial(_run, trainer))
            return self._group

    def training(self, number: int) -> tuple[Function, dict[str, Any]] | bool | None:
        """The training of this number, for the processes of the group (`TrainingGroup.training`)."""
        assert self._group is not None
        return self._group.training(number)

    def done(self, rank: int, number: int) -> None:
        """A process of the group is done with so many trainings."""
        assert self._group is not None
        self._group.done(rank, number)

    def _trainer(self, function: Function, config: dict[str, Any], size: dict[str, Any], folder: dict[str, str]) -> Any:
        from ray.train import FailureConfig, RunConfig, ScalingConfig

        # max_failures=0: Ray would also retry after an exception of the function, so `fit` in the driver retries.
        failure = FailureConfig(max_failures=0, controller_failure_limit=START_TRIES)
        return _trainer_class(self._single_node)(
            function,
            train_loop_config=config,
            scaling_config=ScalingConfig(
                num_workers=size["workers"],
                use_gpu=size["gpus"] > 0,
                resources_per_worker={"CPU": size["cpus"], "GPU": size["gpus"]},
            ),
            run_config=RunConfig(name=folder["name"], failure_config=failure, **_storage(folder["storage"])),
        )


def _storage(path: str) -> dict[str, Any]:
    """Ray's settings for a storage folder. Ray knows fewer stores than fsspec, but accepts a file system."""
    if "://" not in path:
        return {"storage_path": path}
    import fsspec
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    class Handler(FSSpecHandler):
        """A folder on a store exists when something is in it; s3fs would check for the bucket, or create it."""

        def create_dir(self, path: str, recursive: bool) -> None:
            """Nothing."""

    files, name = fsspec.core.url_to_fs(path, use_listings_cache=False)
    return {"storage_path": name, "storage_filesystem": PyFileSystem(Handler(files))}


def _trainer_class(single_node: bool) -> Any:
    from ray.train.torch import TorchTrainer

    if not single_node:
        return TorchTrainer

    class SingleNodeTrainer(TorchTrainer):
        """Starts three processes fewer: one serves Ray Datasets, which are not used, one cleans up after a controller
        that died, and here Ray itself ends with the driver, and one asks an autoscaler for nodes, and here is none.

        The methods are internal to Ray. Where a later Ray has none of these names, the start is slower again.
        """

        def _create_default_callbacks(self) -> list[Any]:
            not_needed = ("DatasetsCallback", "PlacementGroupCleanerCallback")
            callbacks: list[Any] = super()._create_default_callbacks()
            return [callback for callback in callbacks if type(callback).__name__ not in not_needed]

        def _initialize_and_run_controller(self, *unnamed: Any, **parts: Any) -> Any:
            policy = parts.get("scaling_policy")
            for name in ("_send_resource_request", "_maybe_send_resource_request", "_cancel_resource_request"):
                if hasattr(policy, name):
                    setattr(policy, name, _nothing)
            return super()._initialize_and_run_controller(*unnamed, **parts)

    return SingleNodeTrainer


def _nothing(*_: object, **__: object) -> None:
    """Of the scaling policy of a node by itself."""


def _run(trainer: Any) -> Failure | None:
    from ray.exceptions import RayError, RayTaskError
    from ray.train import ControllerError, WorkerGroupError

    try:
        trainer.fit()
    except WorkerGroupError as error:
        return _explaining_failure(list(error.worker_failures.values()))
    except ControllerError as error:
        # A worker that died while its group was still starting.
        cause = error.controller_failure
        died = isinstance(cause, RayError) and not isinstance(cause, RayTaskError)
        return Failure.of_death(cause) if died else Failure.of_exception(cause)
    return None


def _explaining_failure(failures: list[Exception]) -> Failure:
    """The failure that explains the others: when a worker dies, its peers fail too, because it does not answer."""
    raised = [error for error in failures if isinstance(error, TrainingFailure)]
    for error in raised:
        if error.failure.user_error is not None:
            return error.failure
    for failure in failures:
        if not isinstance(failure, TrainingFailure):
            return Failure.of_death(failure)
    for error in raised:
        if not error.peer_gone:
            return error.failure
    return replace(raised[0].failure, died=True)  # Ray does not know yet which worker has gone


def _with_failures(function: Function, cpus: float) -> Function:
    def attempt(config: dict[str, Any]) -> None:
        import torch

        torch.set_num_threads(max(1, int(cpus)))
        try:
            function(config)
        except Exception as error:
            raise TrainingFailure(Failure.of_exception(error), _peer_gone(error)) from error

    return attempt


def _peer_gone(error: Exception) -> bool:
    """Whether torch.distributed raised this because another process has gone."""
    import torch.distributed as dist

    if is_out_of_memory(error):  # NCCL says so too, and a new worker would have no more of it
        return False
    return isinstance(error, dist.DistError) or (type(error) is RuntimeError and bool(_PEER_GONE.search(str(error))))
