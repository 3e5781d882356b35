"""One Ray for all tests of the cluster: a start costs seconds, and one that nobody uses half a second in each 20."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from capfilt.cluster.ray_train import end_training_actor
from capfilt.cluster.session import Session, connect

CPUS = 2
STARTED: list[Session] = []
"""The Ray that runs, if any."""


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(nextitem: pytest.Item | None) -> None:
    """End it with the last of these tests that follow one another."""
    if STARTED and (nextitem is None or not nextitem.path.is_relative_to(Path(__file__).parent)):
        STARTED.pop().close()


@pytest.fixture
def ray_session() -> Session:
    """A Ray with two cores that are free. One that does not get its cores back from an earlier test is ended, and
    another begun: Ray loses the cores of an actor that is killed in the very moment in which it begins."""
    if STARTED:
        end_training_actor(STARTED[0])
    if STARTED and not cores_come_back():
        STARTED.pop().close()
    if not STARTED:
        STARTED.append(connect("start", cpus=CPUS))
    return STARTED[0]


def cores_come_back(patience: float = 20) -> bool:
    """Whether all cores are free before `patience` seconds are over."""
    import ray

    give_up = time.monotonic() + patience
    while ray.available_resources().get("CPU", 0) < CPUS:
        if time.monotonic() > give_up:
            return False
        time.sleep(0.05)
    return True


@pytest.fixture(scope="module")
def pickled_by_value(request: pytest.FixtureRequest) -> Iterator[None]:
    """What a test module sends to a worker goes there whole: workers cannot import test modules."""
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(request.module)
    yield
    cloudpickle.unregister_pickle_by_value(request.module)


@pytest.fixture(params=["local", "ray"])
def session(request: pytest.FixtureRequest) -> Session:
    """The same test in this process and on Ray."""
    if request.param == "local":
        return connect("local")
    return request.getfixturevalue("ray_session")
