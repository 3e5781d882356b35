"""What the table of families says of each agrees with its code."""

from __future__ import annotations

import pytest

from capfilt.models import FAMILIES


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_exported_in_a_layout_that_its_code_has(name: str) -> None:
    family = FAMILIES[name]
    assert family.name == name
    assert (family.written_as == "hf") == (family.code.transformers is not None)
    assert (family.written_as == "pth") <= (family.code.original is not None)
