"""jobs: the commands that a cluster was sent, and how one is sent; `cluster/ray_jobs.py` speaks with the cluster.

Paths in a command are the cluster's. A run folder has one job at work: the same command sent again is the same job.
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
"""The resolved recipe, in the folder in which the job's command starts."""


@dataclass(frozen=True)
class Order:
    """What is asked of a cluster: `capfilt VERB WORDS`, and what is known of it beforehand."""

    verb: str
    words: tuple[str, ...]
    out: str = ""
    """The run folder it writes, as the cluster names it; "" for none."""
    recipe: Config | None = None

    @property
    def notes(self) -> dict[str, str]:
        """What is kept with the job: the same order has the same digest."""
        files = {} if self.recipe is None else {RECIPE: configs.digest(self.recipe)}
        told = json.dumps([self.verb, self.words, files])
        return {"verb": self.verb, "out": self.out, "digest": hashlib.sha256(told.encode()).hexdigest()[:16]}


def run(address: str) -> dict[str, Any]:
    """The verb: every job of capfilt's that the cluster knows, the oldest first."""
    cluster = Jobs(address)
    return {"address": cluster.address, "jobs": [row(job) for job in cluster.list() if "verb" in job.notes]}


def row(job: Job) -> dict[str, Any]:
    """One job; a figure that there is not is absent."""
    told: dict[str, Any] = {
        "id": job.id,
        "verb": job.notes.get("verb", job.command),
        "out": job.notes.get("out", ""),
        "state": job.state,
    }
    if job.began is not None:
        told["began"] = job.began.isoformat(timespec="seconds")
    if job.ended is not None:
        told["ended"] = job.ended.isoformat(timespec="seconds")
    if job.code is not None:
        told["exit_code"] = job.code
    return told


def send(cluster: Jobs, order: Order) -> tuple[str, bool]:
    """Hand an order to a cluster: the job's id, and whether it is new; one that is at work already is taken up.

    Raises RunError where another order is at work on the same run folder.
    """
    check_secrets(order)
    notes = order.notes
    at_work = [job for job in cluster.list() if order.out and job.notes.get("out") == order.out and not job.over]
    for job in at_work:
        if job.notes.get("digest") != notes["digest"]:
            raise RunError(
                f"{job.id} is at work on {order.out} with other settings: wait for it, end it by `capfilt jobs "
                f"{job.id} --stop --address {cluster.address}`, or choose another --out."
            )
        return job.id, False
    files = {} if order.recipe is None else {RECIPE: configs.to_yaml(order.recipe)}
    name = re.sub(r"[^a-zA-Z0-9]+", "-", order.out.rstrip("/").rpartition("/")[2]).strip("-").lower()
    prefix = "-".join(filter(None, ("capfilt", order.verb, name)))
    return cluster.submit(Command((order.verb, *order.words), __version__, files, notes), prefix), True


def check_secrets(order: Order) -> None:
    """Raise UsageError for a secret in what would be sent: a cluster keeps its jobs' commands for everyone to read."""
    recipe = order.recipe.model_dump(mode="json") if order.recipe is not None else {}
    for what, sent in (("the command", list(order.words)), ("the recipe", recipe)):
        if redact_tree(sent) != sent:
            raise UsageError(
                f"{what} holds an address with a password or a signature in it, and a cluster keeps jobs for everyone"
                " to read. Name a place that its workers read by keys of their environment, or run the command there."
            )


def check_places(named: Mapping[str, Any]) -> None:
    """Raise UsageError for a path that means something on the sender's machine alone: one that is relative."""
    for what, value in named.items():
        for path in [value] if isinstance(value, str | Path) else value:
            for part in str(path).split("::"):
                if not part.startswith("/") and "://" not in part:
                    raise UsageError(
                        f"{what} is {part!r}, and a job's paths are the cluster's, where the folder you are in means "
                        "nothing. Give it in full, as every machine there sees it: /mnt/runs/a, or a URL."
                    )


def places(recipe: Config) -> dict[str, Any]:
    """What a recipe names that lies outside of it, by dotted key."""
    return dict(_places(recipe.model_dump(mode="json")))


_KEYS = ("data.web", "data.human", "data.val", "data.test", "data.download.urls", "start", "model")

_FILES = (".yaml", ".yml", ".pth", ".pt", ".bin", ".npz", ".safetensors", ".txt", ".json")

_WORDS = ("world", "scratch", "continue")  # that are no paths


def _places(tree: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    if isinstance(sources := tree.get("data"), list):
        yield from ((f"data[{index}].shards", source["shards"]) for index, source in enumerate(sources))
    for key in _KEYS:
        value: Any = tree
        for name in key.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        preset = key == "model" and not str(value).endswith((".yaml", ".yml"))
        if value not in (None, *_WORDS) and not preset:
            yield key, value
    for name in ("pretrain", "captioner", "filter", "train"):
        yield from _features(name, tree.get(name))
    yield from _weights("initial", tree.get("initial") or {})
    yield from _weights("", {"tokenizer": tree.get("tokenizer")})
    for number, stage in enumerate(tree.get("final") or ()):
        yield from _weights(f"final.{number}", stage)
        yield from _features(f"final.{number}.train", stage["train"])


def _features(name: str, train: Mapping[str, Any] | None) -> Iterator[tuple[str, Any]]:
    if train is not None and isinstance(kept := train.get("features"), str):
        yield f"{name}.features", kept


def _weights(name: str, tree: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """What may also be a name on the hub, or of a preset: a path if it looks like a file, or if it is there."""
    for key in ("model", "vision", "text", "language", "tokenizer"):
        value = tree.get(key)
        if isinstance(value, str) and (value.endswith(_FILES) or Path(value).exists()):
            yield f"{name}.{key}".removeprefix("."), value


_RAYS_OWN = re.compile(r"Running entrypoint for job |\d{4}-\d\d-\d\d [\d:,]+\sINFO job_manager\.py:\d+ -- ")


def own_words(log: Sequence[str]) -> str:
    """What a command said, without the lines in which Ray tells that it begins; the first may come between them."""
    lines = "".join(log).splitlines(keepends=True)
    return "".join(line for line in lines if not _RAYS_OWN.match(line))


def result_of(log: Sequence[str]) -> dict[str, Any] | None:
    """The result that a command with --json printed at the end of its log; None where it came to no result."""
    lines = "".join(log).splitlines()
    for index in range(len(lines) - 1, -1, -1):
        if lines[index] in ("{", "{}"):
            try:
                found: dict[str, Any] = json.JSONDecoder().raw_decode("\n".join(lines[index:]))[0]
            except ValueError:
                return None
            return found
    return None
