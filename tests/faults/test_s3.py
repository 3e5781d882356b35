"""Shards on S3, read from a real server on loopback, which may fail every tenth request."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from capfilt.data import shards
from capfilt.data.sample import Sample
from capfilt.errors import ShardError

pytest.importorskip("moto", reason="moto[server] and s3fs are part of the dev extras")
s3fs = pytest.importorskip("s3fs", reason="moto[server] and s3fs are part of the dev extras")

HERE = Path(__file__).parent


@contextmanager
def server(every: int) -> Iterator[str]:
    """Serve, and say where to whoever asks the environment for it."""
    command = [sys.executable, str(HERE / "s3_server.py"), str(every)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as child:
        assert child.stdout is not None
        url = f"http://127.0.0.1:{child.stdout.readline().strip()}"
        mine = {"AWS_ENDPOINT_URL": url, "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
        mine |= {"AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true"}
        before = {name: os.environ.get(name) for name in mine}
        os.environ.update(mine)
        s3fs.S3FileSystem.clear_instance_cache()
        try:
            yield url
        finally:
            child.kill()
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value
            s3fs.S3FileSystem.clear_instance_cache()


SOUND = pytest.param(0, id="sound", marks=pytest.mark.slow)
SHAKY = pytest.param(10, id="every-tenth-fails")


@pytest.fixture(params=[SOUND, SHAKY])
def bucket(request: pytest.FixtureRequest, web: Path) -> Iterator[str]:
    """A bucket with the 40 shards."""
    with server(request.param):
        files = s3fs.S3FileSystem()
        files.mkdir("capfilt")
        files.put(str(web) + "/", "capfilt/web/", recursive=True)
        yield "s3://capfilt"


def test_shards_are_found_read_and_told_apart(bucket: str, web: Path) -> None:
    braces = shards.expand(f"{bucket}/web/{{00000..00039}}.tar")
    assert braces == shards.expand(f"{bucket}/web/*.tar") == shards.expand(f"{bucket}/web")
    assert braces[7] == f"{bucket}/web/00007.tar"
    assert list(shards.read(braces[7])) == list(shards.read(str(web / "00007.tar")))
    before = shards.stat(braces[7])
    assert before["size"] == (web / "00007.tar").stat().st_size
    files = s3fs.S3FileSystem()
    data = bytearray((web / "00007.tar").read_bytes())
    data[600] ^= 1  # of one size, and perhaps of one second
    files.pipe(braces[7], bytes(data))
    files.invalidate_cache()
    assert shards.stat(braces[7]) != before
    with pytest.raises(ShardError, match="no shard found"):
        shards.expand(f"{bucket}/elsewhere")


def test_a_large_shard_comes_and_goes_in_parts(bucket: str, tmp_path: Path) -> None:
    samples = [Sample(f"{i:03d}", random.Random(i).randbytes(2_000_000), "jpg", "", {}) for i in range(8)]
    shards.write(tmp_path / "0.tar", samples)
    with (
        (tmp_path / "0.tar").open("rb") as source,
        s3fs.S3FileSystem().open("capfilt/large/0.tar", "wb", block_size=5 * 2**20) as target,
    ):
        while piece := source.read(2**20):
            target.write(piece)
    assert list(shards.read(f"{bucket}/large/0.tar")) == samples
    assert "-" in shards.stat(f"{bucket}/large/0.tar")["version"], "the etag of an upload in parts has a dash"


def test_a_run_on_shards_of_s3(
    bucket: str, driver: Callable[..., Any], record: Any, undisturbed: dict[str, bytes], request: Any
) -> None:
    row = record.begin(f"shards on S3 ({request.node.callspec.id})")
    run = driver(shards=f"{bucket}/web")
    run.run()
    made = {name: data for name, data in run.outputs().items() if name.startswith("annotations")}
    row.survived += len(run.outputs()) == 80
    row.equal += all(undisturbed[name] == data for name, data in made.items())
    assert len(run.outputs()) == 80
    assert all(undisturbed[name] == data for name, data in made.items())
