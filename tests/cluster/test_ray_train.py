from __future__ import annotations

import os
import sys
import time
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import torch

from capfilt.cluster.failures import Failure
from capfilt.cluster.ray_train import end_training_actor, fit, prepare
from capfilt.cluster.session import Session, connect
from capfilt.cluster.training_actor import TrainingFailure, _explaining_failure, _peer_gone, _trainer_class
from capfilt.errors import ClusterError, ModelError

pytestmark = pytest.mark.usefixtures("pickled_by_value")


def reduces(config: dict[str, Any]) -> None:
    """Die at the first call, then write what all ranks sum to."""
    import torch
    import torch.distributed as dist

    rank = dist.get_rank()
    first = Path(config["out"], f"first-{rank}")
    if rank == 1 and not first.exists():
        first.touch()
        os._exit(7)
    total = torch.tensor([rank + 1.0])
    dist.all_reduce(total)
    Path(config["out"], f"rank-{rank}").write_text(
        f"{dist.get_backend()} {dist.get_world_size()} {total.item()} {torch.get_num_threads()} {os.getcwd()}"
    )
    Path(config["out"], f"pid-{rank}").write_text(str(os.getpid()))


def dies(config: dict[str, Any]) -> None:
    with Path(config["out"], "calls").open("a") as calls:
        calls.write("x")
    os._exit(7)


def refuses(config: dict[str, Any]) -> None:
    raise ModelError("width 7 has no 2 heads")


def stumbles(config: dict[str, Any]) -> None:
    with Path(config["out"], "calls").open("a") as calls:
        calls.write("x")
    raise KeyError("lr")


def sleeps(config: dict[str, Any]) -> None:
    Path(config["out"], "pid").write_text(str(os.getpid()))
    time.sleep(60)


def notes(config: dict[str, Any]) -> None:
    Path(config["out"], "pid").write_text(str(os.getpid()))


def imported(config: dict[str, Any]) -> None:
    Path(config["out"], "imported").write_text(str("chunk" in sys.modules))


@pytest.mark.slow
def test_two_workers_reduce_and_a_death_begins_again(ray_session: Session, tmp_path: Path) -> None:
    """And the next training of as many has the same processes, one of another number has others."""
    polls: list[float] = []

    def poll() -> float:
        polls.append(time.monotonic())
        return 0.0

    fit(
        ray_session, reduces, {"out": str(tmp_path)}, workers=2, cpus=1, gpus=0,
        storage=tmp_path / "ray", name="round-0", poll=poll,
    )  # fmt: skip
    here = os.getcwd()
    for rank in range(2):
        assert (tmp_path / f"rank-{rank}").read_text() == f"gloo 2 3.0 1 {here}"
    gaps = [after - before for before, after in pairwise(polls)]
    assert len(gaps) > 3
    assert sorted(gaps)[len(gaps) // 2] == pytest.approx(0.5, abs=0.4)
    files = [path for path in (tmp_path / "ray").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 100_000
    kept = {(tmp_path / f"pid-{rank}").read_text() for rank in range(2)}
    fit(ray_session, reduces, {"out": str(tmp_path)}, 2, 1, 0, tmp_path / "ray", "round-1")
    assert {(tmp_path / f"pid-{rank}").read_text() for rank in range(2)} == kept
    fit(ray_session, notes, {"out": str(tmp_path)}, 1, 1, 0, tmp_path / "ray", "alone")
    assert (tmp_path / "pid").read_text() not in kept


@pytest.mark.slow
def test_processes_that_wait_for_a_training_have_imported_what_it_needs(ray_session: Session, tmp_path: Path) -> None:
    """And nobody asks an autoscaler for their node, which takes a process more."""
    end_training_actor(ray_session)
    prepare(ray_session, 1, 1, 0, tmp_path / "ray", "waiting", modules=("chunk",))
    fit(ray_session, imported, {"out": str(tmp_path)}, 1, 1, 0, tmp_path / "ray", "waiting")
    assert (tmp_path / "imported").read_text() == "True"
    names = [actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)]
    assert not [name for name in names if "Autoscaling" in name]


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_only_deaths_without_progress_in_between_end_a_training(ray_session: Session, tmp_path: Path) -> None:
    calls = tmp_path / "calls"

    def poll() -> float:
        return min(calls.stat().st_size, 3) if calls.exists() else 0

    with pytest.raises(ClusterError, match="on lost a worker 3 times and got no further in between, last so: "):
        fit(ray_session, dies, {"out": str(tmp_path)}, 1, 1, 0, tmp_path / "ray", "on", poll)
    assert calls.read_text() == "xxxxx"  # further three times, and twice not


class TestAnywhere:
    @pytest.mark.parametrize("session", ["local", pytest.param("ray", marks=pytest.mark.slow)], indirect=True)
    def test_a_refusal_stays_what_it_was(self, session: Session, tmp_path: Path) -> None:
        with pytest.raises(ModelError) as caught:
            fit(session, refuses, {}, 1, 1, 0, tmp_path, "refuses")
        assert str(caught.value) == "width 7 has no 2 heads"

    @pytest.mark.parametrize("session", ["local", pytest.param("ray", marks=pytest.mark.slow)], indirect=True)
    def test_an_accident_is_a_cluster_error_with_its_traceback(self, session: Session, tmp_path: Path) -> None:
        with pytest.raises(ClusterError) as caught:
            fit(session, stumbles, {"out": str(tmp_path)}, 1, 1, 0, tmp_path, "stumbles")
        assert str(caught.value) == "stumbles: KeyError: 'lr'"
        assert 'raise KeyError("lr")' in caught.value.__notes__[0]
        assert (tmp_path / "calls").read_text() == "x"  # what was raised is not tried again

    def test_no_worker_is_refused(self, session: Session, tmp_path: Path) -> None:
        with pytest.raises(ClusterError, match="workers=0"):
            fit(session, notes, {}, 0, 1, 0, tmp_path, "none")


@pytest.mark.slow
def test_an_interrupt_ends_the_training_at_once(ray_session: Session, tmp_path: Path) -> None:
    pid = tmp_path / "pid"

    def interrupt() -> float:
        if pid.exists() and pid.read_text():
            raise KeyboardInterrupt
        return 0.0

    with pytest.raises(KeyboardInterrupt):
        fit(ray_session, sleeps, {"out": str(tmp_path)}, 1, 1, 0, tmp_path, "sleeps", interrupt)
    give_up = time.monotonic() + 60
    while Path(f"/proc/{pid.read_text()}").exists():
        assert time.monotonic() < give_up, "the training lives on"
        time.sleep(0.05)
    import ray

    while ray.available_resources().get("CPU", 0) < 2:
        assert time.monotonic() < give_up, "the training keeps its cores"
        time.sleep(0.05)


def test_more_workers_than_fit_are_refused(ray_session: Session, tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match="asks for 3 workers of 1 CPUs and 0 GPUs, and 2 fit here"):
        fit(ray_session, notes, {}, 3, 1, 0, tmp_path, "wide")


def test_local_is_this_process_and_one(tmp_path: Path) -> None:
    polls: list[int] = []

    def poll() -> float:
        polls.append(1)
        return 0.0

    fit(connect("local"), notes, {"out": str(tmp_path)}, 1, 1, 0, tmp_path, "here", poll)
    assert (tmp_path / "pid").read_text() == str(os.getpid())
    assert polls == [1]
    with pytest.raises(ClusterError, match="a local session is one process"):
        fit(connect("local"), notes, {}, 2, 1, 0, tmp_path, "here")


def test_the_failure_that_explains_the_others_is_reported() -> None:
    user_error = TrainingFailure(Failure.of_exception(ModelError("no")))
    lost = RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [10.0.0.1]:40513")
    orphan = TrainingFailure(Failure.of_exception(lost), _peer_gone(lost))
    bug = TrainingFailure(Failure.of_exception(ValueError("no")))
    death = RuntimeError("the actor died")
    assert _explaining_failure([orphan, user_error]).user_error is ModelError
    assert _explaining_failure([orphan, death]).died
    assert not _explaining_failure([orphan, bug]).died
    assert "ValueError: no" in _explaining_failure([orphan, bug]).message
    assert _explaining_failure([orphan, orphan]).died, (
        "nothing is heard of the worker that they waited for: it starts again"
    )


@pytest.mark.parametrize(
    ("error", "peer_gone"),
    [
        (torch.distributed.DistBackendError("NCCL error: remote process exited or there was a network error"), True),
        (RuntimeError("[enforce fail at inline_container.cc] ... disk full"), False),
        (torch.OutOfMemoryError("CUDA out of memory"), False),
        (torch.distributed.DistBackendError("NCCL error: unhandled cuda error, 'out of memory'"), False),
        (ValueError("timed out"), False),
    ],
)  # fmt: skip
def test_errors_of_torch_that_mean_a_lost_peer(error: Exception, peer_gone: bool) -> None:
    assert _peer_gone(error) == peer_gone


@pytest.mark.slow
def test_a_ray_that_names_its_parts_otherwise_starts_one_process_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `SingleNodeTrainer` turns off is internal to Ray."""
    trainer = _trainer_class(single_node=True)
    monkeypatch.setattr(
        trainer.__base__, "_initialize_and_run_controller", lambda _, *unnamed, **parts: (unnamed, parts)
    )
    policy = SimpleNamespace(_send_resource_request=len)
    start = trainer.__new__(trainer)._initialize_and_run_controller
    assert start(policy, other=policy) == ((policy,), {"other": policy})
    start(scaling_policy=policy)
    assert vars(policy).keys() == {"_send_resource_request"}
    assert policy._send_resource_request() is None
