"""Shards and run folders on S3: a real server on loopback, which may fail every tenth request."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from capfilt.cli import app
from capfilt.data import shards
from capfilt.data.sample import Sample
from capfilt.errors import RunError, ShardError
from capfilt.runs.locking import lock
from capfilt.runs.locking.lock_file import LOCK_FOLDER, find_lock
from capfilt.storage import remote_path
from capfilt.storage.atomic import atomic, sweep
from capfilt.storage.paths import listing
from capfilt.storage.remote_path import RemotePath

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


@pytest.fixture(scope="module", params=[SOUND, SHAKY])
def s3(request: pytest.FixtureRequest) -> Iterator[str]:
    """The address of a server."""
    with server(request.param) as url:
        yield url


@pytest.fixture
def bucket(s3: str) -> str:
    """An empty bucket, on a server that forgets what the tests before it wrote."""
    s3fs.S3FileSystem.clear_instance_cache()
    urllib.request.urlopen(urllib.request.Request(f"{s3}/moto-api/reset", method="POST"), timeout=60).close()
    s3fs.S3FileSystem().mkdir("capfilt")
    return "s3://capfilt"


@pytest.fixture
def web_on_s3(bucket: str, web: Path) -> str:
    """The 40 shards, in the bucket."""
    s3fs.S3FileSystem().put(str(web) + "/", "capfilt/web/", recursive=True)
    return f"{bucket}/web"


def test_shards_are_found_read_and_distinguished(bucket: str, web_on_s3: str, web: Path) -> None:
    braces = shards.expand(f"{web_on_s3}/{{00000..00039}}.tar")
    assert braces == shards.expand(f"{web_on_s3}/*.tar") == shards.expand(web_on_s3)
    assert braces[7] == f"{web_on_s3}/00007.tar"
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
    web_on_s3: str, driver: Callable[..., Any], record: Any, undisturbed: dict[str, bytes], request: Any
) -> None:
    row = record.begin(f"shards on S3 ({request.node.callspec.id})")
    run = driver(shards=web_on_s3)
    run.run()
    made = {name: data for name, data in run.outputs().items() if name.startswith("annotations")}
    row.survived += len(run.outputs()) == 80
    row.equal += all(undisturbed[name] == data for name, data in made.items())
    assert len(run.outputs()) == 80
    assert all(undisturbed[name] == data for name, data in made.items())


def look(*words: object) -> tuple[int, dict[str, Any]]:
    """A verb that looks at a run: its exit code, and what it says as JSON."""
    done = CliRunner().invoke(app, [*map(str, words), "--json"])
    return done.exit_code, json.loads(done.stdout)


def settled(out: RemotePath) -> None:
    """Nothing half-written is left of a run: no lock, no upload that nobody ended."""
    assert s3fs.S3FileSystem().list_multipart_uploads("capfilt") == []
    assert listing(out / LOCK_FOLDER) == {}


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_run_folder_on_s3(bucket: str, web_on_s3: str, driver: Callable[..., Any], record: Any, request: Any) -> None:
    """Byte for byte what the same run leaves in a folder; and all who look see it."""
    row = record.begin(f"a run folder on S3 ({request.node.callspec.id})")
    there, here = driver(shards=web_on_s3, out=f"{bucket}/run"), driver(shards=web_on_s3)
    here.run()
    there.run()
    row.survived += len(there.outputs()) == 80
    row.equal += there.outputs() == here.outputs()
    assert there.outputs() == here.outputs()
    settled(there.out)
    assert there.run() == here.run(), "what is done stays done"
    code, answer = look("status", there.out)
    assert (code, answer["stages"][0]["done"], answer["state"]) == (0, 40, "done: every stage that was begun")
    code, answer = look("verify", there.out)
    assert (code, answer["files"], answer["broken"]) == (0, 40, [])


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_driver_of_a_run_on_s3_is_killed(
    bucket: str, driver: Callable[..., Any], record: Any, undisturbed: dict[str, bytes], seed: int
) -> None:
    row = record.begin("SIGKILL of the driver of a run on S3")
    run = driver("--pause", "0.01", out=f"{bucket}/run-{seed}")
    run.start()
    run.reach(random.Random(seed).randrange(1, 30))
    run.send(signal.SIGKILL)
    run.end()
    assert run.done() < 40, "it was over before"
    assert look("status", run.out)[1]["state"].startswith("died")
    run.run()
    row.survived += len(run.outputs()) == 80
    row.equal += run.outputs() == undisturbed
    assert run.outputs() == undisturbed
    settled(run.out)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_worker_of_a_run_on_s3_is_killed(
    bucket: str, nodes: Any, driver: Callable[..., Any], record: Any, undisturbed: dict[str, bytes], seed: int
) -> None:
    """The nodes are started after the server, so that their workers know where it is."""
    row = record.begin("SIGKILL of a worker of a run on S3")
    nodes.stop()
    chance = random.Random(seed)
    run = driver("--address", nodes.address, "--pause", "0.01", out=f"{bucket}/run-{seed}")
    try:
        run.start()
        run.reach(chance.randrange(1, 25))
        os.kill(chance.choice(run.workers()), signal.SIGKILL)
        code, _, err = run.end()
    finally:
        nodes.stop()
    assert code == 0, err
    row.survived += len(run.outputs()) == 80
    row.equal += run.outputs() == undisturbed
    assert run.outputs() == undisturbed
    settled(run.out)


def test_a_training_onto_s3(bucket: str, recipe: list[str], tmp_path: Path) -> None:
    """Byte for byte the model of a training into a folder, its states sent there on the way."""
    made = []
    short = ("--set", "train.steps=4", "--set", "train.checkpoint_every=2", "--set", "train.keep_best=true")
    for out in (RemotePath(f"{bucket}/training"), tmp_path / "training"):
        words = ["pretrain", "blip-tiny", "--out", str(out), *recipe, *short, "--address", "local"]
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 0, done.output
        folder = out / "pretrain"
        assert len((folder / "log.jsonl").read_bytes().splitlines()) == 4
        assert not (folder / "states").exists()
        made.append([(folder / f"{name}/model.safetensors").read_bytes() for name in ("checkpoint", "best")])
    assert made[0] == made[1]
    settled(RemotePath(f"{bucket}/training"))
    assert look("verify", f"{bucket}/training")[0] == 0


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("bucket", [SHAKY], indirect=True)
def test_the_driver_of_a_training_onto_s3_is_killed(
    bucket: str, nodes: Any, training: Callable[..., Any], trainings: Any, tmp_path: Path
) -> None:
    """Two ranks that share the weights, so that each writes a part of a state. The nodes are started after the server:
    their workers know where it is."""
    row = trainings.begin("SIGKILL of the driver, FSDP onto S3 of which every tenth request fails")
    nodes.stop()
    words = ("--set", "resources.parallel=fsdp", "--address", nodes.address)
    run, calm = training(RemotePath(f"{bucket}/training"), *words), training(tmp_path / "calm", *words)
    run.environment = calm.environment = {**run.environment, **os.environ}
    try:
        run.start()
        run.reach(20)  # the second state
        run.process.kill()
        run.end()
        assert run.saved() >= run.every
        run.finish()
        calm.finish()
    finally:
        nodes.stop()
    row.survived += 1
    row.equal += run.weights() == calm.weights()
    assert run.weights() == calm.weights()
    settled(run.out)


def test_a_large_object_appears_with_its_last_request(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_path, "PART_BYTES", 5 * 2**20)
    path = RemotePath(f"{bucket}/run/dataset/00000.tar")
    data = random.Random(0).randbytes(13 * 2**20)
    with atomic(path) as file:
        file.write(data)
        assert not path.exists()
    assert path.read_bytes() == data
    assert "-" in shards.stat(str(path))["version"], "it went in parts"
    with pytest.raises(ZeroDivisionError), atomic(path) as file:
        file.write(b"half" * 2**22)
        raise ZeroDivisionError
    assert path.read_bytes() == data
    assert s3fs.S3FileSystem().list_multipart_uploads("capfilt") == []


def test_an_upload_that_a_kill_cut_short_is_unseen_and_swept(bucket: str) -> None:
    """A process begins an upload in parts and dies of it."""
    run = RemotePath(f"{bucket}/run")
    code = (
        "import os, s3fs; files = s3fs.S3FileSystem()\n"
        "file = files.open('capfilt/run/dataset/00000.tar', 'wb', block_size=5 * 2**20)\n"
        "file.write(bytes(12 * 2**20)); os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    elsewhere = s3fs.S3FileSystem()
    elsewhere.call_s3("create_multipart_upload", Bucket="capfilt", Key="run2/a")
    begun = {upload["Key"] for upload in elsewhere.list_multipart_uploads("capfilt")}
    assert begun == {"run/dataset/00000.tar", "run2/a"}
    assert not (run / "dataset/00000.tar").exists()
    assert sweep(run) == 1
    assert [upload["Key"] for upload in elsewhere.list_multipart_uploads("capfilt")] == ["run2/a"]


def test_the_lock_on_s3_is_a_conditional_put(bucket: str) -> None:
    run = RemotePath(f"{bucket}/run")
    assert (run / "a").create(b"first")
    assert not (run / "a").create(b"second")
    held = lock.acquire(run, interval=0.05)
    result = find_lock(run)
    assert result is not None
    give_up = time.monotonic() + 20  # a beat that fails is tried again, later each time
    while not (beats := result.read_heartbeat()) and time.monotonic() < give_up:
        time.sleep(0.05)
    assert int(beats) > 0
    with pytest.raises(RunError, match=f"{run} is in use by process {os.getpid()}"):
        lock.acquire(run)
    held.release()
    assert listing(run / LOCK_FOLDER) == {}
