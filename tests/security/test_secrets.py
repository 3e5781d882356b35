"""Passwords and signatures in addresses: in memory alone, never in a run folder, a message, a page or a job."""

from __future__ import annotations

import base64
import io
import json
import stat
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

from capfilt import config as configs
from capfilt.cli import app
from capfilt.data import annotations, shards
from capfilt.data.annotations import Annotation
from capfilt.data.sample import Sample
from capfilt.downloading.url_lists import files as list_files
from capfilt.errors import CapfiltError, DataError, RunError, ShardError, UsageError
from capfilt.pipelines.download import plan_of
from capfilt.pipelines.jobs import JobRequest, check_secrets
from capfilt.printable import printable, printable_lines
from capfilt.redact import is_redacted, redact
from capfilt.runs import stage_status
from capfilt.runs.ledger import Ledger, fingerprint
from capfilt.runs.locking import lock
from capfilt.runs.run import Run
from capfilt.stages import download as stage
from capfilt.stages.download import DownloadConfig
from capfilt.storage.paths import storage_path

SECRET = "hunter2"
AMZ = "X-Amz-Algorithm=AWS4&X-Amz-Credential=AKIA%2F2026&X-Amz-Date={0}&X-Amz-Expires=60&X-Amz-Signature=hunter2{0}"
AZURE = "sv=2024-11-04&ss=b&srt=co&sp=r&se={0}&st={0}&spr=https&sig=hunter2{0}"
CASES = [
    ("https://user:hunter2@h.test/a.tar", "https://***@h.test/a.tar"),
    ("https://user:h:un@ter2hunter2@h.test/a", "https://***@h.test/a"),
    ("https://hunter2@h.test:8443/a.tar", "https://***@h.test:8443/a.tar"),
    ("ftp://me:hunter2@h.test/a.csv", "ftp://***@h.test/a.csv"),
    ("s3://AKIA:hunter2/with+slash@bucket/run", "s3://***@bucket/run"),
    ("https://u:hunter2@[2a00::1]:80/a?sig=hunter2", "https://***@[2a00::1]:80/a?***"),
    (f"https://b.s3.amazonaws.com/0.tar?{AMZ.format(1)}", "https://b.s3.amazonaws.com/0.tar?***"),
    (f"https://b/0.tar?versionId=3&{AMZ.format(1)}", "https://b/0.tar?versionId=3&***"),
    (f"https://a.blob.core.windows.net/c/0.tar?{AZURE.format(1)}", "https://a.blob.core.windows.net/c/0.tar?***"),
    ("https://b/0.tar?AWSAccessKeyId=AK&Expires=1&Signature=hunter2", "https://b/0.tar?***"),
    ("https://b/0.tar?GoogleAccessId=me&Expires=1&Signature=hunter2", "https://b/0.tar?***"),
    ("https://cdn/0.tar?Policy=x&Signature=hunter2&Key-Pair-Id=K", "https://cdn/0.tar?***"),
    ("https://cdn/0.tar?x%2Damz%2Dsecurity%2Dtoken=hunter2", "https://cdn/0.tar?***"),
    ("https://h/x?id=4&token=hunter2&page=2", "https://h/x?id=4&page=2&***"),
    ("https://h/x?api_key=hunter2", "https://h/x?***"),
    ("https://h/x?access-token=hunter2#at", "https://h/x?***#at"),
    ("https://h/x#access_token=hunter2", "https://h/x#***"),
    (
        "https://h/{00..09}.tar?sig=hunter2::https://u:hunter2@h/b.tar",
        "https://h/{00..09}.tar?***::https://***@h/b.tar",
    ),
    ("https://h/a.tar?sig=hunter2::/data/b.tar", "https://h/a.tar?***::/data/b.tar"),
    ("reading https://u:hunter2@h/a failed", "reading https://***@h/a failed"),
]
PLAIN = [
    "s3://bucket/run", "abfs://container@account.dfs.core.windows.net/x", "https://h:8080/a@b.tar", "https://[::1]:80/a@b",
    "https://h/x?download=true&id=4&e=5", "hf://datasets/x@main/y.parquet", "/data/a:b@c/d.tar", "a text: b@c",
    "https://h/x?***", "https://***@h/x?id=4&***", "memory://a/b", "://", "https://",
]  # fmt: skip


@pytest.mark.parametrize(("address", "shown"), CASES)
def test_what_is_secret_in_an_address_is_left_out(address: str, shown: str) -> None:
    assert redact(address) == redact(shown) == shown
    assert SECRET not in printable(address)
    assert SECRET not in printable_lines(f"a line\n{address}\n")
    assert SECRET not in str(CapfiltError(f"there is no shard at {address}: check it"))
    assert SECRET not in printable(f"{'x' * 5000} {address} {'y' * 5000}", 500)


@pytest.mark.parametrize("text", PLAIN)
def test_the_rest_stays(text: str) -> None:
    assert redact(text) == text


@pytest.mark.parametrize("address", [case[1] for case in CASES[:-1]])
def test_an_address_without_its_secret_is_not_asked_for(address: str) -> None:
    """Copied out of a run folder, say."""
    pieces = [piece for piece in address.split("::") if is_redacted(piece)]
    if not pieces:
        assert address == "https://h/x?***#at"
        return
    with pytest.raises(ShardError, match="lacks a secret, which run folders do not keep"):
        shards.expand(pieces)
    with pytest.raises(DataError, match="lacks a secret"):
        list_files.find_files([pieces[0].replace("{00..09}", "0")])


def held(folder: Path) -> str:
    """Everything that lies in a folder, names too."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    return "\n".join(f"{path}\n{path.read_bytes().decode('latin-1')}" for path in files)


class TestRunFolder:
    def plan(self, signature: int, id: int = 1) -> dict[str, Any]:
        address = f"https://u:hunter2{signature}@h/{{0..9}}.tar?id={id}&{AMZ.format(signature)}"
        return {"verb": "annotate", "shards": [address], "deep": {address: [address]}}

    def open(self, folder: Path, plan: dict[str, Any]) -> Run:
        lock.release_all()
        try:
            return Run.open(folder, "{}\n", plan, 0)
        finally:
            lock.release_all()

    def test_a_fresh_signature_is_the_same_plan(self, tmp_path: Path) -> None:
        assert not self.open(tmp_path / "run", self.plan(1)).resumed
        assert self.open(tmp_path / "run", self.plan(2)).resumed
        with pytest.raises(RunError, match="was planned otherwise: "):
            self.open(tmp_path / "run", self.plan(1, id=2))
        assert SECRET not in held(tmp_path / "run")
        assert fingerprint(self.plan(1)) == fingerprint(self.plan(2)) != fingerprint(self.plan(1, id=2))

    def test_logs_and_failures_hold_none(self, tmp_path: Path) -> None:
        run = self.open(tmp_path / "run", {"verb": "x"})
        run.log("begin", shards=[CASES[0][0]], why={"what": OSError(f"403 of {CASES[6][0]}")})
        run.write_summary({"from": CASES[0][0]})
        stage_status.record_failure(
            Ledger(run.folder, "annotate"), "00000", f"403, message='Forbidden', url='{CASES[6][0]}'"
        )
        assert SECRET not in held(tmp_path / "run")
        assert stage_status.read_failures(Ledger(run.folder, "annotate"))["00000"].startswith(
            "403, message='Forbidden', url='https"
        )

    def test_what_may_hold_one_of_an_unknown_kind_is_its_owner_s(self, tmp_path: Path) -> None:
        run = self.open(tmp_path / "run", {"verb": "x"})
        run.log("begin")
        stage_status.record_failure(Ledger(run.folder, "annotate"), "00000", "why")
        for name in ("plan.json", "recipe.yaml", "log.jsonl", "ledger/annotate.failed.jsonl"):
            assert stat.S_IMODE((tmp_path / "run" / name).stat().st_mode) == 0o600, name

    def test_a_recipe_is_written_without(self) -> None:
        config = DownloadConfig(urls=tuple(case[0] for case in CASES))
        assert yaml.safe_load(configs.to_yaml(config))["urls"] == [case[1] for case in CASES]

    def test_a_list_is_known_without_its_signature(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class Files:
            def info(self, path: str) -> dict[str, Any]:
                return {"size": 3, "ETag": "abc"}

        monkeypatch.setattr(stage, "find_files", lambda specs, format: [list_files.ListFile(specs[0], "csv")])
        monkeypatch.setattr(list_files.fsspec.core, "url_to_fs", lambda url: (Files(), url))
        plans = [plan_of(DownloadConfig(urls=(f"https://h/l.csv?{AMZ.format(i)}",))) for i in (1, 2)]
        assert plans[0] == plans[1]
        assert SECRET not in json.dumps(plans)


@pytest.mark.parametrize("where", ["s3://key:hunter2@bucket/run", "ftp://u:hunter2@h/run", "https://hunter2@h/model"])
def test_a_place_has_no_password(where: str) -> None:
    with pytest.raises(UsageError, match=r"://\*\*\*@.* has a password in it") as caught:
        storage_path(where)
    assert SECRET not in str(caught.value)


def test_a_job_has_no_secret() -> None:
    """A cluster shows the commands and the files of its jobs to everybody."""
    check_secrets(JobRequest("annotate", ("--out", "/runs/a", "s3://bucket/{0..9}.tar")))
    for case in CASES[:-1]:
        with pytest.raises(UsageError, match="the command holds an address with a password or a signature"):
            check_secrets(JobRequest("annotate", ("--out", "/runs/a", case[0])))
    with pytest.raises(UsageError, match="the recipe holds an address") as caught:
        check_secrets(JobRequest("download", (), recipe=DownloadConfig(urls=(CASES[0][0],))))
    assert SECRET not in str(caught.value)


# ---- a verb from end to end ----


@pytest.fixture
def signed(tmp_path: Path) -> Iterator[str]:
    """A web server on loopback that asks for a password and a signature, and has one shard."""
    (tmp_path / "www").mkdir()
    data = io.BytesIO()
    Image.new("RGB", (32, 32), "red").save(data, "JPEG")
    sample = Sample("000", data.getvalue(), "jpg", "a red square")
    shards.write(tmp_path / "www" / "00000.tar", [sample])
    row = Annotation("000", sample.uid, sample.sha256, "web", 0, "a red square", 0.9, 0.5, "", "f", 0, 0)
    annotations.write(tmp_path / "a" / "annotations" / "00000.parquet", [row])
    allowed = "Basic " + base64.b64encode(b"me:hunter2").decode()

    class Strict(SimpleHTTPRequestHandler):
        def _let_in(self) -> bool:
            signature = parse_qs(urlsplit(self.path).query).get("X-Amz-Signature", [""])[0]
            if self.headers.get("Authorization") == allowed and signature.startswith("hunter2"):
                return True
            self.send_error(403)
            return False

        def do_GET(self) -> None:
            if self._let_in():
                super().do_GET()

        def do_HEAD(self) -> None:
            if self._let_in():
                super().do_HEAD()

        def log_message(self, format: str, *args: Any) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Strict, directory=str(tmp_path / "www"))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://me:hunter2@127.0.0.1:{server.server_port}/00000.tar?{AMZ}"
        server.shutdown()
        thread.join()


def capfilt(*words: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exc_info
    return done.exit_code, " ".join(done.output.split())


def test_a_verb_leaves_none_behind_and_goes_on_with_a_fresh_signature(signed: str, tmp_path: Path) -> None:
    def select(address: str) -> tuple[int, str]:
        words = ("--annotations", tmp_path / "a", "--out", tmp_path / "out", "--set", "threshold=0.5")
        return capfilt("select", address, *words, "--address", "local")

    code, said = select(signed.format(1))
    assert code == 0, said
    assert (tmp_path / "out" / "dataset" / "00000.tar").is_file()
    before = (tmp_path / "out" / "ledger" / "select" / "00000.json").stat().st_mtime_ns
    code, again = select(signed.format(2))
    assert code == 0, again
    assert (tmp_path / "out" / "ledger" / "select" / "00000.json").stat().st_mtime_ns == before, "done already"
    code, refused = select(signed.format(3).replace("X-Amz-Signature", "X-Amz-Signatur"))
    assert code == 1
    code, shown = capfilt("report", tmp_path / "out")
    assert code == 0, shown
    code, verified = capfilt("verify", tmp_path / "out", "--inputs", "--fetch-inputs")
    assert "lacks a secret" in verified
    assert SECRET not in held(tmp_path / "out")
    assert SECRET not in said + again + refused + shown + verified
    assert json.loads((tmp_path / "out" / "plan.json").read_bytes())["shards"] == [redact(signed.format(1))]
