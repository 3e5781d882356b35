"""One Ray for all tests of the cluster: a start costs seconds."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from capfilt.cluster.session import Session, connect


@pytest.fixture(scope="session")
def ray_session() -> Iterator[Session]:
    with connect("start", cpus=2) as session:
        yield session


@pytest.fixture(params=["local", "ray"])
def session(request: pytest.FixtureRequest) -> Session:
    """The same test in this process and on Ray."""
    if request.param == "local":
        return connect("local")
    return request.getfixturevalue("ray_session")
