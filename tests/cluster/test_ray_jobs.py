from __future__ import annotations

import http.server
import re
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from capfilt import __version__
from capfilt.cluster import ray_jobs
from capfilt.cluster.ray_jobs import Command, Jobs
from capfilt.errors import ClusterError, UsageError

pytestmark = [
    # What Ray's client says to aiohttp at every log, and that it does not close what is left half-way.
    pytest.mark.filterwarnings("ignore:ssl=None is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*Connection.__del__:pytest.PytestUnraisableExceptionWarning"),
]


class Way:
    """A TCP proxy on loopback: the way to a head, which can be cut and mended."""

    def __init__(self, port: int) -> None:
        self._there = port
        self._ends: list[socket.socket] = []
        self._door = socket.create_server(("127.0.0.1", 0))
        self.port = self._door.getsockname()[1]
        self.open = True
        threading.Thread(target=self._serve, daemon=True).start()

    def cut(self) -> None:
        """Whoever is connected is not any more, and nobody comes in."""
        self.open = False
        for end in self._ends:
            end.close()
        self._ends.clear()

    def close(self) -> None:
        self.cut()
        self._door.close()

    def _serve(self) -> None:
        while True:
            try:
                here = self._door.accept()[0]
            except OSError:
                return
            if not self.open:
                here.close()
                continue
            there = socket.create_connection(("127.0.0.1", self._there))
            self._ends += [here, there]
            threading.Thread(target=_carry, args=(here, there), daemon=True).start()


def _carry(here: socket.socket, there: socket.socket) -> None:
    try:
        while True:
            for end in select.select([here, there], [], [], 1)[0]:
                data = end.recv(65536)
                if not data:
                    return
                (there if end is here else here).sendall(data)
    except (OSError, ValueError):  # cut
        return
    finally:
        here.close()
        there.close()


@pytest.fixture(scope="module")
def cluster(ray_head: Any) -> Jobs:
    return reached(ray_head.url)


def reached(url: str) -> Jobs:
    """The cluster, once its head has started."""
    end = time.monotonic() + 60
    while True:
        try:
            return Jobs(url)
        except ClusterError:
            if time.monotonic() > end:
                raise
            time.sleep(0.5)


@pytest.fixture
def way(cluster: Jobs) -> Iterator[Way]:
    way = Way(int(cluster.address.rpartition(":")[2]))
    yield way
    way.close()


@pytest.fixture
def begin(cluster: Jobs) -> Callable[..., str]:
    """Send a command that says so many lines, with pauses of so many seconds."""

    def begin(lines: int, version: str = __version__, pause: float = 0.5) -> str:
        recipe = {"recipe.yaml": f"seed: {lines}\npause: {pause}\n"}
        command = Command(("bootstrap", "a b"), version, recipe, {"out": "/mnt/a"})
        return cluster.submit(command, "capfilt-test")

    return begin


def counted(log: list[str]) -> list[int]:
    return [int(n) for n in re.findall(r"^line (\d+)$", "".join(log), re.MULTILINE)]


@pytest.mark.slow
def test_a_job_is_followed_to_its_end(cluster: Jobs, begin: Callable[..., str]) -> None:
    id = begin(3)
    log = list(cluster.follow(id, pytest.fail))
    assert counted(log) == [1, 2, 3]
    assert "words: bootstrap a b\n" in "".join(log)
    job = cluster.get(id)
    assert (job.state, job.code, job.over) == ("failed", 1, True)
    assert job.notes["out"] == "/mnt/a"
    assert job.began
    assert job.ended
    assert job.ended > job.began
    assert id in [each.id for each in cluster.list()]
    assert id.startswith("capfilt-test-")


@pytest.mark.slow
def test_no_two_jobs_share_a_package(cluster: Jobs, begin: Callable[..., str]) -> None:
    packages = {cluster._client.get_job_info(begin(1)).runtime_env["working_dir"] for _ in range(2)}
    assert len(packages) == 2


@pytest.mark.slow
def test_another_version_is_one_line(cluster: Jobs, begin: Callable[..., str]) -> None:
    id = begin(2, version="99.0")
    log = "".join(cluster.follow(id, pytest.fail))
    assert f"\nerror: capfilt 99.0 sent this job, and the PATH of the cluster's head has {__version__};" in log
    assert "words:" not in log
    assert cluster.get(id).code == 2


@pytest.mark.slow
def test_a_lost_connection_loses_and_repeats_no_line(
    cluster: Jobs, begin: Callable[..., str], way: Way, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_jobs, "PAUSE", 0.2)
    id, cuts = begin(12), [4, 9]
    log: list[str] = []
    said: list[str] = []

    def told(text: str) -> None:
        said.append(text)
        threading.Timer(2, lambda: setattr(way, "open", True)).start()

    for text in Jobs(f"http://127.0.0.1:{way.port}").follow(id, told):
        log.append(text)
        if cuts and len(counted(log)) >= cuts[0]:
            cuts.pop(0)
            way.cut()
    assert counted(log) == list(range(1, 13))
    assert len(said) == 2
    assert all("the connection is lost, the job is not" in line for line in said)
    assert cluster.get(id).state == "succeeded"


@pytest.mark.slow
def test_a_head_that_stays_away_is_given_up_and_the_job_goes_on(
    cluster: Jobs, begin: Callable[..., str], way: Way, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_jobs, "PAUSE", 0.2)
    monkeypatch.setattr(ray_jobs, "PATIENCE", 1.0)
    id = begin(200)
    log = Jobs(f"http://127.0.0.1:{way.port}").follow(id, lambda _: None)
    next(log)
    way.cut()
    with pytest.raises(ClusterError, match=f"{id} was at work when it was last seen, and goes on"):
        list(log)
    assert cluster.get(id).state == "running"
    cluster.stop(id)


@pytest.mark.slow
def test_a_silent_connection_is_opened_anew(
    cluster: Jobs, begin: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_jobs, "SILENCE", 2.5)
    id = begin(3, pause=4)
    assert counted(list(cluster.follow(id, pytest.fail))) == [1, 2, 3]


@pytest.mark.slow
def test_a_job_that_is_stopped_has_ended(cluster: Jobs, begin: Callable[..., str]) -> None:
    id = begin(100)
    next(iter(cluster.follow(id, pytest.fail)))
    job = cluster.stop(id)
    assert (job.state, job.code, job.over) == ("stopped", None, True)
    assert job.ended
    assert cluster.stop(id).state == "stopped"


@pytest.mark.slow
def test_a_job_that_is_not_there_is_one_line(cluster: Jobs) -> None:
    for ask in (cluster.get, cluster.stop, lambda id: list(cluster.follow(id, pytest.fail))):
        with pytest.raises(ClusterError, match=f"{cluster.address} knows no job nowhere: `capfilt jobs") as caught:
            ask("nowhere")
        assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_ray_s_own_variables_do_not_lead_elsewhere(ray_head: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    assert reached(ray_head.url).list() is not None


@pytest.mark.parametrize("address", ["host:8265", "ftp://host:8265", "http://", "http://host:eight"])
def test_what_is_no_dashboard_s_address_is_refused(address: str) -> None:
    with pytest.raises(UsageError, match=r"is no dashboard of a Ray head\. Allowed: http://HOST:PORT"):
        Jobs(address)


def test_a_head_that_is_not_there_is_one_line_at_once() -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        with pytest.raises(
            ClusterError, match=f"No Ray dashboard answers at '{address}': .*Connection refused"
        ) as caught:
            Jobs(address)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("status", "said"),
    [(401, "asks for a token and has not got the right one: set RAY_AUTH_MODE=token"), (404, "404"), (502, "502")],
)
def test_a_server_that_is_no_head_or_wants_a_token_is_one_line(status: int, said: str) -> None:
    class Refuses(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(status)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Refuses) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(ClusterError, match=said) as caught:
            Jobs(f"http://127.0.0.1:{server.server_port}")
        server.shutdown()
    assert "\n" not in str(caught.value)


def test_the_script_of_a_job_runs_what_the_sender_s_version_is(tmp_path: Path) -> None:
    import subprocess

    (tmp_path / "job.sh").write_text(ray_jobs._CHECKED.format(id="capfilt-a", version=__version__))
    done = subprocess.run(
        ["/bin/sh", "job.sh", "status"],
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith(
        f"error: capfilt {__version__} sent this job, and the PATH of the cluster's head has none;"
    )
    assert done.stderr.count("\n") == 1
