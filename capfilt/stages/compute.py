"""Where a command computes and in which number format: chosen as it begins, for all of its workers, and written into
the run's plan, so that whoever goes on with the run computes alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from pydantic import ValidationError

from capfilt.cluster.nodes import ask_nodes
from capfilt.cluster.session import Session
from capfilt.errors import RunError
from capfilt.inference.device import Ability, Compute, DeviceKind, Precision, ability, choose, local_device
from capfilt.printable import short_repr
from capfilt.runs.progress import Progress
from capfilt.runs.run import Run


class Size(Protocol):
    """What a worker gets."""

    @property
    def cpus(self) -> float: ...

    @property
    def gpus(self) -> float: ...


@dataclass(frozen=True)
class Wanted:
    """What a recipe says of a stage."""

    precision: Precision
    size: Size
    training: bool = False
    """A training may go on on another kind of device, in the format that it began with."""


def decide(session: Session, run: Run, stages: Mapping[str, Wanted], show: Progress) -> dict[str, Compute]:
    """What each stage computes with, by its name.

    What the run's plan says already stays; a fork takes what the run that it came from has, where that is allowed.
    Raises RunError where a stage began on another kind of device, or is wanted in another format than it began with.
    """
    survey = _Survey(session)
    return {name: _decide(run, name, wanted, survey, show) for name, wanted in stages.items()}


def kind_of(session: Session, size: Size) -> DeviceKind:
    """The kind of device that such a worker has."""
    if session.local:
        return local_device()
    return "cuda" if size.gpus else "cpu"


def _decide(run: Run, name: str, wanted: Wanted, survey: _Survey, show: Progress) -> Compute:
    kind = kind_of(survey.session, wanted.size)
    for inherited, record in ((False, run.decided(name)), (True, run.decided_at_origin(name))):
        if record is None:
            continue
        _check(run, name, record, wanted.training)
        same_kind = wanted.training or record["device"] == kind
        if same_kind and wanted.precision in ("auto", record["precision"]):
            compute, said = Compute(device=kind, precision=record["precision"]), ""
            break
        if not inherited:
            raise RunError(
                f"{run.folder}: {name} began in {record['precision']} on {record.get('device', kind)}, and is now"
                f" wanted in {wanted.precision} on {kind}. Go on as it began, or use another --out; --fork NEW_OUT"
                " begins a run that takes over from this one whatever still holds."
            )
    else:
        auto = wanted.precision == "auto" and kind == "cuda"
        compute, said = choose(wanted.precision, kind, survey.of(wanted.size) if auto else [])
    if said:
        show.say(f"{name}: {said}")
    run.decide(name, {"precision": compute.precision} | ({} if wanted.training else {"device": compute.device}))
    return compute


def _check(run: Run, name: str, record: Mapping[str, str], training: bool) -> None:
    """Raise RunError for a record that is none of ours: a plan may be somebody else's."""
    try:
        Compute.model_validate({**record, "device": "cpu"} if training else dict(record))
    except ValidationError:
        raise RunError(
            f"the plan of {run.folder} does not say what {name} computes with, but {short_repr(dict(record))};"
            " use another --out."
        ) from None


class _Survey:
    """The abilities of the nodes, asked once for each size of worker."""

    def __init__(self, session: Session):
        self.session = session
        self._found: dict[tuple[float, float], list[Ability]] = {}

    def of(self, size: Size) -> list[Ability]:
        """What the nodes that can hold such workers can do."""
        if self.session.local:
            return [ability()]
        key = (size.cpus, size.gpus)
        if key not in self._found:
            self._found[key] = ask_nodes(self.session, ability, *key)
        return self._found[key]
