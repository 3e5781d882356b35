"""A run folder that somebody else made names addresses; none is asked unless the user says so."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from capfilt.cli import app
from capfilt.data import annotations, shards
from capfilt.data.annotations import Annotation
from capfilt.data.policy import PolicyConfig
from capfilt.data.sample import Sample
from capfilt.runs.ledger import Input, Ledger
from capfilt.runs.run import Run
from capfilt.runs.tally import Tally
from capfilt.stages import inputs
from capfilt.storage.atomic import write_json
from capfilt.storage.remote_path import RemotePath

Make = Callable[..., Path]


def shard(path: Path) -> Path:
    """A shard of one picture."""
    data = io.BytesIO()
    Image.new("RGB", (32, 32), "red").save(data, "JPEG")
    shards.write(path, [Sample("000", data.getvalue(), "jpg", "a red square")])
    return path


@pytest.fixture
def planted(tmp_path: Path) -> Make:
    """A run folder with one annotated shard, whose plan is whatever its maker liked."""

    def make(verb: str = "annotate", **plan: Any) -> Path:
        run = tmp_path / "run"
        row = Annotation("000", "0" * 32, "0" * 64, "web", 0, "a red square", 0.5, 0.5, "", "f", 0, 0)
        annotations.write(run / "annotations" / "00000.parquet", [row])
        tally = Tally.zero()
        tally.samples.update(["in", "kept"])
        ledger = Ledger(run, "annotate")
        ledger.commit("00000", "1" * 64, [run / "annotations" / "00000.parquet"], tally, Input(1, "2" * 64))
        write_json(run / "plan.json", {"verb": verb, **plan})
        (run / "recipe.yaml").write_text("{}\n")
        return run

    return make


def capfilt(*words: object) -> tuple[int, str]:
    """Exit code and what was said."""
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exc_info
    return done.exit_code, done.output


SPELLINGS = [
    "{url}/00000.tar",
    "/none/x.tar::{url}/00000.tar",
    "{{{url}/00000.tar,{url}/00001.tar}}",
    "{split}/00000.tar",
]


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_no_verb_fetches_what_a_plan_names(hostile: Any, planted: Make, spelling: str) -> None:
    url = hostile.url("")
    split = url.replace("http://", "{h,h}ttp:/{/,/}", 1)
    run = planted(shards=[spelling.format(url=url, split=split)])
    code, said = capfilt("report", run)
    assert code == 0, said
    page = (run / "report.html").read_text()
    assert "say --fetch-inputs" in page
    code, said = capfilt("verify", run, "--inputs")
    assert code == 1
    assert f"error: the plan of {run} names {url}/00000.tar, which is elsewhere." in " ".join(said.split())
    for words in (("status", run), ("verify", run), ("explain", run, "000")):
        assert capfilt(*words)[0] == 0, words
    assert hostile.seen == []


def test_nor_the_annotations_of_a_select(hostile: Any, planted: Make, tmp_path: Path) -> None:
    policy = PolicyConfig().model_dump(mode="json")
    run = planted("select", shards=[str(shard(tmp_path / "00000.tar"))], annotations=hostile.url("/x"), **policy)
    code, said = capfilt("report", run)
    assert code == 1
    assert "which is elsewhere" in said
    assert hostile.seen == []


@pytest.fixture
def served(tmp_path: Path) -> Iterator[str]:
    """A web server on loopback with one shard, at its root."""
    (tmp_path / "www").mkdir()
    shard(tmp_path / "www" / "00000.tar")

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path / "www"))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/00000.tar"
        server.shutdown()
        thread.join()


def test_whoever_trusts_it_says_so(served: str, planted: Make) -> None:
    run = planted(shards=[served])
    code, said = capfilt("report", run, "--fetch-inputs")
    assert code == 0, said
    assert "No pictures" not in (run / "report.html").read_text()
    code, said = capfilt("verify", run, "--inputs", "--fetch-inputs")
    assert code == 1
    assert "bytes, 1 were read" in " ".join(said.split())


def test_files_of_this_machine_are_read_as_before(planted: Make, tmp_path: Path) -> None:
    path = shard(tmp_path / "00000.tar")
    run = planted(shards=[str(path)])
    assert capfilt("report", run)[0] == 0
    assert "No pictures" not in (run / "report.html").read_text()
    assert "it has" in capfilt("verify", run, "--inputs")[1], "compared: it does not have the one byte of the plan"


@pytest.mark.parametrize(
    ("folder", "address", "near"),
    [
        ("memory://a/run", "memory://b/x.tar", True),
        ("s3://bucket/run", "s3://bucket/web/0.tar", True),
        ("s3://bucket/run", "s3://other/web/0.tar", False),
        ("s3://bucket/run", "gs://bucket/web/0.tar", False),
        ("s3://bucket/run", "http://bucket/0.tar", False),
        ("s3://bucket/run", "/local/0.tar", True),
        ("s3://bucket/run", "file:///local/0.tar", True),
    ],
)
def test_the_store_of_the_run_itself_is_asked(folder: str, address: str, near: bool) -> None:
    assert inputs._is_near(RemotePath(folder), address) == near
    assert inputs._is_near(Path("/run"), address) == (near and not address.startswith("s3://"))


@pytest.mark.parametrize("named", [5, "http://127.0.0.1/", [1], [["x"]], {"a": 1}])
def test_a_plan_that_names_no_shards_is_reported(planted: Make, named: Any) -> None:
    run = planted(shards=named)
    code, said = capfilt("verify", run, "--inputs")
    assert code == 1
    assert "must have a list of texts as its shards; it has" in " ".join(said.split())


def test_a_plan_without_shards_has_no_inputs(planted: Make) -> None:
    run = planted("evaluate")
    assert inputs.input_shards(run, Run.load(run).plan) == []
    assert json.loads(capfilt("verify", run, "--inputs", "--json")[1])["inputs"]["changed"] != []
