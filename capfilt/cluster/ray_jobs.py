"""Ray Jobs: commands that a cluster runs by itself, submitted and watched over HTTP alone.

A job outlives its sender. Ray's own client waits for ever for a head that has stopped answering, and sends a log from
its first line again after each reconnection; `Jobs` does neither.
"""

from __future__ import annotations

import asyncio
import logging
import os
import queue
import shlex
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from capfilt.cluster.failures import one_line
from capfilt.errors import ClusterError, UsageError
from capfilt.runs.locking.lock_file import JOB_VARIABLE

GRACE = 30
"""Seconds between SIGTERM and SIGKILL of a job that is stopped; Ray's own default is 3."""
TIMEOUT = 20.0
"""Seconds that one request may take."""
SILENCE = 60.0
"""Seconds without a line after which a log is requested again: a connection may be dead unnoticed."""
PAUSE = 2.0
"""Seconds before a lost connection is opened again."""
PATIENCE = 600.0
"""Seconds that a head may be out of reach before watching ends; the job goes on."""

_OVERRIDES = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")  # Ray's client would prefer these to the address it is given
_VERBOSE_LOGGERS = (
    "ray.dashboard.modules.job.sdk",
    "ray.dashboard.modules.dashboard_sdk",
    "ray._private.runtime_env.packaging",
)
_SCRIPT = "job.sh"
_CHECKED = """\
# Job {id}: runs capfilt, if it is the version that sent this job.
found=$(capfilt --version 2> /dev/null) || found=none
if [ "$found" != {version} ]; then
  echo "error: capfilt {version} sent this job, and the PATH of the cluster's head has $found;" \\
    "install the same version on every machine, or use the image of deploy/Dockerfile." >&2
  exit 2
fi
exec capfilt "$@"
"""


@dataclass(frozen=True)
class Command:
    """`capfilt WORDS`, to run in a folder that holds `files` (name -> text); `notes` are stored with the job."""

    words: tuple[str, ...]
    version: str
    files: Mapping[str, str] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """A job as a cluster reports it. `code` is the exit code of a command that ended by itself."""

    id: str
    state: str
    """pending | running | stopped | succeeded | failed"""
    command: str
    notes: Mapping[str, str]
    began: datetime | None
    ended: datetime | None
    code: int | None
    message: str

    @property
    def over(self) -> bool:
        """Whether it has ended, in any way."""
        return self.state in ("stopped", "succeeded", "failed")


class Jobs:
    """The jobs of one cluster. Raises ClusterError, in one line, where nothing answers and for what Ray refuses."""

    def __init__(self, address: str) -> None:
        self.address = address.rstrip("/")
        _check_reachable(self.address)
        with self._errors_as_one_line(), _without(_OVERRIDES):
            self._client = _client(self.address)

    def submit(self, command: Command, name: str) -> str:
        """Submit a command; returns the id of the job, which begins with `name`."""
        id = f"{name}-{uuid.uuid4().hex[:8]}"
        # With its id in it, no two jobs have the same package: Ray unpacks one anew for each node, and where two nodes
        # share a session folder that removes it under a job that is just beginning there.
        script = _CHECKED.format(id=id, version=command.version)
        with tempfile.TemporaryDirectory() as folder, self._errors_as_one_line():
            for file, text in {_SCRIPT: script, **command.files}.items():
                Path(folder, file).write_text(text, encoding="utf-8")
            submitted: str = self._client.submit_job(
                entrypoint=f"sh {_SCRIPT} {shlex.join(command.words)}",
                submission_id=id,
                metadata=dict(command.notes),
                runtime_env={
                    "working_dir": folder,
                    "env_vars": {JOB_VARIABLE: id, "RAY_JOB_STOP_WAIT_TIME_S": str(GRACE)},
                },
            )
        return submitted

    def list(self) -> list[Job]:
        """Every job that was sent to this cluster since its head began, the oldest first."""
        with self._errors_as_one_line():
            jobs = [_job(details) for details in self._client.list_jobs() if details.submission_id]
        return sorted(jobs, key=lambda job: job.began or datetime.max.replace(tzinfo=UTC))

    def get(self, id: str) -> Job:
        with self._errors_as_one_line(id):
            return _job(self._client.get_job_info(id))

    def stop(self, id: str) -> Job:
        """End a job as a batch system would, SIGTERM and then SIGKILL, and wait until it has ended."""
        with self._errors_as_one_line(id):
            self._client.stop_job(id)
        end = time.monotonic() + GRACE + TIMEOUT
        while not (job := self.get(id)).over:
            if time.monotonic() > end:
                raise ClusterError(f"{id} was asked to stop and is still {job.state}; see {self.address}.")
            time.sleep(0.5)
        return job

    def follow(self, id: str, say: Callable[[str], None]) -> Iterator[str]:
        """Yield a job's log from its first line, as it grows, until the job is over.

        A lost connection is opened again, with a message to `say`, and the log continues where it was.

        Raises:
            ClusterError: the cluster is out of reach for `PATIENCE` seconds, or does not know the job any more.
        """
        num_read, lost = 0, 0.0
        while True:
            try:
                over = self.get(id).over
                for text in self._tail(id, num_read):
                    num_read, lost = num_read + len(text), 0.0
                    yield text
                if over or self.get(id).over:
                    return
                lost = 0.0
            except _Silent:
                if over:
                    return
            except _Unreachable as error:
                if not lost:
                    lost = time.monotonic()
                    say(f"the connection is lost, the job is not; trying again ({error})")
                if time.monotonic() - lost > PATIENCE:
                    raise ClusterError(f"{error} {id} was at work when it was last seen, and goes on.") from error
                time.sleep(PAUSE)

    def _tail(self, id: str, skip: int) -> Iterator[str]:
        """The log from character `skip` on, until the other side ends it: the job is over, or a head is restarted."""
        with self._errors_as_one_line(id), closing(_read(self._client.tail_job_logs(id))) as pieces:
            for text in pieces:
                yield text[skip:]
                skip = max(0, skip - len(text))

    @contextmanager
    def _errors_as_one_line(self, id: str = "") -> Iterator[None]:
        """Turn errors of Ray's client and of the libraries below it into errors of one line."""
        import aiohttp
        from ray.exceptions import AuthenticationError

        try:
            yield
        except (OSError, TimeoutError, aiohttp.ClientError) as error:  # requests' errors are OSErrors
            raise _Unreachable(
                f"{self.address} does not answer: {one_line(str(error)) or type(error).__name__}."
            ) from error
        except AuthenticationError as error:
            raise ClusterError(
                f"{self.address} asks for a token and has not got the right one: set RAY_AUTH_MODE=token, and give "
                "the token as RAY_AUTH_TOKEN or in ~/.ray/auth_token (on the head, `ray get-auth-token` tells it)."
            ) from error
        except RuntimeError as error:
            if id and "does not exist" in str(error):
                raise ClusterError(
                    f"{self.address} knows no job {id}: `capfilt jobs --address {self.address}` lists those it knows. "
                    "A head that was restarted has forgotten all; the same command goes on from what was committed."
                ) from error
            if _is_transient(str(error)):
                raise _Unreachable(f"{self.address}: {one_line(str(error))}") from error
            raise ClusterError(f"{self.address}: {one_line(str(error))}") from error


class _Unreachable(ClusterError):
    """The cluster does not answer now, and may later."""


def _is_transient(message: str) -> bool:
    """Whether an error of Ray's client is about a connection or a gateway, and not about the job."""
    return "WebSocket" in message or any(f"status code {code}" in message for code in (500, 502, 503, 504))


class _Silent(Exception):
    """No line came for `SILENCE` seconds."""


def _read(stream: AsyncIterator[str]) -> Generator[str, None, None]:
    """Yield what an asynchronous stream yields; _Silent after `SILENCE` seconds without anything.

    Another thread reads it: a Ctrl-C that comes while asyncio runs in the main thread may get lost.
    """
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    async def read() -> None:
        async for text in stream:
            lines.put(text)

    loop = asyncio.new_event_loop()
    # Ignore errors of a connection that is closed half-way.
    loop.set_exception_handler(lambda *_: None)
    task = loop.create_task(read())
    task.add_done_callback(lambda _: lines.put(None))
    threading.Thread(target=_finish, args=(loop, task), name="log", daemon=True).start()
    try:
        while (text := lines.get(timeout=SILENCE)) is not None:
            yield text
        task.result()  # raises what ended it, if that was not the stream's end
    except queue.Empty:
        raise _Silent from None
    finally:
        with suppress(RuntimeError):  # the loop is closed: the stream has ended
            loop.call_soon_threadsafe(task.cancel)


def _finish(loop: asyncio.AbstractEventLoop, task: asyncio.Task[None]) -> None:
    loop.run_until_complete(asyncio.wait([task]))
    loop.run_until_complete(loop.shutdown_asyncgens())
    loop.close()


def _client(address: str) -> Any:
    from ray.job_submission import JobSubmissionClient

    for name in _VERBOSE_LOGGERS:
        logging.getLogger(name).setLevel(logging.WARNING)

    class ClientWithTimeout(JobSubmissionClient):
        """Gives every request a time limit. The method is internal to Ray and passes its arguments to `requests`."""

        def _do_request(self, *args: Any, **settings: Any) -> Any:
            return super()._do_request(*args, **{"timeout": TIMEOUT, **settings})

    return ClientWithTimeout(address)


def _job(details: Any) -> Job:
    return Job(
        id=details.submission_id,
        state=details.status.value.lower(),
        command=details.entrypoint,
        notes=details.metadata or {},
        began=_time(details.start_time),
        ended=_time(details.end_time),
        code=details.driver_exit_code,
        message=one_line(details.message or ""),
    )


def _time(milliseconds: int | None) -> datetime | None:
    return None if not milliseconds else datetime.fromtimestamp(milliseconds / 1000, UTC)


def _check_reachable(address: str) -> None:
    """Raise at once where nothing listens; Ray's client would retry for a while."""
    url = urlsplit(address)
    try:
        port = url.port or (443 if url.scheme == "https" else 80)
        if not url.hostname or url.scheme not in ("http", "https"):
            raise ValueError
    except ValueError:
        raise UsageError(
            f"The address {address!r} is no dashboard of a Ray head. Allowed: http://HOST:PORT or https://HOST:PORT; "
            "Ray's port is 8265."
        ) from None
    try:
        socket.create_connection((url.hostname, port), timeout=10).close()
    except OSError as error:
        raise ClusterError(
            f"No Ray dashboard answers at {address!r}: {one_line(str(error))}. Start a head with "
            "`ray start --head --dashboard-host 0.0.0.0`, or open a way to its port (`kubectl port-forward`, `ssh -L`)."
        ) from error


@contextmanager
def _without(names: tuple[str, ...]) -> Iterator[None]:
    removed = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(removed)
