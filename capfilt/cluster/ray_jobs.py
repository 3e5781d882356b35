"""Ray Jobs: a command that a cluster runs by itself, sent and watched over HTTP alone.

A job outlives its sender. Ray's own client waits for ever for a head that has stopped answering, and tells a log from
its first line again each time it is asked; `Jobs` does neither.
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

from capfilt.cluster.session import one_line
from capfilt.errors import ClusterError, UsageError
from capfilt.runs.locking.lock_file import JOB_VARIABLE

GRACE = 30
"""Seconds between SIGTERM and SIGKILL of a job that is stopped; Ray's own default is 3."""
TIMEOUT = 20.0
"""Seconds that one question may take."""
SILENCE = 60.0
"""Seconds without a line after which a log is asked for anew: a connection may be dead and not say so."""
PAUSE = 2.0
"""Seconds before a lost connection is tried again."""
PATIENCE = 600.0
"""Seconds that a head may be out of reach before the watcher gives up; the job does not."""

_OVERRIDES = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")  # Ray's client would prefer these to the address it is given
_CHATTY = (
    "ray.dashboard.modules.job.sdk",
    "ray.dashboard.modules.dashboard_sdk",
    "ray._private.runtime_env.packaging",
)
_SCRIPT = "job.sh"
_CHECKED = """\
# Runs capfilt, if it is the version that sent this job.
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
    """`capfilt WORDS`, to be run in a folder that holds `files` (name -> text); `notes` are kept with the job."""

    words: tuple[str, ...]
    version: str
    files: Mapping[str, str] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """What a cluster says of a job. `code` is the exit code of a command that came to an end of its own."""

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
        """Whether it has come to an end, whichever."""
        return self.state in ("stopped", "succeeded", "failed")


class Jobs:
    """The jobs of one cluster. Raises ClusterError, in one line, where nobody answers and for what Ray refuses."""

    def __init__(self, address: str) -> None:
        self.address = address.rstrip("/")
        _knock(self.address)
        with self._asking(), _without(_OVERRIDES):
            self._client = _client(self.address)

    def submit(self, command: Command, name: str) -> str:
        """Hand over a command; the job's id, which begins with `name`."""
        id = f"{name}-{uuid.uuid4().hex[:8]}"
        with tempfile.TemporaryDirectory() as folder, self._asking():
            for file, text in {_SCRIPT: _CHECKED.format(version=command.version), **command.files}.items():
                Path(folder, file).write_text(text, encoding="utf-8")
            sent: str = self._client.submit_job(
                entrypoint=f"sh {_SCRIPT} {shlex.join(command.words)}",
                submission_id=id,
                metadata=dict(command.notes),
                runtime_env={
                    "working_dir": folder,
                    "env_vars": {JOB_VARIABLE: id, "RAY_JOB_STOP_WAIT_TIME_S": str(GRACE)},
                },
            )
        return sent

    def list(self) -> list[Job]:
        """Every job that was sent to this cluster since its head began, the oldest first."""
        with self._asking():
            found = [_job(details) for details in self._client.list_jobs() if details.submission_id]
        return sorted(found, key=lambda job: job.began or datetime.max.replace(tzinfo=UTC))

    def get(self, id: str) -> Job:
        """One job."""
        with self._asking(id):
            return _job(self._client.get_job_info(id))

    def stop(self, id: str) -> Job:
        """End a job as a batch system would, SIGTERM and then SIGKILL, and wait until it has ended."""
        with self._asking(id):
            self._client.stop_job(id)
        end = time.monotonic() + GRACE + TIMEOUT
        while not (job := self.get(id)).over:
            if time.monotonic() > end:
                raise ClusterError(f"{id} was told to stop and is still {job.state}; look at it in {self.address}.")
            time.sleep(0.5)
        return job

    def follow(self, id: str, say: Callable[[str], None]) -> Iterator[str]:
        """Yield a job's log from its first line, as it grows, until the job is over.

        A connection that is lost is opened again, and the log goes on where it was; `say` is told. ClusterError where
        the cluster is out of reach for `PATIENCE` seconds, or has forgotten the job.
        """
        seen, lost = 0, 0.0
        while True:
            try:
                over = self.get(id).over
                for text in self._tail(id, seen):
                    seen, lost = seen + len(text), 0.0
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
        with self._asking(id), closing(_read(self._client.tail_job_logs(id))) as pieces:
            for text in pieces:
                yield text[skip:]
                skip = max(0, skip - len(text))

    @contextmanager
    def _asking(self, id: str = "") -> Iterator[None]:
        """Errors of Ray's client and of what it is built on, as one line."""
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
            if _passing(str(error)):
                raise _Unreachable(f"{self.address}: {one_line(str(error))}") from error
            raise ClusterError(f"{self.address}: {one_line(str(error))}") from error


class _Unreachable(ClusterError):
    """Nobody answers, for now."""


def _passing(said: str) -> bool:
    """Whether Ray's client tells of a connection or a gateway, and not of the job."""
    return "WebSocket" in said or any(f"status code {code}" in said for code in (500, 502, 503, 504))


class _Silent(Exception):
    """Nothing was said for `SILENCE` seconds."""


def _read(stream: AsyncIterator[str]) -> Generator[str, None, None]:
    """Yield what an asynchronous stream yields; _Silent after `SILENCE` seconds of nothing.

    A thread of its own reads it: a Ctrl-C that meets asyncio at work may be forgotten there, and comes to no thread.
    """
    found: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    async def read() -> None:
        async for text in stream:
            found.put(text)

    loop = asyncio.new_event_loop()
    # Of a connection that is left half-way, which is no news to anybody.
    loop.set_exception_handler(lambda *_: None)
    task = loop.create_task(read())
    task.add_done_callback(lambda _: found.put(None))
    threading.Thread(target=_finish, args=(loop, task), name="log", daemon=True).start()
    try:
        while (text := found.get(timeout=SILENCE)) is not None:
            yield text
        task.result()  # raises what ended it, if that was not the stream's end
    except queue.Empty:
        raise _Silent from None
    finally:
        with suppress(RuntimeError):  # the loop is closed: it was the end
            loop.call_soon_threadsafe(task.cancel)


def _finish(loop: asyncio.AbstractEventLoop, task: asyncio.Task[None]) -> None:
    loop.run_until_complete(asyncio.wait([task]))
    loop.run_until_complete(loop.shutdown_asyncgens())
    loop.close()


def _client(address: str) -> Any:
    from ray.job_submission import JobSubmissionClient

    for chatty in _CHATTY:
        logging.getLogger(chatty).setLevel(logging.WARNING)

    class Impatient(JobSubmissionClient):
        """Gives every question a time limit. The method is Ray's own affair, made to take what `requests` takes."""

        def _do_request(self, *args: Any, **settings: Any) -> Any:
            return super()._do_request(*args, **{"timeout": TIMEOUT, **settings})

    return Impatient(address)


def _job(details: Any) -> Job:
    notes = details.metadata or {}
    return Job(
        id=details.submission_id,
        state=details.status.value.lower(),
        command=details.entrypoint,
        notes=notes,
        began=_time(details.start_time),
        ended=_time(details.end_time),
        code=details.driver_exit_code,
        message=one_line(details.message or ""),
    )


def _time(milliseconds: int | None) -> datetime | None:
    return None if not milliseconds else datetime.fromtimestamp(milliseconds / 1000, UTC)


def _knock(address: str) -> None:
    """Raise where nobody listens, at once; Ray's client would try for a while."""
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
    held = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(held)
