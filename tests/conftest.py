"""What all tests share."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def shared_dir(pytestconfig: pytest.Config) -> Path:
    """A folder of reference material (photographs, BERT's vocabulary) beside the checkout; not part of it."""
    folder = pytestconfig.rootpath.parent / "shared"
    if not folder.is_dir():
        pytest.skip("no folder of reference material beside the checkout")
    return folder
