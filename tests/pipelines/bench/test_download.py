from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from capfilt.pipelines.bench import download
from capfilt.pipelines.bench.bench import BenchDownloadConfig
from capfilt.stages.download import DownloadConfig


class Job(NamedTuple):
    """Fetches at once."""

    out: Path
    config: DownloadConfig

    def open(self) -> Callable[[str], None]:
        stats = {"successes": self.config.shard_size, "start_time": 1.0, "end_time": 3.0}
        return lambda shard: (self.out / f"{shard}_stats.json").write_text(json.dumps(stats)) and None


def test_a_repeat_leaves_no_pictures_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of thousands a repeat all would be gigabytes, which are memory where temporary files lie in it."""
    monkeypatch.setattr(download, "DownloadJob", Job)
    worker = download._Worker(BenchDownloadConfig(), tmp_path, 80)
    for count in (3, 4):
        assert worker.fetch(count) > 0
    assert (len(worker.took), worker.fetching) == (2, [2.0, 2.0])
    assert [path.name for path in tmp_path.iterdir()] == ["list.jsonl"]
