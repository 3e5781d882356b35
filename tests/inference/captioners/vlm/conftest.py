from __future__ import annotations

from pathlib import Path

import pytest
import vlms


@pytest.fixture(scope="session", params=vlms.KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="session")
def model(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vlms.save(kind, tmp_path_factory.mktemp("vlm") / kind)


@pytest.fixture(scope="session")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vlms.save("llava", tmp_path_factory.mktemp("vlm") / "llava")
