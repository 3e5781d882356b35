"""Where work runs: in this process, on a Ray that this command starts, or on a cluster that is already running.

A Ray that the caller initialised is used and left running; `close` ends only what `connect` started.
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
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from capfilt import cpus as machine
from capfilt.cluster.failures import one_line
from capfilt.cluster.metrics import RayMetrics, RemoteRayMetrics, open_metrics
from capfilt.cluster.worker_slot import IdleWorkers
from capfilt.errors import AddressError, ClusterError
from capfilt.runs.metrics import Reading

if TYPE_CHECKING:
    from capfilt.runs.progress import Progress

ALLOWED = '"local" (this process), "start" (a Ray of its own), "auto", "HOST:PORT" or "ray://HOST:PORT"'

_HOST_PORT = re.compile(r"^(\[[0-9a-fA-F:]+\]|[\w.-]+):\d{1,5}$")

_QUIET = {
    # No usage statistics to the makers of Ray.
    "RAY_USAGE_STATS_ENABLED": "0",
    # A worker without a GPU of its own sees none. Unset, it would see all of them and use them.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",
}

REPRODUCIBLE_ENV = {
    # MKL chooses code paths by the alignment of memory, and torch's attention on a CPU gave other last bits with two
    # threads than with one. With this it does not, at no measured cost; it is read at the first matrix product.
    "MKL_CBWR": "AUTO",
}
"""Environment of every process that computes: results must not depend on the machine or the number of threads."""


MAX_TEMPORARY = 107 - len("/ray/session_2026-11-29_01-10-55_099199_4194304/sockets/plasma_store")
"""Bytes of the path of Ray's temporary folder: the path of a Unix socket has at most 107."""
_SHORT_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm")


class Session:
    """Where work runs; made by `connect`. A context manager; `close` may be called twice."""

    def __init__(
        self, address: str, *, started_ray: bool = False, attached: bool = False, temporary: str | None = None
    ) -> None:
        self.address = address
        self.local = address == "local"
        self.started_ray = started_ray
        """Whether this session started the Ray that it uses, and shuts it down."""
        self.training_actor: Any = None
        """The actor that runs trainings (ray_train.py), kept between them because it takes seconds to start."""
        self.others_reserved: set[str] = set()
        """The placement groups that were there before its processes."""
        self.idle_workers = IdleWorkers()
        self._temporary = temporary  # a folder made for Ray's files
        self._metrics: RayMetrics | RemoteRayMetrics | None = None
        self._attached = attached  # this session connected the process to a cluster, and disconnects it
        self._open = True

    def capacity(self, cpus: float, gpus: float = 0) -> int:
        """How many workers of this size fit in all, busy or not; 1 in this process."""
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
        """Pass readings to Ray, which exports them to Prometheus; in a local session they are dropped."""
        if self.local:
            return
        if self._metrics is None:
            self._metrics = open_metrics()
        self._metrics.record(list(readings))

    def close(self) -> None:
        """End what `connect` started."""
        if not self._open or self.local:
            return
        self._open = False
        import ray

        if self._metrics is not None and ray.is_initialized():
            self._metrics.close()
        if self.started_ray or self._attached:
            ray.shutdown()
        elif self.training_actor is not None and ray.is_initialized():
            ray.kill(self.training_actor)
        self.training_actor = None
        if self._temporary is not None:
            shutil.rmtree(self._temporary, ignore_errors=True)

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def connect(
    address: str = "start", cpus: int | None = None, *, dashboard: bool = False, show: Progress | None = None
) -> Session:
    """Open a session at an address: "local", "start", "auto", HOST:PORT or ray://HOST:PORT.

    Args:
        cpus: of a Ray that is started here; None = all that this process may use.
        dashboard: whether a Ray that is started here has one, which makes the start slower.
        show: what is told that Ray starts, which takes seconds.

    Raises:
        ClusterError: another kind of address, or a cluster that does not answer.
    """
    check_address(address)
    if address != "local":
        _check_cpus(address, cpus)
    for key, value in REPRODUCIBLE_ENV.items():
        os.environ.setdefault(key, value)
    if address == "local":
        bound_threads()
        return Session("local")
    waits = "starting Ray on this machine" if address == "start" else f"connecting to the Ray at {address}"
    with nullcontext() if show is None else show.wait(waits):
        return _connect(address, cpus, dashboard)


def _connect(address: str, cpus: int | None, dashboard: bool) -> Session:
    import ray

    if ray.is_initialized():
        return Session(address)
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    temporary = None
    if address == "start":
        temporary = _temporary_folder()
        options |= {"address": "local", "num_cpus": cpus or machine.available(), "include_dashboard": dashboard}
        options |= {} if temporary is None else {"_temp_dir": temporary}
        _ensure_token()
    else:
        options |= {"address": address, "runtime_env": {"env_vars": REPRODUCIBLE_ENV}}
    try:
        _check_reachable(address)
        with default_environment(_QUIET), _keep_sigterm_handler():
            _init_ray(options)
    except (OSError, RuntimeError, ValueError) as error:
        raise ClusterError(_no_answer(address, error)) from error
    return Session(address, started_ray=address == "start", attached=address != "start", temporary=temporary)


def current_address() -> str:
    """The address of this process: "auto" where its caller has connected it to a Ray, else "local"."""
    ray = sys.modules.get("ray")  # importing it takes a second, and if nobody has, nobody is connected
    return "auto" if ray is not None and ray.is_initialized() else "local"


def _temporary_folder() -> str | None:
    """A new folder with a short path for a Ray that we start; None where Ray's choice is short enough for its sockets.

    The TMPDIRs of some batch systems are not.
    """
    chosen = os.path.abspath(os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp")
    if len(os.fsencode(chosen)) <= MAX_TEMPORARY:
        return None
    for folder in _SHORT_FOLDERS:
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
        f' {", ".join(_SHORT_FOLDERS)}: set RAY_TMPDIR to a short folder of this machine, or use the address "local".'
    )


def _ensure_token() -> None:
    """Set the token of a Ray that we start in the environment, where it cannot keep one in the home folder."""
    if any(name in os.environ for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")):
        return
    # RuntimeError: there is no home folder, as in some containers; OSError: it is not writable.
    with suppress(OSError, RuntimeError):
        folder = Path.home() / ".ray"
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder / "auth_token", os.R_OK) or os.access(folder, os.W_OK):
            return
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def set_threads(threads: int) -> None:
    """Set the number of threads with which this process computes."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    if "torch" in sys.modules:  # it read the variable when it was imported
        sys.modules["torch"].set_num_threads(threads)


def num_threads() -> int:
    """The number of threads with which this process computes: OMP_NUM_THREADS, else the CPUs that it may use."""
    given = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return int(given) if given.isdigit() and int(given) else machine.available()


def bound_threads() -> None:
    """Bound torch's threads by this process's CPUs, if it is imported: torch itself counts the machine's cores and
    ignores quotas.
    """
    torch = sys.modules.get("torch")
    if torch is not None and "OMP_NUM_THREADS" not in os.environ and torch.get_num_threads() > machine.available():
        torch.set_num_threads(machine.available())


def _init_ray(options: dict[str, Any]) -> None:
    import ray

    try:
        ray.init(**options)
    except ConnectionAbortedError:
        # ray://: the head starts a server for each client, on a port that may be taken by then, and a server that dies
        # at its start ends the call. The second try gets another port.
        ray.init(**options)


@contextmanager
def default_environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set those of `values` that os.environ lacks, for this block: what the user has set stays."""
    added = {key: value for key, value in values.items() if key not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for key in added:
            os.environ.pop(key, None)


@contextmanager
def _keep_sigterm_handler() -> Iterator[None]:
    """Restore the handler of SIGTERM, which `ray.init` replaces."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if callable(before) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def check_address(address: str) -> None:
    """Refuse an address of another form than `ALLOWED`; nothing is contacted. AddressError."""
    if address.startswith(("http://", "https://")):
        raise AddressError(
            f"The address {address!r} is a Ray dashboard, which takes whole jobs and no workers. Allowed: {ALLOWED}."
        )
    if address not in ("local", "start", "auto") and not _HOST_PORT.match(address.removeprefix("ray://")):
        raise AddressError(f"The address {address!r} cannot be used. Allowed: {ALLOWED}.")


def _check_cpus(address: str, cpus: int | None) -> None:
    if cpus is not None and address != "start":
        raise AddressError(
            f"cpus={cpus} was given with the address {address!r}, but a running cluster has its own cores. "
            'Leave it out, or use the address "start".'
        )
    if cpus is not None and cpus < 1:
        raise AddressError(f"cpus={cpus} was given, but a worker needs at least 1. Allowed: 1 or more.")


def _check_reachable(address: str) -> None:
    """Raise OSError where nothing listens. Ray itself still tries a closed port after 100 s."""
    if ":" in address:
        host, port = address.removeprefix("ray://").rsplit(":", 1)
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


def _no_answer(address: str, error: Exception) -> str:
    reason = one_line(str(error)).rstrip(".") + "."
    if address == "start":
        return f'Ray could not be started on this machine: {reason} Use the address "local" to work without it.'
    return f'No Ray cluster answers at {address!r}: {reason} Start one, or use the address "start".'
