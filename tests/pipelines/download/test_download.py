"""`capfilt download` from end to end, against a server on loopback."""

from __future__ import annotations

import ast
import functools
import gc
import http.server
import json
import re
import subprocess
import sys
import tarfile
import threading
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset

from capfilt.data import shards
from capfilt.data.sample import Sample
from capfilt.data.synthetic import world
from capfilt.runs.ledger import Ledger
from capfilt.stages.download import DownloadConfig


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [row for path in sorted(folder.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


def members(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {entry.name: tar.extractfile(entry).read() for entry in tar}  # type: ignore[union-attr]


# ---- a clean list, and who reads what came of it ----


def size_as_open_clip_finds_it(tars: list[str]) -> int:
    """open_clip's data.py, get_dataset_size: sizes.json beside the first shard, else __len__."""
    folder = Path(tars[0]).parent
    if (folder / "sizes.json").exists():
        sizes = json.loads((folder / "sizes.json").read_text())
        return sum(int(sizes[Path(tar).name]) for tar in tars)
    return int(ast.literal_eval((folder / "__len__").read_text()))


def test_a_list_becomes_shards_that_others_read(hostile: Any, hostile_kind: Any, fetch: Any, tmp_path: Path) -> None:
    urls = [hostile.url(f"/ok?seed={i}") for i in range(7)]
    done = fetch(
        [*urls, hostile.url("/status/404")], "--number_sample_per_shard", "3", "--save_additional_columns", '["n"]'
    )
    assert done.code == 0, done.err
    answer = json.loads(done.out)
    assert answer["samples"] == {"in": 8, "kept": 7, "failed": 1}
    assert (answer["success_rate"], answer["failed"]) == (0.875, {"http-404": 1})
    out = tmp_path / "out"
    tars = shards.expand(str(out))
    assert [Path(tar).name for tar in tars] == ["00000.tar", "00001.tar", "00002.tar"]
    assert size_as_open_clip_finds_it(tars) == 7
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # it leaves closing the tars to the garbage collector
        read = list(webdataset.WebDataset(tars, shardshuffle=False).decode())
        gc.collect()
    assert [sample["__key__"] for sample in read] == [
        "000000",
        "000001",
        "000002",
        "000010",
        "000011",
        "000012",
        "000020",
    ]
    assert [sample["txt"] for sample in read] == [f"text {i}" for i in range(7)]
    assert [sample["json"]["n"] for sample in read] == list(range(7))
    ours = [item for tar in tars for item in shards.read(tar)]
    assert all(isinstance(item, Sample) for item in ours)
    assert [item.image for item in ours if isinstance(item, Sample)] == [hostile_kind.jpeg(i) for i in range(7)]
    assert [item.uid for item in ours if isinstance(item, Sample)] == [sample["json"]["uid"] for sample in read]
    assert json.loads((out / "summary.json").read_text())["samples"] == answer["samples"]
    assert not (out / "tmp").exists()


@pytest.mark.slow
def test_workers_on_ray_write_what_one_process_writes(hostile: Any, fetch: Any, tmp_path: Path) -> None:
    urls = [hostile.url(f"/ok?seed={i}") for i in range(6)]
    assert fetch(urls, "--shard-size", "2").code == 0
    done = fetch(urls, "--shard-size", "2", "--host-rate", "50", out="ray", address="start")
    assert done.code == 0, done.err
    for name in ("00000.tar", "00001.tar", "00002.tar", "00000.parquet", "sizes.json"):
        assert (tmp_path / "ray" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


# ---- a hostile list ----

ENDS = {
    "/ok?seed=1": "", "/gzip": "", "/hops/5": "", "/animated": "",
    "/drip": "timeout", "/drip-head": "timeout", "/hang": "timeout", "/continue?slowly": "timeout",
    "/continue": "bad-answer", "/headers": "bad-answer", "/header": "bad-answer", "/garbage": "bad-answer",
    "/endless": "too-big", "/bomb": "too-big", "/wrong?by=99": "cut", "/wrong?by=-99": "truncated",
    "/wide": "too-many-pixels", "/loop": "redirects", "/hops/6": "redirects", "/to?u=/ok": "",
    "/to?u=file:///etc/passwd": "bad-url", "/status/404": "http-404", "/status/500": "http-500",
    "/busy?after=900": "long-pause", "/html": "not-an-image", "/svg": "not-an-image", "/nothing": "not-an-image",
    "/brotli": "encoding", "/hints": "", "/status/101": "bad-answer", "/ok?tag=noai": "opt-out", "/secret/1": "robots",
}  # fmt: skip


def test_every_hostile_url_is_one_row_with_its_kind_and_the_rest_is_unharmed(
    hostile: Any, fetch: Any, tmp_path: Path
) -> None:
    hostile.robots = "User-agent: *\nDisallow: /secret"
    paths = sorted(ENDS, key=lambda path: path.startswith("/busy"))  # its pause would be everyone's
    cuts = [f"/cut/{at}" for at in range(1000, 9001, 1000)] + [f"/cut/{at}?untold" for at in range(1000, 9001, 1000)]
    malformed = [
        "file:///etc/passwd",
        "ftp://127.0.0.1/x",
        "not a url",
        "",
        "http://[::1",
        "http://[]/x",
        "http://℀.com/",
    ]
    others = [*malformed, "http://127.0.0.1:9/"]
    urls = [*(hostile.url(path) for path in [*cuts, *paths[:-1]]), *others, hostile.url(paths[-1])]
    done = fetch(urls, "--deadline", "4", "--timeout", "2", "--max-bytes", "1000000", "--thread-count", "4")
    assert done.code == 0, done.err
    rows = rows_of(tmp_path / "out")
    assert [row["url"] for row in rows] == urls
    kinds = {row["url"]: (row["error_message"] or "").partition(":")[0] for row in rows}
    assert {path: kinds[hostile.url(path)] for path in ENDS} == ENDS
    assert {kinds[hostile.url(path)] for path in cuts if "untold" not in path} == {"cut"}
    assert {kinds[hostile.url(path)] for path in cuts if "untold" in path} == {"truncated"}
    assert [kinds[url] for url in others] == ["bad-url"] * len(malformed) + ["refused"]
    answer = json.loads(done.out)
    assert answer["failed"] == Counter(kind for kind in kinds.values() if kind)
    assert answer["samples"]["kept"] == 6 == len(list(shards.read(str(tmp_path / "out/00000.tar"))))
    assert hostile.paths().count("/secret/1") == 0


def test_private_hosts_need_a_word(hostile: Any, capfilt: Any, url_list: Any, tmp_path: Path) -> None:
    """127.0.0.1 is ours; without the word not even that is asked."""
    path = url_list(tmp_path, [hostile.url("/ok")])
    done = capfilt("download", path, "--out", tmp_path / "out", "--json")
    assert json.loads(done.out)["failed"] == {"private-address": 1}
    assert hostile.seen == []


# ---- resuming ----


def test_a_rerun_fetches_nothing_and_writes_nothing(hostile: Any, fetch: Any, tmp_path: Path, snapshot: Any) -> None:
    urls = [hostile.url(f"/ok?seed={i}") for i in range(4)]
    assert fetch(urls, "--shard-size", "2").code == 0
    before, requested = snapshot(tmp_path / "out"), len(hostile.seen)
    assert fetch(urls, "--shard-size", "2", "--timeout", "3", "--contact", "me@example.org").code == 0
    after = snapshot(tmp_path / "out")
    for name in ("recipe.yaml", "summary.json"):  # how hosts are asked may change, and how long it took
        before.pop(name)
        after.pop(name)
    assert after == before
    assert len(hostile.seen) == requested


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--shard-size", "3"], "shard_size: 2 -> 3"),
        (["--image-size", "64"], "image_size: 256 -> 64"),
        (["--no-robots"], "robots: true -> false"),
        (["--max-bytes", "5"], "limits.max_bytes: "),
        (["reordered"], r"lists\[0\].version: "),
        (["shorter"], r"lists\[0\].size: "),
    ],
)
def test_what_was_planned_otherwise_is_refused(
    hostile: Any, fetch: Any, url_list: Any, tmp_path: Path, change: list[str], said: str
) -> None:
    urls = [hostile.url(f"/ok?seed={i}") for i in range(4)]
    path = url_list(tmp_path, urls)
    assert fetch(path, "--shard-size", "2").code == 0
    lines = path.read_text().splitlines(keepends=True)
    if change == ["reordered"]:
        path.write_text("".join(reversed(lines)))
    if change == ["shorter"]:
        path.write_text("".join(lines[:-1]))
    done = fetch(path, "--shard-size", "2", *(change if change[0].startswith("--") else []))
    assert done.code == 1
    assert "was planned otherwise: " in done.line
    assert re.search(said, done.line)


@pytest.fixture
def killed(hostile: Any, url_list: Any, tmp_path: Path) -> Path:
    """The run folder of a download that was killed (-9) in its second shard."""
    urls = [hostile.url("/ok?seed=1"), hostile.url("/ok?seed=2"), hostile.url("/ok?seed=3"), hostile.url("/hang")]
    path, out = url_list(tmp_path, urls), tmp_path / "out"
    where = ("--allow-private", "127.0.0.0/8", "--address", "local")
    patient = ("--timeout", "90", "--deadline", "90")
    words = map(str, [path, "--out", out, "--caption-col", "text", "--shard-size", "2", *where, *patient])
    process = subprocess.Popen([sys.executable, "-m", "capfilt", "download", *words], stderr=subprocess.DEVNULL)
    try:
        give_up = time.monotonic() + 100
        while "/hang" not in hostile.paths():
            assert process.poll() is None
            assert time.monotonic() < give_up
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()
    return out


@pytest.mark.slow
def test_a_kill_leaves_no_half_shard_and_a_rerun_goes_on(
    killed: Path, hostile: Any, fetch: Any, tmp_path: Path
) -> None:
    assert sorted(path.name for path in killed.glob("0*")) == ["00000.parquet", "00000.tar", "00000_stats.json"]
    assert [done.shard for done in Ledger(killed, "download").completions()] == ["00000"]
    assert list((killed / "tmp").iterdir()), "what was being fetched"
    first = (killed / "00000.tar").stat().st_mtime_ns
    requested = len(hostile.seen)
    path = tmp_path / "list.jsonl"
    done = fetch(path, "--shard-size", "2", "--timeout", "1", "--deadline", "1")
    assert done.code == 0, done.err
    assert json.loads(done.out)["failed"] == {"timeout": 1}
    assert (killed / "00000.tar").stat().st_mtime_ns == first
    assert [name for _, name, _ in hostile.seen[requested:] if name != "/robots.txt"].count("/ok?seed=1") == 0
    assert not (killed / "tmp").exists()
    assert fetch(path, "--shard-size", "2", "--timeout", "1", "--deadline", "1", out="other").code == 0
    assert (tmp_path / "other/00001.tar").read_bytes() == (killed / "00001.tar").read_bytes()


def test_a_plan_that_was_cut_short_is_made_again(hostile: Any, fetch: Any, tmp_path: Path) -> None:
    urls = [hostile.url(f"/ok?seed={i}") for i in range(4)]
    assert fetch(urls, "--shard-size", "2").code == 0
    plan = tmp_path / "out" / "plan"
    (plan / "pass-0.json").unlink()
    (plan / "00001.parquet").write_bytes(b"half")
    (plan / "00007.parquet").write_bytes(b"of another plan")
    requested = len(hostile.seen)
    assert fetch(urls, "--shard-size", "2").code == 0
    assert sorted(path.name for path in plan.iterdir()) == ["00000.parquet", "00001.parquet", "pass-0.json"]
    assert len(hostile.seen) == requested, "the same plan, so its shards are still done"


# ---- lists and options ----


def test_datacomp_s_uid_is_kept(hostile: Any, fetch: Any, tmp_path: Path) -> None:
    path = tmp_path / "list.parquet"
    uid = "0123456789abcdef" * 2
    pq.write_table(pa.table({"uid": [uid], "url": [hostile.url("/ok")], "text": ["a"]}), path)
    words = ("--save-additional-columns", "uid", "--oom-shard-count", "8")
    assert fetch(path, *words).code == 0
    [row] = rows_of(tmp_path / "out")
    assert row["uid"] == uid
    assert [*row][:3] == ["uid", "caption", "url"]
    assert json.loads(members(tmp_path / "out/00000000.tar")["000000000000.json"])["uid"] == uid


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--caption-col", "txt"], 2, "has no column 'txt'. Did you mean 'text'?"),
        (["--image-size", "0"], 2, "'image_size' is 0"),
        (["--resize-mode", "bordr"], 2, "Did you mean 'border'?"),
        (["--allow-private", "home"], 2, "limits.allow_private"),
        (["--save-additional-columns", "status"], 2, "would overwrite a column"),
        (["--save-additional-columns", "[uid"], 2, "is no list"),
        (["--min-success", "2"], 2, "min-success"),
        (["--set", "manners.contcat=x"], 2, "Did you mean 'contact'?"),
        (["--input-format", "xml"], 2, "input format 'xml'"),
    ],
)
def test_what_cannot_be_meant_is_refused(fetch: Any, words: list[str], code: int, said: str) -> None:
    done = fetch(["http://127.0.0.1:9/"], *words)
    assert done.code == code
    assert said in " ".join(done.err.split())


def test_a_recipe_may_name_one_list() -> None:
    assert DownloadConfig(urls="a.csv").urls == ("a.csv",)  # type: ignore[arg-type]


# ---- a recipe that begins with URLs ----


@pytest.mark.slow
def test_a_bootstrap_begins_at_a_list_of_urls(
    hostile: Any, capfilt: Any, recipe: Any, url_list: Any, tmp_path: Path, snapshot: Any
) -> None:
    path = url_list(tmp_path, [hostile.url(f"/ok?seed={i}") for i in range(24)] + [hostile.url("/html")])
    world.write(world.WorldConfig(human=24, shard_size=24), 0, tmp_path / "world", "human")
    web = {
        "urls": str(path), "caption_col": "text", "shard_size": 20, "resize_mode": "border", "image_size": 40,
        "limits": {"allow_private": ["127.0.0.0/8"]}, "manners": {"host_rate": 0},
    }  # fmt: skip
    mine = recipe(tmp_path, data={"download": web, "human": str(tmp_path / "world" / "human")})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "value is deprecated")  # img2dataset's way with albumentations
        done = capfilt("bootstrap", mine, "--out", tmp_path / "run")
    assert done.code == 0, done.err
    answer = json.loads((tmp_path / "run/summary.json").read_text())["rounds"][1]
    assert answer["samples_in"] == 24 == sum(answer["samples"].values())
    came = json.loads((tmp_path / "run/data/web/summary.json").read_text())
    assert (came["samples"], came["failed"]) == ({"in": 25, "kept": 24, "failed": 1}, {"not-an-image": 1})
    before, requested = snapshot(tmp_path / "run"), len(hostile.seen)
    assert capfilt("bootstrap", mine, "--out", tmp_path / "run").code == 0
    assert snapshot(tmp_path / "run") == before
    assert len(hostile.seen) == requested
    path.write_text(path.read_text().replace("text 3", "text 4"))
    done = capfilt("bootstrap", mine, "--out", tmp_path / "run")
    assert done.code == 1
    assert "inputs.lists[0].version: " in done.line


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Say nothing."""


def test_photographs_come_as_they_were_served(shared_dir: Path, fetch: Any, tmp_path: Path) -> None:
    folder = shared_dir / "photos"
    if not folder.is_dir():
        pytest.skip("no photographs beside the checkout")
    files = sorted((folder / "images").iterdir())
    handler = functools.partial(Quiet, directory=str(folder / "images"))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        urls = [f"http://127.0.0.1:{server.server_port}/{file.name}" for file in files]
        done = fetch(urls, "--shard-size", "80")
    finally:
        server.shutdown()
        server.server_close()
    assert done.code == 0, done.err
    assert json.loads(done.out)["success_rate"] == 1
    read = [item for tar in shards.expand(str(tmp_path / "out")) for item in shards.read(tar)]
    assert [item.image for item in read if isinstance(item, Sample)] == [file.read_bytes() for file in files]
    assert {item.uid for item in read if isinstance(item, Sample)} == {
        item.sha256[:32] for item in read if isinstance(item, Sample)
    }
