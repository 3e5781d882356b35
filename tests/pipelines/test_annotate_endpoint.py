"""annotate with an endpoint as the captioner, over real sockets."""

from __future__ import annotations

import json
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from endpoint_server import EndpointServer, caption, name_of

from capfilt.data import shards
from capfilt.inference.captioners.endpoint import client

KEY = "sk-hunter2hunter2"


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "FIRST_WAIT", 0.02)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


@pytest.fixture
def words(finished_run: Path, tmp_path: Path, endpoint: EndpointServer) -> list[Any]:
    """The command: two shards of 20 pictures."""
    web = tmp_path / "web"
    web.mkdir()
    for name in ("00000.tar", "00001.tar"):
        shutil.copy(finished_run / "data/web" / name, web)
    out = ["--out", tmp_path / "a", "--set", "requests.tries=2", "--set", "requests.deadline=5"]
    return ["annotate", web, "--captioner", endpoint.spec, "--filter", finished_run / "round-1/filter/checkpoint", *out]


def rows(folder: Path, name: str = "00000") -> list[dict[str, Any]]:
    every = pq.read_table(folder / f"annotations/{name}.parquet").to_pylist()
    return [row for row in every if row["source"] == "synthetic"]


def test_its_texts_are_scored_rows_and_a_run_that_is_done_asks_for_nothing(
    words: list[Any], tmp_path: Path, capfilt: Any, endpoint: EndpointServer
) -> None:
    done = capfilt(*words, "--json", "--set", "captions=2")
    assert done.code == 0, done.err
    assert json.loads(done.out)["texts"]["kept"] == {"web": 40, "synthetic": 80}
    written = rows(tmp_path / "a")
    assert len(written) == 40
    assert all(row["itm"] is not None and row["prompt"] == "ignore" and row["reason"] == "" for row in written)
    sent = {sample.key: sample.image for sample in shards.read(str(tmp_path / "web/00000.tar"))}  # type: ignore[union-attr]
    assert {row["text"].lower() for row in written} <= {
        caption(sent[row["key"]], body["seed"]).lower() for row in written for body in endpoint.bodies
    }
    assert endpoint.asked.total() == 80 + 2, "the test picture twice"
    endpoint.close()
    done = capfilt(*words, "--set", "captions=2")
    assert (done.code, "2/2" in done.err, "cannot be reached" in done.err) == (0, True, True), done.err


def test_a_shard_that_is_done_again_pays_for_nothing_twice(
    words: list[Any], tmp_path: Path, capfilt: Any, endpoint: EndpointServer
) -> None:
    assert capfilt(*words).code == 0
    before, paid = (tmp_path / "a/annotations/00001.parquet").read_bytes(), endpoint.asked.total()
    (tmp_path / "a/ledger/annotate/00001.json").unlink()
    done = capfilt(*words, "--set", "requests.in_flight=3")
    assert done.code == 0, done.err
    assert (tmp_path / "a/annotations/00001.parquet").read_bytes() == before
    assert endpoint.asked.total() == paid
    refused = capfilt(*words, "--set", "endpoint.side=40")
    assert (refused.code, "config.endpoint: absent -> " in refused.line) == (1, True), refused.line


def test_what_it_does_not_write_is_a_reason_and_is_asked_for_again_by_retry(
    words: list[Any], tmp_path: Path, capfilt: Any, endpoint: EndpointServer
) -> None:
    samples = [sample for sample in shards.read(str(tmp_path / "web/00000.tar")) if hasattr(sample, "image")]
    ways = {"refusal": "refused", "bad_request": "http 4xx", "no_choices": "empty", "broken": "http 5xx"}
    endpoint.odd = {name_of(sample.image): way for sample, way in zip(samples, ways, strict=False)}
    done = capfilt(*words, "--json")
    assert done.code == 0, done.err
    answer = json.loads(done.out)
    assert answer["samples"] == {"in": 40, "kept": 40, "dropped": 0, "failed": 0}
    assert answer["texts"]["dropped"] == {f"synthetic: caption failed: {failure}": 1 for failure in ways.values()}
    reasons = {row["key"]: row["reason"] for row in rows(tmp_path / "a") if not row["text"]}
    assert reasons == {s.key: f"caption failed: {f}" for s, f in zip(samples, ways.values(), strict=False)}
    endpoint.odd, paid = {}, endpoint.asked.total()
    other = (tmp_path / "a/annotations/00001.parquet").stat()
    done = capfilt(*words, "--retry", "failed", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["texts"]["dropped"] == {}
    assert all(row["text"] for row in rows(tmp_path / "a"))
    assert endpoint.asked.total() - paid == len(ways), "the other answers of that shard are kept"
    assert (tmp_path / "a/annotations/00001.parquet").stat() == other


def test_an_endpoint_that_goes_away_ends_the_run_in_one_line_and_it_goes_on_where_it_was(
    words: list[Any], tmp_path: Path, capfilt: Any, endpoint: EndpointServer
) -> None:
    endpoint.script = ["ok"] * 30
    endpoint.always = "dead"
    done = capfilt(*words, "--set", "requests.in_flight=2")
    assert done.code == 1
    assert re.search(r"annotate: .*answers nothing, neither a request in 2 tries nor a test picture", done.line)
    assert len(list((tmp_path / "a/annotations").glob("*.parquet"))) == 1, "and no rows of what was not answered"
    endpoint.always = "ok"
    done = capfilt(*words)
    assert done.code == 0, done.err
    answered = endpoint.answered
    del answered[max(answered, key=lambda key: answered[key])]  # the test picture
    assert sorted(set(answered.values())) == [1], "nothing that was answered was asked for twice"


@pytest.mark.parametrize(
    ("always", "said"),
    [("no_entry", "http 401"), ("html", "no chat completion"), ("dead", "cut off"), ("bad_request", "no such thing")],
)
def test_a_server_of_no_use_is_refused_before_a_shard_is_begun(
    words: list[Any], tmp_path: Path, capfilt: Any, endpoint: EndpointServer, always: str, said: str
) -> None:
    endpoint.always = always
    done = capfilt(*words)
    assert (done.code, said in done.line) == (1, True), done.err
    assert KEY not in done.err
    assert not (tmp_path / "a/annotations").exists()
    endpoint.always = "ok"
    assert capfilt(*words).code == 0


def test_a_model_that_it_does_not_have(words: list[Any], capfilt: Any, endpoint: EndpointServer) -> None:
    words[3] = f"openai:{endpoint.url}#tinny"
    endpoint.always = "bad_request"
    assert "has no model tinny. Did you mean 'tiny'?" in capfilt(*words).line


def test_another_version_of_the_server_is_another_captioner_and_a_run_goes_on_with_a_warning(
    words: list[Any], tmp_path: Path, capfilt: Any, endpoint: EndpointServer
) -> None:
    assert capfilt(*words).code == 0
    plan = json.loads((tmp_path / "a/plan.json").read_bytes())
    report = json.loads(plan["decided"]["captioner"]["server"])
    assert report["version"] == "0.9.1"
    assert report["system_fingerprint"] == "fp_1"
    assert report["honours_seeds"]
    endpoint.version = "0.9.2"
    (tmp_path / "a/ledger/annotate/00001.json").unlink()
    done = capfilt(*words)
    assert done.code == 0
    assert "reports another version than when this run began (0.9.1, now 0.9.2)" in done.err
    other = [tmp_path / "b" if word == tmp_path / "a" else word for word in words]
    assert capfilt(*other).code == 0
    assert rows(tmp_path / "a")[0]["captioner"] != rows(tmp_path / "b")[0]["captioner"]


def test_a_server_that_does_not_honour_seeds_is_named_once(
    words: list[Any], tmp_path: Path, capfilt: Any, endpoint: EndpointServer
) -> None:
    endpoint.honours_seeds = False
    done = capfilt(*words)
    assert done.err.count("answers otherwise with the same seed") == 1
    before = (tmp_path / "a/annotations/00000.parquet").read_bytes()
    (tmp_path / "a/ledger/annotate/00000.json").unlink()
    assert capfilt(*words).code == 0
    assert (tmp_path / "a/annotations/00000.parquet").read_bytes() == before, "the answers that are kept decide"


def test_the_key_is_in_no_file_of_the_run_and_in_nothing_that_is_printed(
    words: list[Any], tmp_path: Path, capfilt: Any, endpoint: EndpointServer
) -> None:
    endpoint.script = ["ok", "ok", "key_back", "no_entry"]
    done = capfilt(*words)
    assert done.code == 0, done.err
    assert f"Bearer {KEY}" in endpoint.key_seen
    for path in (tmp_path / "a").rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes(), path
    assert KEY not in done.out + done.err


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("openai:http://me:hunter2@h:1/v1#m", "openai:http://***@h:1/v1#m: the URL holds a password"),
        ("openai:http://h:1/v1?key=hunter2#m", "the URL holds a password or parameters"),
        ("openai:http://h:1/v1", "no address of an endpoint and a model"),
        ("openai:ftp://h/v1#m", "no address of an endpoint"), ("openai:http://h:x/v1#m", "openai:http://h:x/v1#m: "),
    ],
)  # fmt: skip
def test_addresses_that_cannot_be(words: list[Any], tmp_path: Path, capfilt: Any, spec: str, said: str) -> None:
    words[3] = spec
    done = capfilt(*words)
    assert (done.code, said in done.line, "hunter2" in done.err) == (2, True, False), done.err
    assert not (tmp_path / "a").exists()


def test_what_an_endpoint_cannot_follow_is_refused(words: list[Any], capfilt: Any) -> None:
    for key, said in (("decode.method=beam", "decode.method is beam"), ("decode.max_length=40", "vlm.max_new_tokens")):
        done = capfilt(*words, "--set", key)
        assert (done.code, said in done.line) == (2, True), done.err


@pytest.mark.slow
def test_killed_ten_times_it_has_the_same_rows_and_pays_for_what_was_under_way_alone(
    words: list[Any], tmp_path: Path, capfilt: Any, endpoint: EndpointServer
) -> None:
    """By SIGKILL, whenever the server has got another random number of requests."""
    endpoint.delay, in_flight = (0.1, 0.3), 4
    command = [*words, "--set", f"requests.in_flight={in_flight}"]
    assert capfilt(*command).code == 0
    whole = {name: (tmp_path / f"a/annotations/{name}.parquet").read_bytes() for name in ("00000", "00001")}
    endpoint.asked.clear()
    again = [str(tmp_path / "b" if word == tmp_path / "a" else word) for word in command]
    shell = [sys.executable, "-m", "capfilt", *again, "--address", "local"]
    for moment in sorted(random.Random(0).sample(range(3, 40), 10)):
        with subprocess.Popen(shell, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as driver:
            while len(endpoint.asked) < moment and driver.poll() is None:
                time.sleep(0.005)
            driver.send_signal(signal.SIGKILL)
    done = capfilt(*again)
    assert done.code == 0, done.err
    for name, data in whole.items():
        assert (tmp_path / f"b/annotations/{name}.parquet").read_bytes() == data
    asked = sorted(endpoint.asked.values())[:-1]  # without the test picture
    assert len(asked) == 40
    assert sum(asked) - 40 <= 10 * in_flight


@pytest.mark.slow
def test_a_bootstrap_has_its_captions_written_by_an_endpoint(
    recipe: Any, tmp_path: Path, capfilt: Any, endpoint: EndpointServer
) -> None:
    annotate = {"max_length": 35, "precision": "fp32"}
    words = recipe(tmp_path, captioner={"pretrained": endpoint.spec}, annotate=annotate)
    done = capfilt("bootstrap", words, "--out", tmp_path / "run")
    assert done.code == 0, done.err
    assert endpoint.asked.total() == 60 + 2
    assert len(list((tmp_path / "run/round-1/cache").iterdir())) == 3
