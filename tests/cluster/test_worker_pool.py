from __future__ import annotations

import gc
import os
import signal
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray
from pydantic import ValidationError

from capfilt.cluster import worker_pool
from capfilt.cluster.session import Session, connect
from capfilt.cluster.worker import ItemResult
from capfilt.cluster.worker_pool import Resources, run_items
from capfilt.errors import ClusterError, DataError, ModelError
from capfilt.runs import deadline
from capfilt.runs.ledger import Ledger
from capfilt.runs.usage import Meter, read_usage

HALF = Resources(cpus=0.5)


pytestmark = pytest.mark.usefixtures("pickled_by_value")


def once(marker: Path) -> bool:
    """True for the first caller in any process."""
    try:
        marker.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


@dataclass(frozen=True)
class Act:
    """A job whose items say what happens: "die", "crash-once", "refuse", ... anything else is answered."""

    folder: Path
    name: str = "act"

    def open(self) -> Callable[[str], dict[str, Any]]:
        (self.folder / f"opened-{os.getpid()}").touch()
        return self.answer

    def answer(self, item: str) -> dict[str, Any]:
        with (self.folder / f"{item}.calls").open("a") as calls:
            calls.write(f"{os.getpid()}\n")
        if item == "die-later":
            time.sleep(1)  # long enough for the answer to the item before it to leave the worker
        if item.startswith("die") and (item != "die-once" or once(self.folder / item)):
            os._exit(7)
        if item == "crash-late" and once(self.folder / item):
            time.sleep(4)
            raise ValueError("tripped late")
        if item.startswith("crash") and item != "crash-late" and (item != "crash-once" or once(self.folder / item)):
            raise ValueError(f"tripped over {item}")
        if item == "refuse":
            raise DataError("refuse: a torn tar")
        if item == "slow" or (item == "slow-once" and once(self.folder / item)):
            time.sleep(30)
        if item == "preempted" and once(self.folder / item):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(30)
        return {"item": item, "pid": os.getpid(), "threads": os.environ.get("OMP_NUM_THREADS")}

    def calls(self, item: str) -> list[str]:
        return (self.folder / f"{item}.calls").read_text().split()


@dataclass(frozen=True)
class Listening:
    """A job whose function is told what comes next, and answers with it."""

    folder: Path
    name: str = "listening"

    def open(self) -> Callable[[str], str | None]:
        return Listener(self)


class Listener:
    def __init__(self, job: Listening):
        self.job, self.expected = job, list[str | None]()

    def expect(self, item: str | None) -> None:
        self.expected.append(item)

    def __call__(self, item: str) -> str | None:
        time.sleep(0.1)
        if item == "die-once" and once(self.job.folder / item):
            os._exit(7)
        return self.expected[-1]

    def close(self) -> None:
        (self.job.folder / "closed").touch()


@dataclass(frozen=True)
class Unopenable:
    error: Exception | None
    name: str = "unopenable"

    def open(self) -> Callable[[str], str]:
        if self.error is None:
            os._exit(7)
        raise self.error


def ends(done: Iterator[ItemResult[dict[str, Any]]]) -> dict[str, ItemResult[dict[str, Any]]]:
    """By item; an item that ends twice is an error."""
    all_done = list(done)
    assert len({d.item for d in all_done}) == len(all_done)
    return {d.item: d for d in all_done}


class TestAnywhere:
    """What holds in this process and on Ray."""

    def test_every_item_ends_once_and_the_job_is_opened_once_a_worker(self, session: Session, tmp_path: Path) -> None:
        items = [f"{i:05d}" for i in range(20)]
        done = ends(run_items(session, Act(tmp_path), items, HALF))
        assert sorted(done) == items
        assert [done[item].result["item"] for item in items] == items
        assert not any(d.error for d in done.values())
        opened = {path.name.removeprefix("opened-") for path in tmp_path.glob("opened-*")}
        assert 1 <= len(opened) <= (1 if session.local else 4)
        assert {str(d.result["pid"]) for d in done.values()} <= opened

    def test_a_refusal_is_the_answer_and_is_not_tried_again(self, session: Session, tmp_path: Path) -> None:
        job = Act(tmp_path)
        done = ends(run_items(session, job, ["a", "refuse", "b"], HALF))
        assert done["refuse"] == ItemResult("refuse", None, "refuse: a torn tar")
        assert len(job.calls("refuse")) == 1
        assert done["a"].result
        assert done["b"].result

    def test_an_accident_is_tried_once_more(self, session: Session, tmp_path: Path) -> None:
        job = Act(tmp_path)
        done = ends(run_items(session, job, ["crash-once", "crash-always", "a"], HALF))
        assert done["crash-once"].error is None
        assert done["crash-always"].error == "ValueError: tripped over crash-always"
        assert len(job.calls("crash-once")) == len(job.calls("crash-always")) == 2
        if not session.local:
            assert len(set(job.calls("crash-always"))) == 2  # elsewhere

    @pytest.mark.parametrize("error", [ModelError("no such weights"), KeyError("weights")])
    def test_a_job_that_cannot_be_opened_is_one_error(self, session: Session, error: Exception) -> None:
        cause = str(error) if isinstance(error, ModelError) else "KeyError: 'weights'"
        with pytest.raises(ClusterError) as caught:
            list(run_items(session, Unopenable(error), ["a", "b", "c"], HALF))
        assert str(caught.value) == f"unopenable could not be opened: {cause}"
        assert "Traceback" in caught.value.__notes__[0]


def test_a_death_is_survived(ray_session: Session, tmp_path: Path) -> None:
    job = Act(tmp_path)
    items = ["a", "die-once", *(f"{i:05d}" for i in range(6))]
    done = ends(run_items(ray_session, job, items, Resources(cpus=1, workers=2)))
    assert sorted(done) == sorted(items)
    assert all(d.error is None for d in done.values())
    assert len(job.calls("die-once")) == 2


def pids(done: dict[str, ItemResult[dict[str, Any]]]) -> set[int]:
    return {each.result["pid"] for each in done.values() if each.result}


def test_the_next_job_has_the_same_workers_but_for_those_that_crashed_or_died(
    ray_session: Session, tmp_path: Path
) -> None:
    def run(name: str, *items: str, cpus: float = 1) -> set[int]:
        (tmp_path / name).mkdir()
        return pids(ends(run_items(ray_session, Act(tmp_path / name), items, Resources(cpus=cpus, workers=1), tries=1)))

    first = run("first", "a")
    assert run("second", "b", "refuse") == first
    assert run("third", "crash-once") == first  # by itself, where there is no other
    fourth = run("fourth", "c")
    assert not fourth & first
    names = [actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)]
    assert [name for name in names if name.startswith("worker-")], "an actor that outlives its job has no name of one"
    os.kill(fourth.pop(), signal.SIGKILL)  # while it is idle: no failed start, of which one would be too many
    fifth = run("fifth", "d")
    assert len(fifth) == 1
    assert not run("sixth", "e", cpus=2) & fifth  # another number of threads


def test_an_item_that_always_kills_is_given_up_and_alone(ray_session: Session, tmp_path: Path) -> None:
    job = Act(tmp_path)
    items = ["die-always", *(f"{i:05d}" for i in range(4))]
    done = ends(run_items(ray_session, job, items, Resources(cpus=1, workers=1), tries=2))
    assert sorted(done) == sorted(items)
    assert (done["die-always"].error or "").startswith("killed its worker 2 times, the last so: ")
    assert len(job.calls("die-always")) == 2
    assert [d.item for d in done.values() if d.error] == ["die-always"]
    assert {d.item: d.deaths for d in done.values() if d.deaths} == {"die-always": 2}


@pytest.mark.slow
def test_an_item_that_hangs_is_tried_once_more_and_then_given_up(ray_session: Session, tmp_path: Path) -> None:
    job, items = Act(tmp_path), ["slow", "slow-once", *(f"{i:05d}" for i in range(4))]
    with Meter.of(ledger := Ledger(tmp_path, "act"), cpus=1, gpus=0) as meter:
        done = ends(run_items(ray_session, job, items, Resources(cpus=1, limit=1.5), meter=meter))
    assert sorted(done) == sorted(items)
    assert done["slow"] == ItemResult("slow", None, "took longer than 1.5 s, twice")
    assert [d.item for d in done.values() if d.error] == ["slow"]
    assert len(set(job.calls("slow"))) == len(set(job.calls("slow-once"))) == 2
    used = read_usage(ledger)
    assert used is not None
    assert 4.5 <= used.cpu_busy < used.cpu_reserved, "three tries that came to nothing count too"


@pytest.mark.slow
def test_where_no_other_worker_is_left_the_same_one_tries_again(
    ray_session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second worker dies of an item that is given up, and nothing is left for a new one, but for what crashed."""
    monkeypatch.setattr(worker_pool, "OTHER_WORKER_SECONDS", 2.0)
    job = Act(tmp_path)
    done = ends(run_items(ray_session, job, ["crash-late", "die-later"], Resources(cpus=1, workers=2), tries=1))
    assert done["crash-late"].error is None
    assert done["die-later"].deaths == 1
    assert len(job.calls("crash-late")) == 2


def test_a_preemption_is_not_the_item_s_fault(ray_session: Session, tmp_path: Path) -> None:
    job = Act(tmp_path)
    done = ends(run_items(ray_session, job, ["preempted", "a"], Resources(cpus=1, workers=1), tries=1))
    assert not any(d.error for d in done.values())
    assert len(job.calls("preempted")) == 2


def test_a_worker_for_which_there_is_no_place_is_not_waited_for(ray_session: Session, tmp_path: Path) -> None:
    """As after a node was lost: the new worker has nowhere to go, and the others do its work."""
    ray_session.started_ray = False  # another's cluster might grow
    try:
        done = ends(run_items(ray_session, Act(tmp_path), ["a", "b", "c", "d"], Resources(cpus=1, workers=3)))
    finally:
        ray_session.started_ray = True
    assert len(done) == 4


def test_a_job_that_kills_its_workers_when_opened_is_one_error(ray_session: Session) -> None:
    with pytest.raises(ClusterError, match="2 workers in a row died of it"):
        list(run_items(ray_session, Unopenable(None), ["a"], HALF, tries=2))


def test_closing_early_kills_the_workers(ray_session: Session, tmp_path: Path) -> None:
    done = run_items(ray_session, Act(tmp_path), ["a", "slow", "slow", "b"], Resources(cpus=1))
    next(done)
    pids = [int(path.name.removeprefix("opened-")) for path in tmp_path.glob("opened-*")]
    assert pids
    done.close()  # type: ignore[attr-defined]
    give_up = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < give_up, "a worker lives on"
        time.sleep(0.05)


def test_workers_have_the_threads_of_their_cpus(ray_session: Session, tmp_path: Path) -> None:
    done = ends(run_items(ray_session, Act(tmp_path), ["a"], Resources(cpus=2)))
    assert done["a"].result["threads"] == "2"


def test_a_worker_that_fits_nowhere_is_refused(ray_session: Session, tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match=r"act fits: it needs 3 CPUs and 0 GPUs on a node"):
        list(run_items(ray_session, Act(tmp_path), ["a"], Resources(cpus=3, workers=1)))


def test_the_driver_spends_little_on_an_item(ray_session: Session, tmp_path: Path) -> None:
    done = run_items(ray_session, Act(tmp_path), [f"{i:05d}" for i in range(300)], Resources(cpus=1))
    next(done)
    before = time.process_time()
    assert len(list(done)) == 299
    assert (time.process_time() - before) / 299 < 0.005


def test_a_worker_is_told_what_it_will_be_given_next(session: Session, tmp_path: Path) -> None:
    items = [f"{i}" for i in range(6)]
    one = Resources(cpus=0.5, workers=1)
    told = {end.item: end.result for end in run_items(session, Listening(tmp_path), items, one)}
    assert told == dict(zip(items, [*items[1:], None], strict=True))
    if session.local:
        assert (tmp_path / "closed").exists()
        limited = Resources(limit=100)  # what was read ahead would come under the limit of the item before
        assert {end.result for end in run_items(session, Listening(tmp_path), items, limited)} == {None}


def test_no_item_is_promised_to_two_workers_and_one_that_lost_its_worker_is_alone(
    ray_session: Session, tmp_path: Path
) -> None:
    items = ["die-once", *(f"{i}" for i in range(9))]
    ends = list(run_items(ray_session, Listening(tmp_path), items, Resources(cpus=0.5, workers=2)))
    told = {end.item: end.result for end in ends}
    assert told.keys() == set(items)
    assert told["die-once"] is None
    promised = [following for following in told.values() if following is not None]
    assert len(promised) >= 5
    assert len(set(promised)) >= len(promised) - 2, "but for what was promised to the worker that died"


@pytest.mark.parametrize("needs", [{"cpus": 0}, {"gpus": -1}, {"workers": -1}, {"cores": 1}])
def test_resources_refuse_what_cannot_be(needs: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        Resources(**needs)


def test_no_items_need_no_worker(ray_session: Session) -> None:
    assert list(run_items(ray_session, Unopenable(None), [])) == []


def test_local_runs_in_this_process(tmp_path: Path) -> None:
    done = ends(run_items(connect("local"), Act(tmp_path), ["a"]))
    assert done["a"].result["pid"] == os.getpid()


class Circle:
    """A job whose function hangs on itself, as those that read ahead do."""

    name = "circle"

    def open(self) -> Callable[[str], str]:
        opened = Opened()
        self.opened = weakref.ref(opened)
        return opened


class Opened:
    def __init__(self) -> None:
        self.myself = self

    def __call__(self, item: str) -> str:
        return item


def test_nothing_that_a_job_has_loaded_stays_in_this_process() -> None:
    job = Circle()
    gc.disable()  # it comes when it likes
    try:
        assert len(list(run_items(connect("local"), job, ["a", "b"]))) == 2
        assert job.opened() is None
    finally:
        gc.enable()


@dataclass(frozen=True)
class Reading:
    """A job that reads for so many seconds."""

    name: str = "read"

    def open(self) -> Callable[[str], str]:
        def read(seconds: str) -> str:
            until = time.monotonic() + float(seconds)
            while time.monotonic() < until:
                deadline.check()
            return "read"

        return read


def test_in_this_process_an_item_ends_where_it_reads_on() -> None:
    begun = time.monotonic()
    with connect("local") as session:
        done = list(run_items(session, Reading(), ["0", "600", "0"], Resources(limit=0.3)))
        assert [end.result for end in done] == ["read", None, "read"]
        assert done[1].error == "took longer than 0.3 s; give it more time with --limit, or leave it out"
        assert list(run_items(session, Reading(), ["0.1"])) == [ItemResult("0.1", "read")]
    assert time.monotonic() - begun < 60
