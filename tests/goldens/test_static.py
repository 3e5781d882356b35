"""What must not change says what it said when its golden was made. A change that is meant is written anew with
`python tests/goldens/static.py` and read in the diff of the commit; names, options, draws and keys are promises.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent.parent))

from goldens import static


@pytest.mark.parametrize("name", static.GOLDENS)
def test_it_says_what_it_said(name: str) -> None:
    head = static.kept(name)[0]
    if diff := static.changed(name):
        pytest.fail(f"{head}\n{diff}", pytrace=False)


def test_every_golden_says_what_it_was_made_with() -> None:
    assert {path.stem for path in static.FOLDER.iterdir()} == {*static.GOLDENS}
    for name in static.GOLDENS:
        head, text = static.kept(name)
        assert head.startswith("# Made with commit "), name
        assert text.count("\n") >= 15, name


def test_a_change_is_seen_as_the_lines_that_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    before = static.kept("options")[1]
    monkeypatch.setitem(static.GOLDENS, "options", lambda: before.replace("--captions int", "--texts int", 1))
    diff = static.changed("options").splitlines()
    assert [line for line in diff if line.startswith(("-", "+"))][2:] == [
        "-capfilt annotate --captions int min=1 max=1000",
        "+capfilt annotate --texts int min=1 max=1000",
    ]
