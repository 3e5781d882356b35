"""What all tests share."""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import typer.main
import typer.testing

from capfilt.cluster.session import REPRODUCIBLE_ENV

pytest_plugins = [
    "copied_pool",
    "dialog_shards",
    "endpoint_server",
    "finished_run",
    "rank_pair",
    "small_models",
    "task_shards",
]

# As `connect` sets it, but before any test computes: after the first matrix product it comes too late.
os.environ.update(REPRODUCIBLE_ENV)
# Threads that wait for each other give their core away: on a busy machine those that spin take it from those that work.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# A busy machine must not fail a property: time limits are pytest's. In CI the examples are the same each time, so that
# a change is judged by what it changed; at home they are new ones.
hypothesis.settings.register_profile("capfilt", deadline=None, derandomize="CI" in os.environ)
hypothesis.settings.load_profile("capfilt")

# A test ends a process and never the machine, so all that fsync does here is wait: a tenth of a pipeline's time.
# Processes that tests start have the real one, and where the number of calls is the contract, they are counted.
os.fsync = lambda file: None

# Half of collecting is the garbage collector, which walks what torch, Ray and transformers leave as they are imported.
gc.disable()

# Typer builds all verbs and their options anew for each call: 20 ms, thousands of times.
typer.main.get_command = functools.cache(typer.main.get_command)
typer.testing._get_command = typer.main.get_command  # type: ignore[attr-defined]


def pytest_collection_finish() -> None:
    """What is imported by now stays: the garbage collector does not walk torch's million objects again and again."""
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)
    gc.enable()


@pytest.fixture(scope="module", autouse=True)
def _imports_stay() -> Iterator[None]:
    """What a module's tests have imported stays too: stages collect garbage as they end, a tenth of a second each."""
    before = len(sys.modules)
    yield
    if len(sys.modules) > before + 10:
        gc.collect()
        gc.freeze()


@pytest.fixture
def shared_dir(pytestconfig: pytest.Config) -> Path:
    """A folder of reference material (photographs, BERT's vocabulary) beside the checkout; not part of it."""
    folder = pytestconfig.rootpath.parent / "shared"
    if not folder.is_dir():
        pytest.skip("no folder of reference material beside the checkout")
    return folder


@pytest.fixture(scope="session")
def ignore_signals() -> Callable[[], None]:
    """For `preexec_fn`: the child ignores and blocks what stops a command, as CI runners and Ray jobs may start it."""

    def start() -> None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGURG):
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM, signal.SIGURG))

    return start


# ---- a Ray head that is somebody else's, with a dashboard ----


@dataclass(frozen=True)
class Head:
    """A head on loopback. The `capfilt` on its PATH counts to the seed of its recipe, and fails if that is odd."""

    url: str
    gcs: str
    environment: dict[str, str]


COUNTS = """\
#!/bin/sh
# What a job runs here: the real command would take minutes.
[ "$1" = --version ] && {{ echo {version}; exit 0; }}
echo "words: $*"
n=$(sed -n 's/^seed: //p' recipe.yaml)
pause=$(sed -n 's/^pause: //p' recipe.yaml)
i=0
while [ $i -lt $n ]; do i=$((i + 1)); echo "line $i"; sleep ${{pause:-0.5}}; done
case "$*" in *--json*) printf '{{\n "lines": %s\n}}\n' $n;; esac
exit $((n % 2))
"""


def free_ports(count: int) -> list[int]:
    """Ports of loopback on which nobody listens now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@pytest.fixture(scope="session")
def ray_head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    """`ray start --head`, in processes of its own."""
    from capfilt import __version__

    folder = tmp_path_factory.mktemp("head")
    (folder / "capfilt").write_text(COUNTS.format(version=__version__))
    (folder / "capfilt").chmod(0o755)
    gcs, dashboard, agent, client = free_ports(4)
    own = {"PATH": f"{folder}:{os.environ['PATH']}", "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    # A short path: Ray's sockets lie in it, and their names may have 107 characters.
    with tempfile.TemporaryDirectory(prefix="ray-") as temporary:
        words = (
            *("ray", "start", "--head", "--block", "--num-cpus", "2", "--object-store-memory", "80000000"),
            *("--node-ip-address", "127.0.0.1", "--port", str(gcs), "--dashboard-port", str(dashboard)),
            *("--dashboard-agent-listen-port", str(agent), "--ray-client-server-port", str(client)),
            *("--temp-dir", temporary),
        )
        with (folder / "log").open("w") as log:
            running = subprocess.Popen(
                [Path(sys.executable).with_name("ray"), *words[1:]],
                env={**os.environ, **own},
                stdout=log,
                stderr=log,
                cwd=folder,
            )
        try:
            yield Head(f"http://127.0.0.1:{dashboard}", f"127.0.0.1:{gcs}", own)
        finally:
            running.terminate()
            running.wait(60)


# ---- a store ----


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A place of its own on the store in memory, which needs no server; tests/faults/test_s3.py has a real one."""
    from fsspec.implementations.memory import MemoryFileSystem

    from capfilt.runs.locking import lock
    from capfilt.storage.remote_path import RemotePath

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # where copies of what is there lie
    folder = RemotePath(f"memory://{uuid.uuid4().hex}")
    yield folder
    lock.release_all()
    for name in [name for name in MemoryFileSystem.store if name.startswith(f"/{folder.name}")]:
        del MemoryFileSystem.store[name]


# ---- a browser, for what people look at ----

QUIET = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip


@dataclass
class Browser:
    """Chromium without a window; remembers what pages complained of and what they asked for."""

    chromium: Any
    problems: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    contexts: list[Any] = field(default_factory=list)

    def open(self, url: str, width: int = 1280, dark: bool = False) -> Any:
        """A page of its own, loaded, with an empty profile."""
        scheme = "dark" if dark else "light"
        context = self.chromium.new_context(viewport={"width": width, "height": 844}, color_scheme=scheme)
        self.contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: self.problems.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: self.problems.append(str(error)))
        page.on("dialog", lambda dialog: self.problems.append(f"dialog: {dialog.message}"))
        page.on("request", lambda request: self.requests.append(request.url))
        page.goto(url)
        return page


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """One Chromium for a module's tests; they skip where there is none."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    names = ("chromium", "chromium-browser", "google-chrome")
    program = next((result for name in names if (result := shutil.which(name))), None)
    if program is None:
        pytest.skip("no chromium is installed")
    with sync_api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=program, args=list(QUIET))
        yield running
        running.close()


@pytest.fixture
def browser(chromium: Any) -> Iterator[Browser]:
    """The browser, for one test; a complaint of any page fails it."""
    own = Browser(chromium)
    yield own
    for context in own.contexts:
        context.close()
    assert own.problems == []


@pytest.fixture(scope="session")
def hostile_kind() -> Any:
    """The module of the hostile web server, `tests/fixtures/hostile.py`."""
    import hostile

    return hostile


@pytest.fixture
def hostile(hostile_kind: Any) -> Iterator[Any]:
    """A hostile web server on loopback."""
    server = hostile_kind.Hostile()
    yield server
    server.close()
