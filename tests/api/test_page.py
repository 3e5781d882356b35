"""docs/python_api.md: its blocks are run as they stand, in a process of their own, and its tables are what there is."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import capfilt
from capfilt.data import shards
from capfilt.data.sample import Sample

PAGE = Path(__file__).parents[2] / "docs/python_api.md"
BLOCKS = re.findall(r"^```python([^\n]*)\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)


def prepare(home: Path, finished_run: Path, training: dict[str, Any]) -> None:
    """A folder with what the page takes for given."""
    shutil.copytree(finished_run, home / "runs/mine")
    shutil.copy(finished_run.parent / "mine.yaml", home / "my.yaml")
    (home / "shards").mkdir()
    for tar in sorted((finished_run / "data/web").glob("*.tar"))[:2]:
        shutil.copy(tar, home / "shards")
    for role in ("captioner", "filter"):
        shutil.copytree(finished_run / "round-1" / role / "checkpoint", home / "models" / role)
    first = next(item for item in shards.read(str(home / "shards/00000.tar")) if isinstance(item, Sample))
    (home / "cat.png").write_bytes(first.image)
    recipe = yaml.safe_load((home / "my.yaml").read_text())
    pretrain = {"model": recipe["model"], "data": "shards", "train": training}
    (home / "my-pretrain.yaml").write_text(yaml.safe_dump(pretrain))


@pytest.mark.slow
def test_the_blocks_run(tmp_path: Path, finished_run: Path) -> None:
    recipe = yaml.safe_load((finished_run.parent / "mine.yaml").read_text())
    prepare(tmp_path, finished_run, recipe["pretrain"])
    code = "\n".join(block for how, block in BLOCKS if not how)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr
    printed = done.stdout.splitlines()
    assert re.fullmatch(r"[1-9]\d* of 40 images kept, in runs/clean/dataset", printed[0])
    assert printed[-1] == "annotate: 1 of 1 shards {'in': 20, 'kept': 20}"
    assert {"exported", "runs"} <= {path.name for path in tmp_path.iterdir()}


def test_all_but_the_download_are_run() -> None:
    assert [block.split("(")[0] for how, block in BLOCKS if how] == ["capfilt.download"]


def test_the_table_has_every_function_with_its_result() -> None:
    rows = re.findall(r"^\| (`.+?`) \| `(\w+)`", PAGE.read_text(), re.MULTILINE)
    listed = {name: result for names, result in rows for name in re.findall(r"\w+", names)}
    in_results = {name for name in capfilt.__all__ if name.islower() and "_" not in name} - {"webdataset"}
    assert listed.keys() == in_results | {"build_index", "export_data"}, (
        "capfilt.index is a package, and export is of models"
    )
    assert set(listed.values()) <= set(capfilt.__all__)


def test_the_tree_has_every_error() -> None:
    tree = re.findall(r"^[│ ]*(?:[├└]── )?(\w+Error)\b", PAGE.read_text(), re.MULTILINE)
    assert sorted(tree) == sorted(name for name in capfilt.__all__ if name.endswith("Error"))
