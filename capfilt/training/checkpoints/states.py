"""The states of a training, so that a killed one goes on where it was.

A state has the task (model, momentum copy, queues), the optimizer's moments and the number of steps done. Nothing
else is needed: the order of the data and every random draw of a step are functions of the seed and the step. Tensors
go by the names of the parameters that they belong to, so that a state of whole weights (DDP) is taken up by processes
that share them (FSDP) and the other way round, by any number of processes. The newest few states are kept, and written
while training goes on; with `keep_best` also the one before which the loss was lowest: the mean of the total training
loss over the steps since the state before. There is no other measure within a training; and this one is of other soft
targets while alpha grows. A training that ended leaves the model alone (`models/checkpoints/store.py`), and where
it was asked to, what a fine-tuning may go on with: the momentum copy and its queues.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from capfilt.errors import ModelError
from capfilt.models.checkpoints import store
from capfilt.models.checkpoints.fill import fill
from capfilt.objectives.collectives import rank, world_size
from capfilt.objectives.momentum import Momentum
from capfilt.storage.atomic import atomic
from capfilt.storage.paths import StoragePath
from capfilt.training.checkpoints.files import DamagedState, StateFiles, plainly
from capfilt.training.job import STATES

FAILURES = 3
"""States in a row that cannot be written before that ends a training: a store may be away for an hour."""

PACE = "pace"
"""The part of an identity that a fork may answer otherwise."""

MOMENTS = ("step", "exp_avg", "exp_avg_sq")
"""What AdamW remembers of a parameter."""


class States:
    """The states of one training.

    `identity` says which training they belong to, part by part; `keep` how many stay, and `keep_best` the best one
    beside them. With `shared` every process has its share of a state, and all of them must save and resume together.
    `origins` are the folders of the training that this one was forked from, of the one which that was forked from, and
    so on; `steps` is where this one ends.
    """

    def __init__(
        self,
        out: StoragePath,
        identity: Mapping[str, str],
        keep: int,
        keep_best: bool = False,
        shared: bool = False,
        origins: Sequence[StoragePath] = (),
        steps: int = sys.maxsize,
    ):
        self.files = StateFiles(out / STATES)
        self.origins, self.steps = [StateFiles(origin / STATES) for origin in origins], steps
        self.failed = 0
        """How many states in a row could not be written."""
        self.identity, self.keep, self.keep_best = dict(identity), keep, keep_best
        # A group of its own: the writer's words must not get between those of the training.
        self._group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self._shared = shared and world_size() > 1
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None
        self._step = 0

    def save(self, task: nn.Module, optimizer: torch.optim.Optimizer, step: int, loss: float | None = None) -> None:
        """Take a copy of the state after `step` steps; it is written while the next steps are taken.

        Raises ModelError instead where a weight is no longer finite: from such a state nothing could go on. What keeps
        going wrong with the states before is raised here, too.
        """
        spoilt = [name for name, p in task.named_parameters() if not bool(torch.isfinite(own_part(p)).all())]
        if spoilt:
            raise ModelError(
                f"{len(spoilt)} weights are not finite after step {step}, first {spoilt[0]}; "
                "lower optimizer.lr or set optimizer.clip"
            )
        if not self._shared and rank() > 0:
            return
        self.finish()
        written = self.files.write(step, tensors_of(task, optimizer), self._group, alone=not self._shared)
        self._step, self._writing = step, self._pool.submit(self._finish, written, step, loss)

    def finish(self) -> None:
        """Wait until the last state is on disk.

        One that did not get there leaves the one before it in its place, and is counted in `failed`; what kept the
        last of `FAILURES` in a row is raised.
        """
        if self._writing is None:
            return
        writing, self._writing = self._writing, None
        try:
            writing.result()
            self.failed = 0
        except OSError as error:
            self.failed += 1
            if self.failed == FAILURES:
                raise
            logging.getLogger(__name__).warning(
                "the state after step %d is not on disk, and training goes on: %s", self._step, error
            )
            if rank() == 0:
                self.files.remove(self._step)

    def resume(self, task: nn.Module, optimizer: torch.optim.Optimizer) -> int:
        """Load the newest state that can be read, if there is any, and return the number of steps done.

        One that is damaged is named in a warning, and the one before it is taken. A fork without a state of its own
        makes one its own of the training that it was forked from, if but for the pace that is the same training. Raises
        ModelError for the states of another training, and where none of them can be read.
        """
        step = self._agreed()
        if step:
            self.load(task, optimizer, step)
        return step

    def load(self, task: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Load the state after `step` steps."""
        there = self.files.names(step)
        for name, p in task.named_parameters():
            if f"optimizer.{name}.step" in there:
                begun = [torch.zeros((), device=p.device if _fused(optimizer) else "cpu")]
                begun += [torch.zeros_like(p, requires_grad=False) for _ in MOMENTS[1:]]
                optimizer.state[p] = dict(zip(MOMENTS, begun, strict=True))
        self.files.read(step, tensors_of(task, optimizer))

    def better_than(self, last: float | None, share: float = 1.0) -> int | None:
        """The best state, if it is sound and its loss is lower than that of the last steps; else None.

        The last steps may be a `share` of those between two states only; then the ones before them count with them,
        for a few may be lucky.
        """
        best = self.best()
        if best is None:
            return None
        try:
            loss = self.files.check(best)["loss"]
            before = self.files.about(self.files.steps()[-1])["loss"]
            if share < 1 and last is not None and before is not None:
                last = (before + share * last) / (1 + share)
        except DamagedState as damage:
            logging.getLogger(__name__).warning("%s is damaged (%s): best/ is the end", self.files.path(best), damage)
            return None
        return best if last is None or loss < last else None

    def best(self) -> int | None:
        """The step of the state before which the loss was lowest, of those that are there; None without any."""
        known = {}
        for step in self.files.steps():
            with suppress(DamagedState):
                known[step] = self.files.about(step)["loss"]
        known = {step: loss for step, loss in known.items() if loss is not None}
        return min(known, key=lambda step: known[step]) if known else None

    def close(self) -> None:
        """Let the state that is being written get to the disk, however the training ended."""
        try:
            self.finish()
        finally:
            self._pool.shutdown()

    def _finish(self, written: Future[Any], step: int, loss: float | None) -> None:
        with plainly(self.files.path(step)):
            written.result()
        if rank() > 0:
            return
        self.files.commit(step, {"identity": self.identity, "loss": loss})
        try:
            self._forget()
        except OSError as error:  # the state is there: what it replaces may go another time
            logging.getLogger(__name__).warning("%s: old states stay (%s)", self.files.folder, error)

    def _forget(self) -> None:
        best = self.best() if self.keep_best else None
        for old in self.files.steps()[: -self.keep]:
            if old != best:
                self.files.remove(old)

    def _agreed(self) -> int:
        """The step to go on from: rank 0 reads, and all ranks get its answer."""
        if world_size() == 1:
            return self._found()
        said: list[object] = [None]
        if rank() == 0:
            try:
                said = [self._found()]
            except ModelError as error:
                said = [str(error)]
        dist.broadcast_object_list(said)
        if isinstance(said[0], str):
            raise ModelError(said[0])
        assert isinstance(said[0], int)
        return said[0]

    def _found(self) -> int:
        self.files.sweep()
        if step := self._newest() or next(filter(None, map(self._made_own, self.origins)), 0):
            return step
        for origin in self.origins:
            if origin.steps():
                logging.getLogger(__name__).warning(
                    "%s has no state that this training can go on from: it begins at step 0", origin.folder
                )
        return 0

    def _newest(self) -> int:
        steps = self.files.steps()
        for step in reversed(steps):
            about = self._sound(self.files, step)
            if about is None:
                continue
            if other := self._other(about):
                raise ModelError(
                    f"{self.files.path(step)} belongs to another training: other {', '.join(sorted(other))}; "
                    "use another folder"
                )
            return step
        if steps:
            raise ModelError(f"all {len(steps)} states in {self.files.folder} are damaged; delete them to begin again")
        return 0

    def _made_own(self, origin: StateFiles) -> int:
        """Copy the newest state of an origin that this training can go on from; the step that it is of, 0 for none."""
        for step in reversed(origin.steps()):
            about = self._sound(origin, step) if step < self.steps else None
            if about is not None and not self._other(about) - {PACE}:
                self.files.copy(origin, step, {"identity": self.identity, "loss": about["loss"]})
                return step
        return 0

    def _sound(self, files: StateFiles, step: int) -> dict[str, Any] | None:
        try:
            return files.check(step)
        except DamagedState as damage:
            logging.getLogger(__name__).warning(
                "%s is damaged (%s): training goes on from the state before it", files.path(step), damage
            )
            return None

    def _other(self, about: Mapping[str, Any]) -> set[str]:
        """The parts in which the training of a state is another."""
        return {part for part, digest in self.identity.items() if about["identity"].get(part) != digest}


def tensors_of(task: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """All tensors of a state under one name each, not copied."""
    tensors = {f"learner.{name}": tensor for name, tensor in task.state_dict().items()}
    for name, p in task.named_parameters():
        for moment, tensor in optimizer.state.get(p, {}).items():
            tensors[f"optimizer.{name}.{moment}"] = tensor
    return tensors


def own_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _fused(optimizer: torch.optim.Optimizer) -> bool:
    return bool(optimizer.defaults.get("fused"))


def save_momentum(state: Mapping[str, Tensor], folder: StoragePath) -> None:
    """Write the state of a momentum copy, queues and all, beside a model, for `load_momentum`."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    tensors.pop("queue_groups", None)
    with atomic(folder / store.MOMENTUM) as file:
        file.write(safetensors.torch.save(tensors))


def load_momentum(momentum: Momentum, start: StoragePath) -> None:
    """Begin with the momentum copy and the queues of the training that ended with the model `start`.

    As in BLIP's retrieval fine-tuning: the queues are those of another training, so their rows are of no image that
    is known here (their groups stay `NO_IMAGE`), and they are filled from their first row on.

    Raises:
        ModelError: nothing was kept beside that model, or queues of another size.
    """
    kept = store.read_momentum(start, momentum.model)
    size = momentum.queue_image.shape[0]
    for name in ("queue_image", "queue_text"):
        rows = kept[name].shape[0]
        if rows != size:
            raise ModelError(f"{start} was trained with a queue of {rows}; set objectives.queue to it, not to {size}")
        getattr(momentum, name).copy_(kept.pop(name))
    heads = {n: t for n, t in momentum.model.state_dict().items() if n.startswith(("match_head.", "temperature"))}
    fill(momentum.model, {**heads, **kept}, start)
    momentum.pointer.zero_()
