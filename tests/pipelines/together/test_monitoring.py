"""A bootstrap on a Ray that a Prometheus watches: whatever the dashboard draws is alive, and every number is right."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from capfilt.cluster.metrics import MAX_LABEL_VALUES
from capfilt.data import shards
from capfilt.data.sample import Sample
from capfilt.runs.metrics import TABLE
from deploy import dashboards

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

HOME = "127.0.0.1"
TOKEN = secrets.token_hex(32)
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(dashboards.ROOT),
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_metrics_report_interval_ms": "1000",  # numbers are handed on each second, not each tenth
    "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": TOKEN,
}
"""Of the head and of every driver."""


def free_ports(num: int) -> list[int]:
    sockets = [socket.create_server((HOME, 0)) for _ in range(num)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def fetch(url: str, token: str = "") -> Any:
    request = urllib.request.Request(url, headers={"authorization": f"Bearer {token}"} if token else {})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.loads(answer.read())


def eventually(look: Callable[[], Any], what: str, seconds: float = 120) -> Any:
    """What `look` finds, as soon as it is something."""
    give_up = time.monotonic() + seconds
    while True:
        try:
            if result := look():
                return result
        except (OSError, ValueError):
            pass
        assert time.monotonic() < give_up, f"{what}: nothing within {seconds:g} s"
        time.sleep(0.5)


@dataclass(frozen=True)
class Head:
    """A Ray head with its dashboard, and where things are."""

    address: str
    client: str
    dashboard: str
    discovery: Path

    def state(self, kind: str) -> list[dict[str, Any]]:
        """What Ray's state API lists."""
        answer = fetch(f"{self.dashboard}/api/v0/{kind}?limit=1000&detail=true&timeout=20", TOKEN)
        result: list[dict[str, Any]] = answer["data"]["result"]["result"]
        return result


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    port, client, dashboard, exported, agent = free_ports(5)
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # the paths of Ray's sockets must be short
    options = {
        "port": port, "ray-client-server-port": client, "num-cpus": 2,
        "dashboard-host": HOME, "dashboard-port": dashboard, "dashboard-agent-listen-port": agent,
        "metrics-export-port": exported, "temp-dir": folder, "object-store-memory": 80_000_000,
    }  # fmt: skip
    words = ["start", "--head", "--block", "--disable-usage-stats", *(f"--{k}={v}" for k, v in options.items())]
    with (folder / "said.txt").open("wb") as said:
        ray = [sys.executable, "-m", "ray.scripts.scripts", *words]
        process = subprocess.Popen(ray, env=ENVIRONMENT, stdout=said, stderr=said)
        try:
            discovery = folder / Path(dashboards.DISCOVERY).name
            eventually(discovery.is_file, "Ray's list of addresses")
            [[target, *_]] = [each["targets"] for each in json.loads(discovery.read_bytes())]
            host = target.rpartition(":")[0]  # Ray's idea of this machine's address
            yield Head(f"{host}:{port}", f"ray://{host}:{client}", f"http://{HOME}:{dashboard}", discovery)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(100)
    shutil.rmtree(folder, ignore_errors=True)  # a process of Ray may still be writing there


@pytest.fixture(scope="module")
def prometheus(head: Head, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Prometheus with the configuration of `deploy/`, but for its places and its haste; its address."""
    program = shutil.which("prometheus")
    if program is None:
        pytest.skip("no prometheus is installed")
    home, (port,) = tmp_path_factory.mktemp("prometheus"), free_ports(1)
    (home / "prometheus.yml").write_text(yaml.safe_dump(dashboards.prometheus(str(head.discovery), "1s")))
    options = {"config.file": home / "prometheus.yml", "storage.tsdb.path": home / "data"}
    words = [f"--{k}={v}" for k, v in options.items()] + [f"--web.listen-address={HOME}:{port}"]
    with (home / "said.txt").open("wb") as said:
        process = subprocess.Popen([program, *words], stdout=said, stderr=said)
        try:
            address = f"http://{HOME}:{port}"
            targets = f"{address}/api/v1/targets?state=active"
            eventually(lambda: any(t["health"] == "up" for t in fetch(targets)["data"]["activeTargets"]), "a target")
            yield address
        finally:
            process.terminate()
            process.wait(100)


@pytest.fixture(scope="module")
def run(
    head: Head, prometheus: str, recipe: Any, picture: Any, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, float]:
    """A bootstrap of two shards, a broken picture in the first; its folder, and when it began."""
    home = tmp_path_factory.mktemp("watched")
    for split, count in {"web": 24, "human": 24, "test": 8}.items():
        made = [Sample(f"{i:05d}", picture("PNG", seed=i), "png", f"a red square {i % 3}", {}) for i in range(count)]
        if split == "web":
            made[3] = Sample("00003", b"no picture at all", "png", "a red square", {})
        for i in range(0, count, 12):
            shards.write(home / split / f"{i // 12:05d}.tar", made[i : i + 12])
    data = {split: str(home / split) for split in ("web", "human", "test")}
    mine = recipe(home, data={**data, "allow_contamination": True})  # the splits share pictures
    words = ["bootstrap", mine, "--out", home / "run", "--address", head.address]
    begun = time.time()
    done = subprocess.run(
        [sys.executable, "-m", "capfilt", *map(str, words)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    time.sleep(2.5)  # the driver has handed on its last numbers as it left; Prometheus asks each second
    return home / "run", begun


def instant(prometheus: str, query: str) -> list[dict[str, Any]]:
    answer = fetch(f"{prometheus}/api/v1/query?{urllib.parse.urlencode({'query': query})}")
    result: list[dict[str, Any]] = answer["data"]["result"]
    return result


def by(prometheus: str, query: str, *labels: str) -> dict[tuple[str, ...], float]:
    """The newest value of a query within the last ten minutes."""
    result = instant(prometheus, query)
    return {tuple(each["metric"].get(label, "") for label in labels): float(each["value"][1]) for each in result}


def test_every_metric_that_the_dashboard_draws_is_alive(prometheus: str, run: tuple[Path, float]) -> None:
    """Excepted is what needs a GPU, where there is none: how busy it is, and MFU, a share of what it can do."""
    import torch

    here = {"gpu"} if torch.cuda.is_available() else set()
    expected = {metric.prometheus_name for metric in TABLE if not metric.needs or metric.needs in here}
    alive = {
        metric.prometheus_name
        for metric in TABLE
        if instant(prometheus, f"last_over_time({metric.prometheus_name}[10m])")
    }
    assert alive >= expected
    _, begun = run
    for panel in (panel for row in dashboards.ROWS.values() for panel in row):
        for query, _ in dashboards.queries(panel):
            filled = query.replace("$__rate_interval", "10s")
            for name in ("session", "driver", "stage"):
                filled = filled.replace(f"${name}", ".*")
            words = {"query": filled, "start": begun, "end": time.time(), "step": 1}
            answer = fetch(f"{prometheus}/api/v1/query_range?{urllib.parse.urlencode(words)}")
            assert answer["status"] == "success"
            assert bool(answer["data"]["result"]) == (panel.of.prometheus_name in alive), panel.title


def test_the_numbers_are_those_of_the_run(prometheus: str, run: tuple[Path, float]) -> None:
    folder, _ = run
    report = json.loads((folder / "summary.json").read_bytes())["rounds"][1]

    def total(name: str, *labels: str) -> dict[tuple[str, ...], float]:
        return by(prometheus, f"sum by ({', '.join(labels)}) (ray_capfilt_{name}_total)", *labels)

    samples = total("samples", "stage", "outcome")
    assert samples["annotate", "kept"] == 23
    assert samples["annotate", "failed"] == 1
    assert {name: samples.get(("select", name), 0) for name in ("kept", "dropped", "failed")} == report["samples"]
    assert total("samples_failed", "stage", "reason") == {
        ("annotate", reason): count for reason, count in report["failed"].items()
    } | {("select", reason): count for reason, count in report["failed"].items()}
    texts = total("texts", "stage", "source", "outcome")
    for source, kept in report["kept"].items():
        assert texts.get(("select", source, "kept"), 0) == kept
    dropped = total("texts_dropped", "stage", "source", "reason")
    assert {f"{source}: {reason}": count for (_, source, reason), count in dropped.items()} == report["dropped"]
    shards_done = total("shards", "stage", "outcome")
    assert shards_done["annotate", "done"] == shards_done["select", "done"] == 2
    assert total("train_steps", "stage") == {("captioner",): 4, ("filter",): 4, ("pretrain",): 8}
    assert total("train_samples", "stage")["pretrain",] == 8 * 16
    left = by(prometheus, "last_over_time(ray_capfilt_queue_depth[10m])", "stage")
    assert set(left.values()) == {0}
    phases = total("phase_seconds", "stage", "phase")
    assert {phase for _, phase in phases} == {"read", "decode", "copy", "vision", "caption", "score", "write"}
    seen = by(prometheus, "sum(ray_capfilt_batch_size_count)")
    assert seen == {(): 2}
    losses = by(prometheus, "last_over_time(ray_capfilt_train_loss[10m])", "stage", "objective")
    assert {"itc", "itm", "lm"} == {objective for stage, objective in losses if stage == "pretrain"}


def test_the_dashboard_says_shard_and_stage(head: Head, run: tuple[Path, float]) -> None:
    tasks = {task["name"] for task in head.state("tasks")}
    assert {f"{stage} {shard}.tar" for stage in ("annotate", "select") for shard in ("00000", "00001")} <= tasks
    assert {"train round-0-pretrain", "train round-1-captioner", "annotate opens"} <= tasks
    actors = [(actor["name"], actor["repr_name"]) for actor in head.state("actors")]
    assert ("annotate-0", "annotate-0") in actors
    assert ("select-0", "select-0") in actors
    assert "training" in {shown for _, shown in actors}


def test_a_driver_outside_the_cluster_loses_no_number(head: Head, prometheus: str) -> None:
    """And of reasons without end, most are counted as one."""
    code = (
        "import sys; from capfilt.cluster.session import connect; from capfilt.runs import metrics as m\n"
        "with connect(sys.argv[1]) as session:\n"
        "    for i in range(100):\n"
        "        session.report([m.failure_reading('outside')])\n"
        "        session.report([m.Reading('capfilt_samples_failed', 1, {'stage': 'outside', 'reason': f'r{i}'})])"
    )
    words = [sys.executable, "-c", code, head.client]
    done = subprocess.run(words, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    query = "sum by (stage) (ray_capfilt_shards_total{stage='outside'})"
    assert eventually(lambda: by(prometheus, query, "stage"), "the numbers", 10) == {("outside",): 100}
    reasons = by(prometheus, "sum by (reason) (ray_capfilt_samples_failed_total{stage='outside'})", "reason")
    assert len(reasons) == MAX_LABEL_VALUES + 1
    assert reasons["other",] == 100 - MAX_LABEL_VALUES
