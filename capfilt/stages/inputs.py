"""The shards that a run read: how its plan or recipe names them, and whether they have changed since.

A run folder may come from someone else, and its plan may name anything: for example the address at which a cloud hands
out this machine's keys. So unless the user allows more, only shards on this machine are read, or on the very store
that holds the run folder.

A shard is unchanged if its size and the version that the storage reports are. Where only the version differs (a touch,
an upload of the same bytes) the shard is read once to compare its sha256.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from capfilt.config import Config
from capfilt.data import labels, shards
from capfilt.errors import RunError, ShardError
from capfilt.printable import short_repr
from capfilt.runs.ledger import Completion, Input, Ledger
from capfilt.runs.progress import Progress
from capfilt.runs.run import Run
from capfilt.storage import documents
from capfilt.storage.paths import StoragePath, map_concurrent, storage_path
from capfilt.storage.remote_path import RemotePath
from capfilt.yaml_loader import load_yaml

_LOCAL_PROTOCOLS = ("file", "local", "memory")
"""Protocols that reach nothing but this machine."""


class ShardsJob(Config):
    """A stage whose items are the URLs of shards."""

    out: StoragePath
    """The run folder, or that of a round."""
    names: dict[str, str] = {}
    """By URL, the names of shards that differ from their file's name (`shards.renamed`)."""

    def shard_name(self, url: str) -> str:
        """The name by which records have a shard."""
        return self.names.get(url) or shards.name(url)


def verb_of(plan: Mapping[str, Any]) -> str:
    """The verb that made a run folder; the plans of bootstrap and pretrain are their recipes and do not name it."""
    return str(plan.get("verb", "bootstrap" if "captioner" in plan else "pretrain"))


def web_shards(folder: StoragePath, recipe: Mapping[str, Any]) -> list[str]:
    """The web shards of a bootstrap as its recipe names them: paths, patterns or URLs for `shards.expand`."""
    data = recipe.get("data")
    specs = data.get("web") if isinstance(data, dict) else None
    if specs is None:
        return [str(folder / "data" / "web")]
    return [specs] if isinstance(specs, str) else _texts(specs, f"the recipe of {folder}", "data.web")


def input_shards(folder: StoragePath, plan: Mapping[str, Any]) -> list[str]:
    """The shards that a run annotated or selected from, for `shards.expand`."""
    if verb_of(plan) == "bootstrap":
        return web_shards(folder, load_yaml(documents.check_record(folder / "recipe.yaml")))
    return _texts(plan.get("shards", []), f"the plan of {folder}", "shards")


def annotations_source(folder: StoragePath, plan: Mapping[str, Any]) -> StoragePath:
    """The folder whose annotations a `select` read."""
    (source,) = _texts([plan.get("annotations")], f"the plan of {folder}", "annotations")
    return storage_path(source)


def _texts(value: Any, where: str, key: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(text, str) and "\0" not in text for text in value):
        raise RunError(f"{where} must have a list of texts as its {key}; it has {short_repr(value)}.")
    return value


def check_reachable(folder: StoragePath, specs: Sequence[str], fetch: bool) -> None:
    """Raise RunError if a run's plan names shards that lie elsewhere, unless `fetch` allows to fetch them.

    Raises ShardError for an address whose secret is missing, which leads nowhere.
    """
    for spec in specs:
        for address in (place for pattern, _ in shards.patterns(spec) for place in shards.places(pattern)):
            if not fetch and not _is_near(folder, address):
                raise RunError(
                    f"the plan of {folder} names {address}, which is elsewhere. Whoever made the run folder chose that"
                    " address; if you trust it, say --fetch-inputs."
                )


def _is_near(folder: StoragePath, address: str) -> bool:
    protocol, separator, _ = address.partition("://")
    if not separator or protocol in _LOCAL_PROTOCOLS:
        return True
    return isinstance(folder, RemotePath) and RemotePath(address).parts[0] == folder.parts[0]


def urls_by_name(plan: Mapping[str, Any], urls: Sequence[str]) -> dict[str, str]:
    """The URL of every shard of a run by the name under which its records keep it. RunError for a malformed plan."""
    renamed = plan.get("names", {})
    if not isinstance(renamed, dict) or not all(isinstance(x, str) and not {*x} & {*"/\0"} for x in renamed.values()):
        raise RunError(f"the plan must map addresses to names of shards; it has {short_repr(renamed)}.")
    return {renamed.get(url) or shards.name(url): url for url in urls} if renamed else shards.by_name(urls)


def annotated_urls_by_name(source: StoragePath, urls: Sequence[str]) -> dict[str, str]:
    """The URL of each shard by the name of its annotations in the folder `source`.

    A file name is not enough where several shards that were annotated together share it (`shards.by_name`).
    """
    home = labels.run_folder_of(source)
    if not (home / "plan.json").is_file():
        return shards.by_name(urls)
    try:
        annotated = shards.by_name(_annotated_urls(home))
    except (ShardError, RunError):  # of a bootstrap: its recipe names shards that are gone, or elsewhere
        return shards.by_name(urls)
    names = {url: name for name, url in annotated.items()}
    return {names[url]: url for url in urls} if names.keys() >= set(urls) else shards.by_name(urls)


def _annotated_urls(home: StoragePath) -> list[str]:
    plan = Run.load(home).plan
    specs = input_shards(home, plan)
    if verb_of(plan) == "annotate":
        return specs
    check_reachable(home, specs, fetch=False)
    return shards.expand(specs)


def changed_shards(
    ledger: Ledger, completions: Mapping[str, Completion], urls: Mapping[str, str], show: Progress, label: str
) -> set[str]:
    """The names of the completed shards whose bytes are no longer those that were read; `urls` says where each lies.

    Where only the version differs, the new version is recorded, so that the shard is not read to compare a second
    time. ShardError for a shard that does not exist any more.
    """
    stats = shards.stats([urls[name] for name in completions])
    to_compare, changed = [], set()
    for name, completion in completions.items():
        stat, read = stats[urls[name]], completion.input
        if read is None or stat["size"] not in (None, read.bytes):
            changed.add(name)
        elif stat["version"] != read.version:
            to_compare.append(name)
    if not to_compare:
        return changed
    show.say(
        f"{label}: {len(to_compare)} shards have another time of writing and the same size; reading them to compare"
    )
    places = [urls[name] for name in to_compare]
    for name, now in zip(to_compare, map_concurrent(shards.read_input, places, shards.on_a_store(places)), strict=True):
        if same_bytes(completions[name].input, now):
            ledger.rewrite(replace(completions[name], input=replace(now, version=stats[urls[name]]["version"])))
        else:
            changed.add(name)
    return changed


def same_bytes(read: Input | None, now: Input) -> bool:
    """Whether size and sha256 are equal, whatever the storage says about when the shard was written."""
    return read is not None and (read.bytes, read.sha256) == (now.bytes, now.sha256)
