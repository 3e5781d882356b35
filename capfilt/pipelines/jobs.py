"""jobs: the commands that were sent to a cluster, and how one is sent, through `cluster/ray_jobs.py`.

Paths in a command are paths of the cluster. One job at a time works on a run folder: the same command sent again joins
the job that is running.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from capfilt import __version__
from capfilt import config as configs
from capfilt.cluster.ray_jobs import Command, Job, Jobs
from capfilt.config import Config
from capfilt.errors import RunError, UsageError
from capfilt.redact import redact_tree

RECIPE = "recipe.yaml"
"""The name of the resolved recipe in the job's working directory."""


@dataclass(frozen=True)
class JobRequest:
    """A command for a cluster, `capfilt VERB WORDS`, with the recipe and the run folder it needs."""

    verb: str
    words: tuple[str, ...]
    out: str = ""
    """The run folder it writes, as a path of the cluster; "" for none."""
    recipe: Config | None = None

    @property
    def notes(self) -> dict[str, str]:
        """The metadata of the job; equal requests have equal digests."""
        files = {} if self.recipe is None else {RECIPE: configs.digest(self.recipe)}
        content = json.dumps([self.verb, self.words, files])
        return {"verb": self.verb, "out": self.out, "digest": hashlib.sha256(content.encode()).hexdigest()[:16]}


def run(address: str) -> dict[str, Any]:
    """The verb: every capfilt job that the cluster knows, the oldest first."""
    cluster = Jobs(address)
    return {"address": cluster.address, "jobs": [job_record(job) for job in cluster.list() if "verb" in job.notes]}


def job_record(job: Job) -> dict[str, Any]:
    """A job as --json prints it; what is not known is absent."""
    record: dict[str, Any] = {
        "id": job.id,
        "verb": job.notes.get("verb", job.command),
        "out": job.notes.get("out", ""),
        "state": job.state,
    }
    if job.began is not None:
        record["began"] = job.began.isoformat(timespec="seconds")
    if job.ended is not None:
        record["ended"] = job.ended.isoformat(timespec="seconds")
    if job.code is not None:
        record["exit_code"] = job.code
    return record


def send(cluster: Jobs, request: JobRequest) -> tuple[str, bool]:
    """Submit a request to a cluster; returns the job's id and whether it is new. An equal request that is running is
    joined instead of submitted.

    Raises RunError if another request is running on the same run folder.
    """
    check_secrets(request)
    notes = request.notes
    running = [job for job in cluster.list() if request.out and job.notes.get("out") == request.out and not job.over]
    for job in running:
        if job.notes.get("digest") != notes["digest"]:
            raise RunError(
                f"{job.id} is at work on {request.out} with other settings: wait for it, end it by `capfilt jobs "
                f"{job.id} --stop --address {cluster.address}`, or choose another --out."
            )
        return job.id, False
    files = {}
    if request.recipe is not None:
        # A default stays one, which a verb may take for more than its value: such as `batch_size` on a GPU.
        tree = request.recipe.model_dump(mode="json", exclude_unset=True)
        files[RECIPE] = configs.tree_to_yaml(redact_tree(tree))
    name = re.sub(r"[^a-zA-Z0-9]+", "-", request.out.rstrip("/").rpartition("/")[2]).strip("-").lower()
    prefix = "-".join(filter(None, ("capfilt", request.verb, name)))
    return cluster.submit(Command((request.verb, *request.words), __version__, files, notes), prefix), True


def check_secrets(request: JobRequest) -> None:
    """Raise UsageError for a secret in a request: everyone on a cluster can read the commands of its jobs."""
    recipe = request.recipe.model_dump(mode="json") if request.recipe is not None else {}
    for what, sent in (("the command", list(request.words)), ("the recipe", recipe)):
        if redact_tree(sent) != sent:
            raise UsageError(
                f"{what} holds an address with a password or a signature in it, and a cluster keeps jobs for everyone"
                " to read. Name a place that its workers read by keys of their environment, or run the command there."
            )


def check_absolute(paths: Mapping[str, Any]) -> None:
    """Raise UsageError for a relative path (name -> path or paths, also as NAME=PATH): it has a meaning on the sender's
    machine only."""
    for what, value in paths.items():
        for path in [value] if isinstance(value, str | Path) else value:
            for part in re.sub(r"^[\w.-]+=", "", str(path)).split("::"):
                here = part.removeprefix("hf:")
                on_the_hub = here != part and not Path(here).exists()
                if not here.startswith("/") and "://" not in part and not on_the_hub:
                    raise UsageError(
                        f"{what} is {part!r}, and a job's paths are the cluster's, where the folder you are in means "
                        "nothing. Give it in full, as every machine there sees it: /mnt/runs/a, or a URL."
                    )


def external_paths(recipe: Config) -> dict[str, Any]:
    """The paths of files and folders that a recipe names, by dotted key."""
    return dict(_external_paths(recipe.model_dump(mode="json")))


_PATH_KEYS = ("data.web", "data.human", "data.val", "data.test", "data.download.urls", "start", "model")

_FILE_ENDINGS = (".yaml", ".yml", ".pth", ".pt", ".ckpt", ".th", ".bin", ".npz", ".safetensors", ".txt", ".json")

_KEYWORDS = ("world", "scratch", "continue")  # values of these keys that are no paths


def _external_paths(tree: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    if isinstance(sources := tree.get("data"), list):
        yield from ((f"data[{index}].shards", source["shards"]) for index, source in enumerate(sources))
    for key in _PATH_KEYS:
        value: Any = tree
        for name in key.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        no_file = key == "model" and (not isinstance(value, str) or not value.endswith((".yaml", ".yml")))
        if value not in (None, *_KEYWORDS) and not no_file:
            yield key, value
    for name in ("pretrain", "captioner", "filter", "train"):
        section = tree.get(name) or {}
        yield from _feature_folder(name, section)
        yield from _weights(name, section)
        yield from _weights(f"{name}.initial", section.get("initial") or {})
        yield from _feature_folder(f"{name}.pretrain", section.get("pretrain"))
        yield from ((f"{name}.start", start) for start in [section.get("start")] if start is not None)
    yield from _weights("initial", tree.get("initial") or {})
    yield from _weights("", {"tokenizer": tree.get("tokenizer")})
    for number, stage in enumerate(tree.get("final") or ()):
        yield from _weights(f"final.{number}", stage)
        yield from _feature_folder(f"final.{number}.train", stage["train"])


def _feature_folder(name: str, train: Mapping[str, Any] | None) -> Iterator[tuple[str, Any]]:
    if train is not None and isinstance(folder := train.get("features"), str):
        yield f"{name}.features", folder


def _weights(name: str, tree: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Values that may also be names on the hub or of presets: paths if they look like files or exist here."""
    for key in ("model", "vision", "text", "language", "tokenizer", "pretrained"):
        value = tree.get(key)
        if isinstance(value, str) and (value.endswith(_FILE_ENDINGS) or Path(value.removeprefix("hf:")).exists()):
            yield f"{name}.{key}".removeprefix("."), value


_RAY_LINE = re.compile(r"Running entrypoint for job |\d{4}-\d\d-\d\d [\d:,]+\sINFO job_manager\.py:\d+ -- ")


def command_output(log: Sequence[str]) -> str:
    """The output of a command, without the lines that Ray writes when a job begins; they may come in between."""
    lines = "".join(log).splitlines(keepends=True)
    return "".join(line for line in lines if not _RAY_LINE.match(line))


def result_of(log: Sequence[str]) -> dict[str, Any] | None:
    """The result that a command with --json printed at the end of its log; None if it printed none."""
    lines = "".join(log).splitlines()
    for index in range(len(lines) - 1, -1, -1):
        if lines[index] in ("{", "{}"):
            try:
                result: dict[str, Any] = json.JSONDecoder().raw_decode("\n".join(lines[index:]))[0]
            except ValueError:
                return None
            return result
    return None
