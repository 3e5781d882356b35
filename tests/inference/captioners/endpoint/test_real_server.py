"""A server that is not ours: `transformers serve` on loopback, with a tiny vision-language model of random weights."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import vlms

from capfilt.inference.captioners.endpoint.server import ask_server
from capfilt.inference.config import AnnotateConfig

SECONDS = 120


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[str, str]]:
    """URL and model."""
    for needed in ("accelerate", "fastapi", "uvicorn"):
        pytest.importorskip(needed, reason=f"{needed} is not installed, which `transformers serve` needs")
    folder = vlms.save("llava", tmp_path / "llava")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    program = Path(sys.executable).parent / "transformers"
    words = [program, "serve", folder, "--device", "cpu", "--host", "127.0.0.1", "--port", str(port)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    with (
        (tmp_path / "log").open("wb") as log,
        subprocess.Popen(words, stderr=log, stdout=log, env=environment) as child,
    ):
        try:
            for _ in range(SECONDS):
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health").close()
                    break
                except OSError:
                    assert child.poll() is None, log.read_text()[-2000:]
                    time.sleep(1)
            yield f"http://127.0.0.1:{port}/v1", str(folder)
        finally:
            child.kill()


@pytest.mark.slow
def test_transformers_serve_captions_a_shard(
    served: tuple[str, str], finished_run: Path, tmp_path: Path, capfilt: Any
) -> None:
    url, model = served
    report = ask_server(url, model, AnnotateConfig())
    assert (report.version, report.honours_seeds) == ("", True)
    filter_, out = finished_run / "round-1/filter/checkpoint", tmp_path / "a"
    words = ["annotate", finished_run / "data/web/00000.tar", "--captioner", f"openai:{url}#{model}"]
    few = ["--set", "vlm.max_new_tokens=6", "--set", "requests.in_flight=4"]
    done = capfilt(*words, "--filter", filter_, "--out", out, *few)
    assert done.code == 0, done.err
    rows = [row for row in pq.read_table(out / "annotations/00000.parquet").to_pylist() if row["source"] == "synthetic"]
    assert len(rows) == 20
    assert sum(bool(row["text"]) for row in rows) >= 15, rows
    assert all(row["text"] or row["reason"].startswith("caption ") for row in rows)
