from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml

from capfilt import config as configs
from capfilt import presets
from capfilt.cluster.ray_jobs import Command, Job
from capfilt.errors import UsageError
from capfilt.pipelines import jobs
from capfilt.pipelines.inspect import show
from capfilt.pipelines.jobs import JobRequest
from capfilt.pipelines.pretrain import PretrainConfig

BEGUN = (
    "2026-11-24 10:56:46,971\tINFO job_manager.py:581 -- Runtime env is setting up.\n"
    "Running entrypoint for job a: sh job.sh status --json /a\n"
)


@pytest.mark.parametrize(
    ("log", "result"),
    [
        ([BEGUN, '{\n "a": {\n  "b": 1\n }\n}\n'], {"a": {"b": 1}}),
        (["round 1\n{\n", ' "a": 1\n}', "\n(raylet) a late line\n"], {"a": 1}),
        (['{\n "old": 1\n}\n', '{\n "new": 1\n}\n'], {"new": 1}),
        ([BEGUN, "{}\n"], {}),
        ([BEGUN, "error: no\n"], None),
        (["{\n torn"], None),
        ([], None),
    ],
)  # fmt: skip
def test_the_result_is_the_last_object_of_a_log(log: list[str], result: dict[str, Any] | None) -> None:
    assert jobs.result_of(log) == result


def test_ray_s_own_lines_are_left_out() -> None:
    assert jobs.command_output([BEGUN[:30], BEGUN[30:], "one\n", "two\n"]) == "one\ntwo\n"
    assert jobs.command_output(["no beginning\n"]) == "no beginning\n"
    assert jobs.command_output(["an early word\n", BEGUN, "one\n"]) == "an early word\none\n"


def recipe(*sets: str) -> Any:
    return configs.read(presets.find("pipelines", "demo", within="bootstrap"), show.KINDS["bootstrap"][0], sets)


def test_a_request_is_known_by_its_content() -> None:
    one = JobRequest("bootstrap", ("--out", "/a", "recipe.yaml"), "/a", recipe())
    assert one.notes == JobRequest("bootstrap", ("--out", "/a", "recipe.yaml"), "/a", recipe("seed=0")).notes
    others = [
        JobRequest("bootstrap", ("--out", "/a", "recipe.yaml"), "/a", recipe("seed=1")),
        JobRequest("bootstrap", ("--out", "/a", "--json", "recipe.yaml"), "/a", recipe()),
        JobRequest("pretrain", ("--out", "/a", "recipe.yaml"), "/a", recipe()),
    ]
    assert len({request.notes["digest"] for request in (one, *others)}) == 4
    assert (one.notes["verb"], one.notes["out"]) == ("bootstrap", "/a")


class Cluster:
    """Takes one job."""

    address = "http://head"
    sent: Command

    def list(self) -> list[Job]:
        return []

    def submit(self, command: Command, prefix: str) -> str:
        self.sent = command
        return prefix


@pytest.mark.parametrize("name", presets.names("pipelines"))
def test_a_recipe_arrives_as_it_is_and_a_batch_size_that_nobody_set_is_not_set_there(name: str) -> None:
    """On a GPU batches grow where `batch_size` is not set."""
    kind = show.KINDS[name.partition("/")[0]][0]
    given, cluster = configs.read(presets.find("pipelines", name), kind), Cluster()
    jobs.send(cluster, JobRequest("verb", (), "", given))  # type: ignore[arg-type]
    arrived = configs.validate(kind, yaml.safe_load(cluster.sent.files[jobs.RECIPE]), jobs.RECIPE)
    assert arrived == given
    is_set = ["batch_size" in getattr(config, "annotate", config).model_fields_set for config in (given, arrived)]
    assert is_set[0] == is_set[1]


def test_a_recipe_names_its_places() -> None:
    shards = (
        "data.world=null",
        "data.human=/h",
        'data.web=["/w", "s3://b/w"]',
        "data.val=/v",
        "tokenizer=/t/vocab.txt",
    )
    outcome = jobs.external_paths(recipe(*shards, "model=/m/mine.yaml"))
    assert outcome == {
        "data.web": ["/w", "s3://b/w"], "data.human": "/h", "data.val": "/v", "tokenizer": "/t/vocab.txt",
        "model": "/m/mine.yaml",
    }  # fmt: skip
    assert jobs.external_paths(recipe()) == {}
    jobs.check_absolute({**outcome, "SHARDS": ("/a::s3://b/{0..9}.tar", Path("/c"))})
    with pytest.raises(UsageError, match="SHARDS is 'b'"):
        jobs.check_absolute({"SHARDS": ("/a::b",)})


def test_names_on_the_hub_are_no_places() -> None:
    sets = ["start=/runs/stage1/checkpoint", "data=/shards"]
    config = configs.read(presets.find("pipelines", "pretrain/blip2-stage2-opt-2.7b"), PretrainConfig, sets)
    outcome = jobs.external_paths(config)
    jobs.check_absolute(outcome)
    assert set(outcome) == {"start", "data[0].shards"}
    with pytest.raises(UsageError, match=r"tokenizer is 'bert/vocab\.txt'"):
        jobs.check_absolute(jobs.external_paths(recipe("tokenizer=bert/vocab.txt")))


def test_a_pretrained_role_is_a_place_where_it_is_a_file() -> None:
    outcome = jobs.external_paths(
        recipe("filter.pretrained=models/blip.pth", "captioner.pretrained=Salesforce/blip2-opt-2.7b")
    )
    assert outcome == {"filter.pretrained": "models/blip.pth"}
    with pytest.raises(UsageError, match=r"filter\.pretrained is 'models"):
        jobs.check_absolute(outcome)


def test_a_row_holds_what_is_known() -> None:
    began = datetime(2026, 11, 24, 9, 0, tzinfo=UTC)
    job = Job("capfilt-a", "running", "sh job.sh", {"verb": "annotate", "out": "/a"}, began, None, None, "")
    assert jobs.job_record(job) == {
        "id": "capfilt-a", "verb": "annotate", "out": "/a", "state": "running", "began": "2026-11-24T09:00:00+00:00",
    }  # fmt: skip
    assert not job.over
