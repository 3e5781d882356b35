"""The device and the number format of each stage: chosen once, when a command starts, for all of its workers.

The choice is written into the run's plan, so that a resumed run computes as the first command did.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Protocol

from pydantic import ValidationError

from capfilt.cluster.nodes import run_on_nodes
from capfilt.cluster.session import Session, num_threads
from capfilt.errors import RunError
from capfilt.inference.config import DeviceKind, Precision
from capfilt.inference.device import Ability, Compute, ability, choose, local_device
from capfilt.printable import short_repr
from capfilt.runs.ledger import Ledger
from capfilt.runs.progress import Progress
from capfilt.runs.run import Run
from capfilt.runs.usage import Meter


class WorkerSize(Protocol):
    """The CPUs and GPUs of one worker."""

    @property
    def cpus(self) -> float: ...

    @property
    def gpus(self) -> float: ...


@dataclass(frozen=True)
class ComputeRequest:
    """What a recipe says about the device and the number format of a stage."""

    precision: Precision
    size: WorkerSize
    training: bool = False
    """A training may be resumed on another kind of device, in the number format that it began with."""


def decide(
    session: Session, run: Run, requests: Mapping[str, ComputeRequest], progress: Progress
) -> dict[str, Compute]:
    """Choose the device and the number format of each stage, by its name, and record them in the run's plan.

    A choice that the plan already has stays; a fork inherits the choice of the run it came from where the request
    allows it.

    Raises:
        RunError: a stage began on another kind of device or in another format than is now requested, or the plan's
            record of it cannot be read.
    """

    @cache
    def on_nodes(cpus: float, gpus: float) -> list[Ability]:
        """The abilities of the nodes that can hold a worker of this size."""
        return [ability()] if session.local else run_on_nodes(session, ability, cpus, gpus)

    return {name: _decide(session, run, name, request, on_nodes, progress) for name, request in requests.items()}


def device_kind(session: Session, size: WorkerSize) -> DeviceKind:
    """The kind of device that a worker of this size has."""
    if session.local:
        return local_device()
    return "cuda" if size.gpus else "cpu"


def metered(session: Session, job: object, ledger: Ledger, size: WorkerSize) -> Meter:
    """The meter of a stage whose workers have this size. In a local session this process is the worker: it has the CPUs
    with which it may compute, and a GPU where the job computes on one."""
    if not session.local:
        return Meter.of(ledger, size.cpus, size.gpus)
    device = getattr(getattr(job, "compute", None), "device", "cpu")
    return Meter.of(ledger, num_threads(), size.gpus or float(device == "cuda"))


def _decide(
    session: Session,
    run: Run,
    name: str,
    request: ComputeRequest,
    on_nodes: Callable[[float, float], list[Ability]],
    progress: Progress,
) -> Compute:
    kind = device_kind(session, request.size)
    for inherited, record in ((False, run.decided(name)), (True, run.decided_before_fork(name))):
        if record is None:
            continue
        _check_record(run, name, record, request.training)
        same_kind = request.training or record["device"] == kind
        if same_kind and request.precision in ("auto", record["precision"]):
            compute, reason = Compute(device=kind, precision=record["precision"]), ""
            break
        if not inherited:
            raise RunError(
                f"{run.folder}: {name} began in {record['precision']} on {record.get('device', kind)}, and is now"
                f" requested in {request.precision} on {kind}. Resume it as it began, or use another --out;"
                " --fork NEW_OUT begins a new run that takes over from this one whatever still holds."
            )
    else:
        asks_nodes = request.precision == "auto" and kind == "cuda"
        abilities = on_nodes(request.size.cpus, request.size.gpus) if asks_nodes else []
        compute, reason = choose(request.precision, kind, abilities)
    if reason:
        progress.say(f"{name}: {reason}")
    run.decide(name, {"precision": compute.precision} | ({} if request.training else {"device": compute.device}))
    return compute


def _check_record(run: Run, name: str, record: Mapping[str, str], training: bool) -> None:
    """Raise RunError for a record that capfilt did not write: a plan may be somebody else's."""
    try:
        Compute.model_validate({**record, "device": "cpu"} if training else dict(record))
    except ValidationError:
        raise RunError(
            f"the plan of {run.folder} does not say what {name} computes with, but {short_repr(dict(record))};"
            " use another --out."
        ) from None
