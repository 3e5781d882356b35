"""One Ray for all tests of the cluster: a start costs seconds."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from capfilt.cluster.session import Session, connect

CPUS = 2


@pytest.fixture(scope="package")
def started_ray() -> Iterator[list[Session]]:
    """The Ray that runs, if any, as the one entry of a list."""
    running: list[Session] = []
    yield running
    for session in running:
        session.close()


@pytest.fixture
def ray_session(started_ray: list[Session]) -> Session:
    """A Ray with two cores that are free. One that does not get its cores back from an earlier test is ended, and
    another begun: Ray loses the cores of an actor that is killed in the very moment in which it begins."""
    if started_ray and not cores_come_back():
        started_ray.pop().close()
    if not started_ray:
        started_ray.append(connect("start", cpus=CPUS))
    return started_ray[0]


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
