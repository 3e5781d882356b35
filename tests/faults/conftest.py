"""A Ray of several nodes on this machine, a run of 40 shards, and the record of what each fault did to it.

`CAPFILT_FAULTS=10` runs every fault with ten seeds and writes docs/faults.md (`make test-faults`); without it a short
form runs, with one seed, of the faults that cost seconds only.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from capfilt import config as configs
from capfilt.storage.paths import StoragePath, relative_to, storage_path

SEEDS = int(os.environ.get("CAPFILT_FAULTS", "0"))
NUM_SHARDS, PER_SHARD = 40, 5
HERE = Path(__file__).parent
PATH = os.pathsep.join([str(HERE), str(HERE.parent.parent)])
"""Where the processes of the suite find the toy, and this very capfilt."""
IMPATIENT = {"RAY_gcs_rpc_server_reconnect_timeout_s": "5"}
"""How long Ray waits for a head that is gone before it ends the driver; a minute where nobody says otherwise."""

Bytes = dict[str, bytes]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`seed` decides a moment; `choice` only which shard or sample is hit, which needs fewer tries."""
    for name, most in (("seed", SEEDS), ("choice", min(SEEDS, 3))):
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, range(max(1, most)))


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What is marked slow here belongs to the long form; the short form takes a minute, and is slow for all others."""
    for item in items:
        if "tests/faults" in str(item.path) and not SEEDS:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="part of the long form: make test-faults"))
            item.add_marker(pytest.mark.slow)


def write_shard(path: Path, texts: list[str]) -> None:
    """A tar of pictures that nobody decodes, one a text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for i, text in enumerate(texts):
            for extension, data in (("jpg", f"{path.stem}-{i}".encode()), ("txt", text.encode())):
                header = tarfile.TarInfo(f"{path.stem}{i:03d}.{extension}")
                header.size = len(data)
                tar.addfile(header, io.BytesIO(data))


@pytest.fixture(scope="session")
def web(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 shards of 5 samples."""
    folder = tmp_path_factory.mktemp("web")
    for i in range(NUM_SHARDS):
        write_shard(folder / f"{i:05d}.tar", [f"text {i} {j}" for j in range(PER_SHARD)])
    return folder


@dataclass
class Nodes:
    """The cluster: a head with a place for one worker, and nodes that may be lost, with one each."""

    num: int
    cluster: Any = None
    lost: list[Any] = field(default_factory=list)

    @property
    def address(self) -> str:
        """Where it answers; what is missing of it is started."""
        with pytest.MonkeyPatch.context() as patch:  # for the nodes alone: other tests start processes of their own
            patch.setenv("PYTHONPATH", PATH)
            patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
            self._start()
        return str(self.cluster.address)

    def _start(self) -> None:
        from ray.cluster_utils import Cluster

        small = {"num_cpus": 1, "object_store_memory": 80_000_000}
        if self.cluster is None:
            self.cluster = Cluster(initialize_head=True, head_node_args={**small, "include_dashboard": False})
            self.lost = []
        while len(self.lost) < self.num:
            self.lost.append(self.cluster.add_node(**small))

    def lose(self) -> None:
        """Kill the raylet of a node; its workers die with it."""
        self.cluster.remove_node(self.lost.pop(), allow_graceful=False)

    def kill_head(self) -> None:
        """Kill the head, and with it the cluster."""
        for process in self.cluster.head_node.all_processes.values():
            for info in process:
                if info.process.poll() is None:
                    info.process.kill()
        self.stop()

    def stop(self) -> None:
        """End every node."""
        if self.cluster is not None:
            self.cluster.shutdown()
        self.cluster = None


RUNNING = Nodes(2)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(nextitem: pytest.Item | None) -> None:
    """End the cluster with the last of the tests that use it one after the other: idle nodes take time from others."""
    if nextitem is None or "nodes" not in nextitem.fixturenames:  # type: ignore[attr-defined]
        RUNNING.stop()


@pytest.fixture
def nodes() -> Nodes:
    """The cluster, which is begun when its address is asked for."""
    return RUNNING


def ignore_signals() -> None:
    """In a child before it starts: what cron, a CI runner, a shell's `&` or a Ray job may leave it."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGURG):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM, signal.SIGURG))


@dataclass
class Driver:
    """A run of the toy, in a process of its own."""

    out: StoragePath
    words: list[str]
    pids: Path
    process: subprocess.Popen[str] | None = None

    def start(self, *more: object) -> Driver:
        """Begin, or begin again."""
        self.pids.mkdir(exist_ok=True)
        words = [*self.words, "--out", self.out, "--pids", self.pids, *more]
        own = {**os.environ, "PYTHONPATH": PATH, **IMPATIENT}
        self.process = subprocess.Popen(
            [sys.executable, "-c", "import sys, toy; sys.exit(toy.main())", *map(str, words)],
            env=own, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=ignore_signals,
        )  # fmt: skip
        return self

    def end(self, timeout: float = 90) -> tuple[int, str, str]:
        """Wait for it; its exit code and what it said."""
        assert self.process is not None
        out, err = self.process.communicate(timeout=timeout)
        return self.process.returncode, out, err

    def run(self, *more: object) -> str:
        """Start it and see it succeed."""
        code, out, err = self.start(*more).end()
        assert code == 0, err
        return out

    def send(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def done(self) -> int:
        """How many shards are committed."""
        return len(list((self.out / "ledger/toy").glob("*.json")))

    def reach(self, num: int) -> None:
        """Wait until so many shards are committed."""
        assert self.process is not None
        give_up = time.monotonic() + 90
        while self.done() < num:
            assert self.process.poll() is None, f"it ended before: {self.process.communicate()}"
            assert time.monotonic() < give_up, f"{self.done()} of {num} after 90 s"
            time.sleep(0.002)

    def workers(self) -> list[int]:
        """The workers that live."""
        return [int(path.name) for path in self.pids.iterdir() if Path(f"/proc/{path.name}").exists()]

    def outputs(self) -> Bytes:
        """What was made and what was recorded of it; not when."""
        files = [*self.out.glob("annotations/*"), *self.out.glob("ledger/toy/*")]
        return {str(relative_to(path, self.out)): path.read_bytes() for path in files if path.is_file()}


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """Of the drivers of trainings: they find this very capfilt, and do not wait long for a head that is gone."""
    return {**os.environ, "PYTHONPATH": PATH, **IMPATIENT}


@pytest.fixture
def driver(web: Path, tmp_path: Path) -> Callable[..., Driver]:
    """Make a driver for the 40 shards, or for others."""

    def make(*words: object, shards: object = None, out: str = "run") -> Driver:
        where = storage_path(out) if "://" in out else tmp_path / out
        return Driver(where, [str(shards or web), *map(str, words)], tmp_path / f"{where.name}-pids")

    return make


@pytest.fixture
def spoiled(web: Path, tmp_path: Path) -> Callable[[dict[int, dict[int, str]]], Path]:
    """Copy the shards, some samples with other texts: shard -> sample -> text."""

    def copy(texts: dict[int, dict[int, str]]) -> Path:
        folder = Path(shutil.copytree(web, tmp_path / "spoiled"))
        for shard, own in texts.items():
            lines = [own.get(j, f"text {shard} {j}") for j in range(PER_SHARD)]
            write_shard(folder / f"{shard:05d}.tar", lines)
        return folder

    return copy


@pytest.fixture(scope="session")
def undisturbed(web: Path, tmp_path_factory: pytest.TempPathFactory) -> Bytes:
    """What the run makes when nothing happens to it, in one process."""
    home = tmp_path_factory.mktemp("undisturbed")
    run = Driver(home / "run", [str(web)], home / "run-pids")
    run.run()
    made = run.outputs()
    assert len(made) == 2 * NUM_SHARDS
    return made


# ---- trainings ----

STEPS, EVERY = 60, 10
PATIENCE = 400  # seconds for a driver, on a machine that does other things, too


@dataclass
class Training:
    """A driver of `capfilt pretrain`, in a process of its own."""

    out: StoragePath
    words: list[str]
    environment: dict[str, str]
    steps: int = STEPS
    every: int = EVERY
    process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Begin, or begin again."""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "capfilt", "pretrain", "blip-tiny", "--out", str(self.out), *self.words],
            env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def end(self) -> tuple[int, str]:
        """Wait for it; its exit code and what it said."""
        assert self.process is not None
        _, err = self.process.communicate(timeout=PATIENCE)
        return self.process.returncode, err

    def finish(self) -> None:
        """Run it to its end."""
        self.start()
        code, err = self.end()
        assert code == 0, err

    def step(self) -> int:
        """The newest step in its log."""
        log = self.out / "pretrain/log.jsonl"
        written = log.read_bytes() if log.is_file() else b""
        lines = [line for line in written.splitlines(keepends=True) if line.endswith(b"}\n")]
        return int(json.loads(lines[-1])["step"]) if lines else 0

    def saved(self) -> int:
        """The newest state on disk."""
        states = (self.out / "pretrain/states").glob("*/state.json")
        return max((int(path.parent.name) for path in states), default=0)

    def reach(self, step: int) -> None:
        """Wait until so many steps are logged."""
        assert self.process is not None
        give_up = time.monotonic() + PATIENCE
        while max(self.step(), self.saved()) < step:
            assert self.process.poll() is None, f"it ended before: {self.process.communicate()}"
            assert time.monotonic() < give_up, f"{self.step()} of {step} steps"
            time.sleep(0.002 if isinstance(self.out, Path) else 0.1)

    def weights(self) -> bytes:
        return (self.out / "pretrain/checkpoint/model.safetensors").read_bytes()


@pytest.fixture(scope="session")
def recipe(small_blip: Callable[..., Any], small_world: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What is trained: 60 steps of a small BLIP with dropout on the small world, a state every 10."""
    model = tmp_path_factory.mktemp("model") / "small.yaml"
    model.write_text(configs.to_yaml(small_blip(dropout=0.1, init_std=0.1).config))
    settings = {
        "model": model, "data": small_world / "human", "resources.workers": 2,
        "train.steps": STEPS, "train.checkpoint_every": EVERY, "train.log_every": 1, "train.loader.batch_size": 32,
    }  # fmt: skip
    return [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]


@pytest.fixture(scope="session")
def training(recipe: list[str], environment: dict[str, str]) -> Callable[..., Training]:
    """Make the driver of a training into a folder, or a place on a store."""

    def make(out: StoragePath, *words: str) -> Training:
        return Training(out, [*recipe, *words], environment)

    return make


# ---- the table ----

TITLE = "# Faults survived"
RUNS = """## Runs of 40 shards

Made by `make test-faults` on {day}, on {cores} CPU cores; not to be edited by hand. Each try hits a run of 40 shards,
of processes on a Ray of three nodes on one machine, at a moment or place that its seed decides; where that ended the
run, the same command is given again. Survived: every shard is committed, in = kept + dropped + failed, no temporary
file and no lock is left. Bytes equal: outputs and completion files are byte for byte those of a run to which nothing
happened; where a sample must fail, of a run in one process that knows it.

| fault | tries | survived | bytes equal |
|---|---|---|---|
"""
TRAININGS = """## Trainings

Made by `CAPFILT_FAULTS={seeds} pytest tests/faults/test_training.py` (part of `make test-faults`) on {day}, on {cores}
CPU cores; not to be edited by hand. Each try hits a training of two ranks (60 steps, a state every 10, dropout,
momentum copy) on a Ray of three nodes on one machine, at a moment that its seed decides. After the death of a rank or
of its node it goes on by itself; after that of the driver the same command is given again. Weights equal: the model is
byte for byte that of a training to which nothing happened. Steps lost: the newest in the log less those of the newest
state on disk, at most; states are written while training goes on, so a kill during the writing costs an interval more.

| fault | tries | survived | weights equal | steps lost |
|---|---|---|---|---|
"""


@dataclass
class Row:
    tries: int = 0
    survived: int = 0
    equal: int = 0
    most_lost: int | None = None

    def cells(self) -> str:
        figures = [self.tries, self.survived, self.equal] + ([] if self.most_lost is None else [self.most_lost])
        return " | ".join(map(str, figures))


class Record:
    """What became of each fault. A try that is not reported as survived was not."""

    def __init__(self, head: str, counts_steps: bool = False) -> None:
        self.head, self.counts_steps = head, counts_steps
        self.rows: dict[str, Row] = {}

    def begin(self, fault: str) -> Row:
        row = self.rows.setdefault(fault, Row(most_lost=0 if self.counts_steps else None))
        row.tries += 1
        return row

    def text(self) -> str:
        lines = (f"| {fault} | {row.cells()} |" for fault, row in self.rows.items())
        return (
            f"{self.head.format(day=datetime.now(UTC).date(), cores=os.cpu_count(), seeds=SEEDS)}"
            + "\n".join(lines)
            + "\n"
        )

    def write(self) -> None:
        """Put it in the place of its section of docs/faults.md; what was not tried keeps its own."""
        if not SEEDS or not self.rows:
            return
        path, name = HERE.parent.parent / "docs/faults.md", self.head.splitlines()[0]
        sections = {part.splitlines()[0]: part.rstrip("\n") for part in path.read_text().split("\n\n## ")[1:]}
        sections[name.removeprefix("## ")] = self.text().removeprefix("## ").rstrip("\n")
        order = [head.splitlines()[0].removeprefix("## ") for head in (RUNS, TRAININGS)]
        kept = [f"## {sections[title]}" for title in order if title in sections]
        path.write_text("\n\n".join([TITLE, *kept]).rstrip("\n") + "\n")


@pytest.fixture(scope="session")
def record() -> Iterator[Record]:
    kept = Record(RUNS)
    yield kept
    kept.write()


@pytest.fixture(scope="session")
def trainings() -> Iterator[Record]:
    kept = Record(TRAININGS, counts_steps=True)
    yield kept
    kept.write()


@pytest.fixture
def survives(record: Record, undisturbed: Bytes) -> Callable[..., Callable[..., None]]:
    """Say that a fault is tried; the answer runs a driver to its end and compares what it made with a run that nothing
    happened to."""

    def begin(fault: str) -> Callable[..., None]:
        row = record.begin(fault)

        def check(run: Driver, *words: object, expected: Bytes | None = None) -> None:
            run.run(*words)
            made = run.outputs()
            left = [path.name for path in run.out.rglob(".capfilt-part-*")] + [p.name for p in run.out.glob("lock-*")]
            row.survived += made.keys() == (expected or undisturbed).keys() and not left
            row.equal += made == (expected or undisturbed)
            assert made.keys() == (expected or undisturbed).keys()
            assert made == (expected or undisturbed)
            assert left == []

        return check

    return begin
