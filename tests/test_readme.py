"""README: the table of verbs names every verb of the command line."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_every_verb_is_in_the_table() -> None:
    from capfilt.cli import app

    verbs = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}
    told = set(re.findall(r"^\| `(\w+)` \|", (ROOT / "README.md").read_text(), re.MULTILINE))
    assert told == verbs
