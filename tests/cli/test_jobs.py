from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer.main

from capfilt import cli
from capfilt.cli import jobs
from capfilt.errors import UsageError
from capfilt.pipelines.jobs import JobRequest, command_output


def request(*words: str) -> JobRequest:
    """What the command line `capfilt WORDS` sends to a cluster."""
    command = typer.main.get_command(cli.app).commands[words[0]]  # type: ignore[attr-defined]
    return jobs._request(command.make_context(words[0], list(words[1:])), words[0])


def test_a_bootstrap_travels_with_its_recipe_resolved() -> None:
    made = request(
        "bootstrap", "demo", "--rounds", "1", "--set", "seed=7", "--out", "/mnt/a", "--address", "http://h:1"
    )
    assert made.words == ("--address", "auto", "--out", "/mnt/a", "recipe.yaml")
    assert made.recipe is not None
    tree = made.recipe.model_dump()
    assert (tree["seed"], tree["rounds"], tree["model"]) == (7, 1, "blip/tiny")
    assert made.out == "/mnt/a"
    assert made.notes == request("bootstrap", "--out", "/mnt/a", "--set", "seed=7", "--rounds", "1").notes
    assert made.notes["digest"] != request("bootstrap", "--out", "/mnt/a", "--rounds", "1").notes["digest"]


@pytest.mark.parametrize(
    ("given", "sent"),
    [
        (
            "annotate /s/a s3://b/{0..9}.tar --captioner /m/c --filter /m/f --out /mnt/a --set a=1 --set b=2 --gpus 0.5"
            " --json --detach",
            "--address auto --captioner /m/c --filter /m/f --out /mnt/a --set a=1 --set b=2 --gpus 0.5 --json /s/a"
            " s3://b/{0..9}.tar",
        ),
        ("evaluate /m /s --out /e --address http://h:1", "--address auto --out /e /m /s"),
        (
            "download /l.csv --output_folder /mnt/a --url_col u --no-robots --workers 3",
            "--address auto --out /mnt/a --url-col u --no-robots --workers 3 /l.csv",
        ),
        (
            "select /s --annotations /a --out /b --calibrate labels",
            "--address auto --annotations /a --out /b --calibrate labels /s",
        ),
        ("status /mnt/a --address http://h:1 --json", "--json /mnt/a"),
        ("explain /mnt/a -- -key", "-- /mnt/a -key"),
    ],
)
def test_the_other_verbs_travel_as_they_were_typed(given: str, sent: str) -> None:
    assert sorted(request(*given.split()).words) == sorted(sent.split())
    assert request(*given.split()).recipe is None


@pytest.mark.parametrize(
    ("given", "sent"),
    [
        (
            "annotate /s --recipe blip2-ten --captioner /m/c --filter /m/f --out /a --set batch_size=7",
            "--recipe recipe.yaml --address auto --captioner /m/c --filter /m/f --out /a /s",
        ),
        (
            "select /s --recipe blip2-two --annotations /a --out /b --set top_k=3",
            "--recipe recipe.yaml --address auto --annotations /a --out /b /s",
        ),
    ],
)
def test_a_recipe_that_is_an_option_travels_resolved(given: str, sent: str) -> None:
    made = request(*given.split())
    assert sorted(made.words) == sorted(sent.split())
    assert made.recipe is not None
    assert made.recipe.model_dump().get("batch_size", made.recipe.model_dump().get("top_k")) in (7, 3)


def test_a_watch_is_of_a_folder_that_is_seen() -> None:
    with pytest.raises(UsageError, match=r"^--watch looks at a folder that this machine sees\."):
        request("status", "/a", "--watch", "--address", "http://h:1")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("bootstrap", "--out is needed: a job's paths are the cluster's"),
        ("evaluate /m /s", "--out is needed: a job's paths are the cluster's"),
        ("bootstrap --out /a --set initial.vision=weights/vit.pth", "initial.vision is 'weights/vit.pth'"),
        ("bootstrap --out /a --set pretrain.features=feat", "pretrain.features is 'feat'"),
        ("bootstrap --out runs/a", "--out is 'runs/a', and a job's paths are the cluster's"),
        ("bootstrap --out /a --set data.world=null --set data.human=/h --set data.web=web", "data.web is 'web'"),
        ("bootstrap --out /a --set model=my.yaml", "model is 'my.yaml'"),
        ("bootstrap --out /a --set tokenizer=vocab.txt", "tokenizer is 'vocab.txt'"),
        ("pretrain blip-tiny --out /a --set data=/b::c", "data[0].shards is 'c'"),
        ("pretrain blip-tiny --out /a --set data=/b --set start=models/a", "start is 'models/a'"),
        ("annotate s --captioner /c --filter /f --out /a", "SHARDS is 's'"),
        ("annotate /s --captioner /c --filter f --out /a", "--filter is 'f'"),
        ("download l.csv --out /a", "URLS is 'l.csv'"),
        ("status runs/a --address http://h:1", "RUN is 'runs/a'"),
    ],
)
def test_a_path_of_this_machine_is_refused(given: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        request(*given.split())
    assert str(caught.value).startswith(said)
    assert "\n" not in str(caught.value)


def here(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "capfilt", *words], capture_output=True, text=True, check=False)


def test_what_only_a_cluster_can_do_is_refused_elsewhere(tmp_path: Path) -> None:
    for words in (["bootstrap", "--detach"], ["status", str(tmp_path), "--address", "auto"]):
        done = here(*words)
        assert done.returncode == 2
        assert "it goes with the address of a cluster, http://HEAD:8265." in done.stderr


def test_a_head_that_is_not_there_leaves_with_one_and_a_line() -> None:
    done = here("select", "/s", "--annotations", "/a", "--out", "/b", "--address", "http://127.0.0.1:1")
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"error: No Ray dashboard answers at 'http://127\.0\.0\.1:1': [^\n]*\n", done.stderr)


# ---- on a real head ----

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture(scope="module")
def head(ray_head: Any) -> Any:
    end = time.monotonic() + 100
    while here("jobs", "--address", ray_head.url).returncode and time.monotonic() < end:
        time.sleep(0.5)
    return ray_head


@pytest.fixture
def start(head: Any, ignore_signals: Any) -> Start:
    """Begin `capfilt WORDS --address HEAD`, its output in pipes."""

    def start(*words: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "capfilt", *words, "--address", head.url],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **head.environment},
            preexec_fn=ignore_signals,
        )

    return start


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=100)
    return process.returncode, out, err


def wait_for(process: subprocess.Popen[str], said: str) -> None:
    """Read until the job says something."""
    assert process.stdout
    for line in process.stdout:
        if said in line:
            return
    pytest.fail(f"{said!r} was never said: {process.communicate()}")


def states(start: Start) -> dict[str, str]:
    code, out, err = ended(start("jobs", "--json"))
    assert code == 0, err
    return {job["id"]: job["state"] for job in json.loads(out)["jobs"]}


@pytest.mark.slow
def test_a_job_s_log_and_exit_code_are_the_command_s(start: Start) -> None:
    code, out, err = ended(start("bootstrap", "--out", "/mnt/one", "--set", "seed=3"))
    assert code == 1
    said = "words: bootstrap --address auto --out /mnt/one recipe.yaml\nline 1\nline 2\nline 3\n"
    assert command_output([out]) == said  # Ray's own lines may come between them
    id = re.match(r"job (capfilt-bootstrap-one-\w{8}) is sent", err)
    assert id, err
    code, out, _ = ended(start("jobs", id[1]))
    assert code == 1
    assert out.endswith("line 3\n")
    code, out, err = ended(start("bootstrap", "--out", "/mnt/one", "--set", "seed=2", "--json"))
    assert (code, json.loads(out)) == (0, {"lines": 2})
    assert "line 2\n" in err


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_one_ctrl_c_leaves_and_the_same_command_comes_back_and_two_stop_it(start: Start) -> None:
    words = ("bootstrap", "--out", "/mnt/two", "--set", "seed=4000")
    first = start(*words)
    wait_for(first, "line 1")
    first.send_signal(signal.SIGINT)
    code, _, err = ended(first)
    assert code == 130
    id = err.split()[1]
    assert f"Ctrl-C again within 5 s stops {id}" in err
    assert f"{id} goes on; `capfilt jobs {id} --address http" in err
    assert states(start)[id] == "running"

    code, _, err = ended(start("bootstrap", "--out", "/mnt/two", "--set", "seed=4001"))
    assert code == 1
    assert err.startswith(f"error: {id} is at work on /mnt/two with other settings: wait for it, end it by")

    again = start(*words)
    wait_for(again, "line 2")
    again.send_signal(signal.SIGINT)
    assert again.stderr
    before = ""
    while "Ctrl-C again" not in before:
        line = again.stderr.readline()
        assert line, f"it left before: {before}"
        before += line
    again.send_signal(signal.SIGINT)
    code, _, err = ended(again)
    err = before + err
    assert code == 130
    assert f"job {id} is at work already" in err
    assert f"stopping {id}\n{id} stopped: the same command goes on" in err
    assert states(start)[id] == "stopped"


@pytest.mark.slow
def test_a_detached_job_is_listed_followed_and_stopped(start: Start) -> None:
    code, out, err = ended(start("bootstrap", "--out", "/mnt/three", "--set", "seed=4000", "--detach"))
    assert code == 0, err
    id = out.strip()
    assert id.startswith("capfilt-bootstrap-three-")
    code, out, _ = ended(start("jobs"))
    assert code == 0
    assert re.search(rf"│ {id} +│ bootstrap +│ /mnt/three +│ (running|pending) ", out)
    follower = start("jobs", id)
    wait_for(follower, "line 1")
    follower.send_signal(signal.SIGTERM)
    assert ended(follower)[0] == 143
    code, out, err = ended(start("jobs", id, "--stop"))
    assert code == 0, err
    assert re.search(r"^state +stopped$", out, re.MULTILINE)
    code, _, err = ended(start("jobs", id))
    assert code == 143
    assert f"{id} was stopped" in err
