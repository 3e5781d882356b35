from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from capfilt.data import annotations, scores
from capfilt.data.annotations import Annotation
from capfilt.storage.atomic import sha256_file

MakeRun = Callable[..., Path]


def row(source: str = "web", candidate: int = 0, **fields: Any) -> Annotation:
    """One text of an image, with everything that a test does not name."""
    values: dict[str, Any] = {"text": "a cat", "itm": 0.5, "itc": 0.1, "status": "ok", "reason": "", **fields}
    key = values.pop("key", "k")
    return Annotation(key, "u", "s", source, candidate, captioner="", filter="", seed=0, round=0, **values)


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """Writes the annotations of shards and further scores of them, as `annotate` does: give rows in the order of their
    keys, sources and candidates, and by score a value for each row."""

    def make(shards: Sequence[Sequence[Annotation]], further: Mapping[str, Sequence[float | None]] = {}) -> Path:
        (tmp_path / "run" / "annotations").mkdir(parents=True)
        begin = 0
        for number, rows in enumerate(shards):
            path = tmp_path / "run" / "annotations" / f"{number:05d}.parquet"
            annotations.write(path, rows)
            for name, values in further.items():
                part = [None if value is None else float(np.float32(value)) for value in values[begin:][: len(rows)]]
                scores.write(scores.path_of(tmp_path / "run", name, path.stem), name, part, sha256_file(path))
            begin += len(rows)
        return tmp_path / "run"

    return make
