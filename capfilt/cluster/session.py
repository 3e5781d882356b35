"""Where work is done: in this process, on a Ray started for this command, or on a cluster that runs already.

A Ray that the caller initialised is used and left running; `close` ends only what `connect` began.
"""

from __future__ import annotations

import logging
import math
import os
import re
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from capfilt import cpus as machine
from capfilt.cluster.metrics import FarMeters, Meters, open_meters
from capfilt.errors import CapfiltError, ClusterError
from capfilt.runs.metrics import Reading

ALLOWED = '"local" (this process), "start" (a Ray of its own), "auto", "HOST:PORT" or "ray://HOST:PORT"'

_HOST_PORT = re.compile(r"^(\[[0-9a-fA-F:]+\]|[\w.-]+):\d{1,5}$")

_QUIET = {
    # No phone-home.
    "RAY_USAGE_STATS_ENABLED": "0",
    # A worker that asked for no GPU sees none. Unset, it sees all, and models move there.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",
}

SAME_ANSWERS = {
    # MKL takes other code paths for other alignments of memory, so that torch's attention on a CPU gave other last bits
    # with two threads than with one. With this it does not, and costs nothing; it is read at the first matrix product.
    "MKL_CBWR": "AUTO",
}
"""Environment of every process that computes: the answer must not depend on where it was found."""


MAX_TEMPORARY = 107 - len("/ray/session_2026-11-29_01-10-55_099199_4194304/sockets/plasma_store")
"""Bytes of the folder in which Ray makes its own: a Unix socket's name has 107 at most."""
_SHORT = ("/tmp", "/var/tmp", "/dev/shm")

# What Ray says of a worker whose node died, and of one that was asked to go.
_MACHINE = ("its node has died", "node was terminated", "The process receives a SIGTERM")


@dataclass(frozen=True)
class Trouble:
    """An exception of another process, as text: its own object might not survive the journey.

    `refusal` is the class of a CapfiltError, whose message is meant for a person; None is an accident.
    `died` says that the process is gone, and `blameless` that this was the machine's doing: a node that was lost, a
    preemption.
    """

    line: str
    trace: str = ""
    refusal: type[CapfiltError] | None = None
    died: bool = False
    blameless: bool = False

    @classmethod
    def of(cls, error: Exception) -> Trouble:
        """Describe `error`, which is being handled."""
        trace = "".join(traceback.format_exception(error))
        if isinstance(error, CapfiltError):
            return cls(str(error), trace, type(error))
        return cls(one_line("".join(traceback.format_exception_only(error))), trace)

    @classmethod
    def death(cls, error: Exception) -> Trouble:
        """Describe the end of a process from what Ray says of it."""
        line = " ".join(str(error).split())
        blameless = getattr(error, "preempted", False) or any(words in line for words in _MACHINE)
        return cls(one_line(line), died=True, blameless=blameless)

    def as_error(self, what: str) -> CapfiltError:
        """The exception to raise: a refusal as it was, an accident of `what` as a ClusterError.

        The remote traceback travels as a note, which `--debug` shows and the one-line message does not.
        """
        error = self.refusal(self.line) if self.refusal else ClusterError(f"{what}: {self.line}")
        if self.trace:
            error.add_note(self.trace)
        return error


class Session:
    """A place to work, made by `connect`. A context manager; `close` may be called twice."""

    def __init__(
        self, address: str, *, owned: bool = False, attached: bool = False, scratch: str | None = None
    ) -> None:
        self.address = address
        self.local = address == "local"
        self.owned = owned
        """This session started the Ray it uses, and shuts it down."""
        self.conductor: Any = None
        """The actor that runs trainings (train.py), kept between them because it takes seconds to start."""
        self._scratch = scratch  # a folder made for Ray's files
        self._meters: Meters | FarMeters | None = None
        self._attached = attached  # this session connected the process to a cluster, and disconnects it
        self._open = True

    def fits(self, cpus: float, gpus: float = 0) -> int:
        """How many workers of this size the whole place holds, busy or not. 1 in this process."""
        if self.local:
            return 1
        import ray

        totals = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        needs = [(kind, amount) for kind, amount in (("CPU", cpus), ("GPU", gpus)) if amount]
        return sum(
            # 1e-9: three workers of 0.1 fit into 0.3.
            min(math.floor(total.get(kind, 0) / amount + 1e-9) for kind, amount in needs)
            for total in totals
        )

    def report(self, readings: Iterable[Reading]) -> None:
        """Hand measurements to Ray, which shows them to Prometheus. In this process alone nobody asks for them."""
        if self.local:
            return
        if self._meters is None:
            self._meters = open_meters()
        self._meters.take(list(readings))

    def close(self) -> None:
        """Leave the place as it was found."""
        if not self._open or self.local:
            return
        self._open = False
        import ray

        if self._meters is not None and ray.is_initialized():
            self._meters.close()
        if self.owned or self._attached:
            ray.shutdown()
        elif self.conductor is not None and ray.is_initialized():
            ray.kill(self.conductor)
        self.conductor = None
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def connect(address: str = "start", cpus: int | None = None, *, dashboard: bool = False) -> Session:
    """Open the place that `address` names; `cpus` bounds a Ray that is started here (all that this process may
    use if None).

    `dashboard` holds for "start" only, and is off because it makes the start slower.
    Raises ClusterError for an address of another kind, and for a cluster that does not answer.
    """
    if address != "local":
        _check(address, cpus)
    for key, value in SAME_ANSWERS.items():
        os.environ.setdefault(key, value)
    if address == "local":
        _bound_threads()
        return Session("local")
    import ray

    if ray.is_initialized():
        return Session(address)
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    scratch = None
    if address == "start":
        scratch = _scratch()
        options |= {"address": "local", "num_cpus": cpus or machine.available(), "include_dashboard": dashboard}
        options |= {} if scratch is None else {"_temp_dir": scratch}
        _ensure_token()
    else:
        options |= {"address": address, "runtime_env": {"env_vars": SAME_ANSWERS}}
    try:
        _knock(address)
        with environment(_QUIET), _own_sigterm():
            _begin(options)
    except (OSError, RuntimeError, ValueError) as error:
        raise ClusterError(_no_answer(address, error)) from error
    return Session(address, owned=address == "start", attached=address != "start", scratch=scratch)


def address_here() -> str:
    """The place where this process works already: "auto" where its caller has connected it to a Ray, else "local"."""
    ray = sys.modules.get("ray")  # not imported for the sake of asking
    return "auto" if ray is not None and ray.is_initialized() else "local"


def _scratch() -> str | None:
    """A new folder with a short name for a Ray of our own, where Ray's choice is too long for the names of its sockets,
    as the TMPDIRs of some batch systems are.
    """
    chosen = os.path.abspath(os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp")
    if len(os.fsencode(chosen)) <= MAX_TEMPORARY:
        return None
    for folder in _SHORT:
        with suppress(OSError):
            made = tempfile.mkdtemp(prefix="ray-", dir=folder)
            logging.getLogger(__name__).warning(
                "%s is too long for Ray's sockets (%d bytes, and at most %d will do): Ray's files lie in %s; set"
                " RAY_TMPDIR to choose another folder",
                *(chosen, len(os.fsencode(chosen)), MAX_TEMPORARY, made),
            )
            return made
    raise ClusterError(
        f"{chosen} is too long for Ray's sockets (at most {MAX_TEMPORARY} bytes will do), and nothing can be written in"
        f' {", ".join(_SHORT)}: set RAY_TMPDIR to a short folder of this machine, or use the address "local".'
    )


def _ensure_token() -> None:
    """Give a Ray of our own its token by the environment, where it could not keep one in the home folder."""
    if any(name in os.environ for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")):
        return
    # RuntimeError: no home at all, as users of containers have it; OSError: one that may not be written.
    with suppress(OSError, RuntimeError):
        folder = Path.home() / ".ray"
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder / "auth_token", os.R_OK) or os.access(folder, os.W_OK):
            return
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def set_threads(threads: int) -> None:
    """With how many threads this process computes."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    if "torch" in sys.modules:  # the variable comes too late for it
        sys.modules["torch"].set_num_threads(threads)


def _bound_threads() -> None:
    """torch takes the machine's cores and knows of no quota."""
    torch = sys.modules.get("torch")
    if torch is not None and "OMP_NUM_THREADS" not in os.environ and torch.get_num_threads() > machine.available():
        torch.set_num_threads(machine.available())


def _begin(options: dict[str, Any]) -> None:
    import ray

    try:
        ray.init(**options)
    except ConnectionAbortedError:
        # ray://: the head starts a server for each client, on a port that it has only looked at, and one that dies in
        # its first moments ends the call. A second one gets another port.
        ray.init(**options)


@contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set what is unset of `values` in os.environ for a moment: what the user has set is theirs."""
    mine = {key: value for key, value in values.items() if key not in os.environ}
    os.environ.update(mine)
    try:
        yield
    finally:
        for key in mine:
            os.environ.pop(key, None)


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """Keep what the caller does on SIGTERM, which `ray.init` replaces by an exit of its own."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if callable(before) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def _check(address: str, cpus: int | None) -> None:
    if address.startswith(("http://", "https://")):
        raise ClusterError(
            f"The address {address!r} is a Ray dashboard, which takes whole jobs and no workers. Allowed: {ALLOWED}."
        )
    if address not in ("start", "auto") and not _HOST_PORT.match(address.removeprefix("ray://")):
        raise ClusterError(f"The address {address!r} cannot be used. Allowed: {ALLOWED}.")
    if cpus is not None and address != "start":
        raise ClusterError(
            f"cpus={cpus} was given with the address {address!r}, but a running cluster has its own cores. "
            'Leave it out, or use the address "start".'
        )
    if cpus is not None and cpus < 1:
        raise ClusterError(f"cpus={cpus} was given, but a worker needs at least 1. Allowed: 1 or more.")


def _knock(address: str) -> None:
    """Raise OSError where nobody listens. Ray itself still tries a closed port after 100 s."""
    if ":" in address:
        host, port = address.removeprefix("ray://").rsplit(":", 1)
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


def one_line(text: str) -> str:
    """What another program said, as much of it as fits into a message."""
    return " ".join(text.split())[:400]


def _no_answer(address: str, error: Exception) -> str:
    reason = one_line(str(error)).rstrip(".") + "."
    if address == "start":
        return f'Ray could not be started on this machine: {reason} Use the address "local" to work without it.'
    return f'No Ray cluster answers at {address!r}: {reason} Start one, or use the address "start".'
