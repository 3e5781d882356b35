"""The verb: look at data and machine, write the recipes, say what to run next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from capfilt import config as configs
from capfilt.data.policy import PolicyConfig
from capfilt.errors import UsageError
from capfilt.pipelines.init import profile, recipe
from capfilt.pipelines.init.recipe import Answers
from capfilt.pipelines.inspect.machine import Machine
from capfilt.runs.progress import Progress
from capfilt.storage.atomic import atomic


def run(
    specs: Sequence[str], path: Path, answers: Answers, address: str, seed: int, force: bool, show: Progress
) -> dict[str, Any]:
    """Write the recipes, `path` and perhaps one beside it.

    Raises:
        UsageError: a recipe is there already and `force` is not given, or `path` is none of a YAML.
        NoShardError: there is no such data; DataError: none of it can be read.
    """
    if path.suffix not in (".yaml", ".yml"):
        raise UsageError(f"--out {path}: a recipe is a .yaml; write --out {path}.yaml.")
    if answers.human is None and (answers.val or answers.test):
        raise UsageError("--val and --test are for a recipe of the whole loop: give --human PAIRS too.")
    given = {} if answers.keep_rate is None else {"threshold": "keep-rate", "keep_rate": answers.keep_rate}
    rate = configs.validate(PolicyConfig, given, "--keep-rate").keep_rate  # what is typed at a prompt is a text
    with show.wait("looking at a sample of the data"):
        found = profile.look(specs, seed)
    here = Machine.look(address, path.parent / "runs", show)
    answers = Answers(**{**asdict(answers), "keep_rate": rate if given else None})
    written = recipe.write(specs, path, found, here, answers)
    if not force and (there := [name for name in written.files if Path(name).exists()]):
        raise UsageError(f"{' and '.join(there)} is there already; --force replaces it, --out writes another.")
    path.parent.mkdir(parents=True, exist_ok=True)
    for name, text in written.files.items():
        with atomic(Path(name)) as file:
            file.write(text.encode())
    commands = [{"what": what, "words": words} for what, words in written.commands]
    return {"recipes": list(written.files), **asdict(found), "machine": asdict(here), "next": commands}
