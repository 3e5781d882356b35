"""The shards that a run read, as its plan or recipe names them, and the names by which its records know them.

A run folder may be somebody else's, and its plan name anything: the address at which a cloud hands out this machine's
keys, say. So where nobody asked for more, only what lies on this machine is read, or on the very store that the run
folder is on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from capfilt import config as configs
from capfilt.data import labels, shards
from capfilt.errors import RunError, ShardError
from capfilt.printable import short_repr
from capfilt.runs.run import Run
from capfilt.storage import documents
from capfilt.storage.paths import RemotePath, StoragePath, storage_path

_HERE = ("file", "local", "memory")
"""Protocols that ask nobody but this machine."""


def verb(plan: Mapping[str, Any]) -> str:
    """The verb that made a run folder; the plans of the two that have recipes are the recipes."""
    return str(plan.get("verb", "bootstrap" if "captioner" in plan else "pretrain"))


def web(folder: StoragePath, tree: Mapping[str, Any]) -> list[str]:
    """The noisy shards of a bootstrap, as a person names them; `tree` is its recipe."""
    data = tree.get("data")
    named = data.get("web") if isinstance(data, dict) else None
    if named is None:
        return [str(folder / "data" / "web")]
    return [named] if isinstance(named, str) else _texts(named, f"the recipe of {folder}", "data.web")


def named(folder: StoragePath, plan: Mapping[str, Any]) -> list[str]:
    """The shards that were annotated or selected from, for `shards.expand`."""
    if verb(plan) == "bootstrap":
        return web(folder, configs.load(documents.checked(folder / "recipe.yaml")))
    return _texts(plan.get("shards", []), f"the plan of {folder}", "shards")


def annotated(folder: StoragePath, plan: Mapping[str, Any]) -> StoragePath:
    """What a `select` chose from."""
    (found,) = _texts([plan.get("annotations")], f"the plan of {folder}", "annotations")
    return storage_path(found)


def _texts(found: Any, whose: str, key: str) -> list[str]:
    if not isinstance(found, list) or not all(isinstance(text, str) and "\0" not in text for text in found):
        raise RunError(f"{whose} is to name its {key}, texts, and names {short_repr(found)}.")
    return found


def check_reachable(folder: StoragePath, specs: Sequence[str], fetch: bool) -> None:
    """Raise RunError where a run's plan names what would be fetched from elsewhere and that was not asked for.

    Raises ShardError for an address that lacks its secret, and leads nowhere.
    """
    for spec in specs:
        for address, _ in shards.patterns(spec):
            if not fetch and not _is_near(folder, address):
                raise RunError(
                    f"the plan of {folder} names {address}, which is elsewhere. Whoever made the run folder chose that"
                    " address; if you trust it, say --fetch-inputs."
                )


def _is_near(folder: StoragePath, address: str) -> bool:
    protocol, separator, _ = address.partition("://")
    if not separator or protocol in _HERE:
        return True
    return isinstance(folder, RemotePath) and RemotePath(address).parts[0] == folder.parts[0]


def by_name(plan: Mapping[str, Any], urls: Sequence[str]) -> dict[str, str]:
    """All shards of a run by the names that its records have for them."""
    renamed = plan.get("names", {})
    if not isinstance(renamed, dict) or not all(isinstance(x, str) and not {*x} & {*"/\0"} for x in renamed.values()):
        raise RunError(f"the plan is to have names of shards by their addresses, and has {short_repr(renamed)}.")
    return {renamed.get(url) or shards.name(url): url for url in urls} if renamed else shards.by_name(urls)


def as_annotated(source: StoragePath, urls: Sequence[str]) -> dict[str, str]:
    """Some of the shards whose annotations are in the folder `source`, by the names that these have.

    A file's own name is not enough where several that were annotated together have it (`shards.by_name`).
    """
    home = labels.home(source)
    if not (home / "plan.json").is_file():
        return shards.by_name(urls)
    try:
        whole = shards.by_name(_annotated(home))
    except (ShardError, RunError):  # of a bootstrap: its recipe names shards that are gone, or elsewhere
        return shards.by_name(urls)
    names = {url: name for name, url in whole.items()}
    return {names[url]: url for url in urls} if names.keys() >= set(urls) else shards.by_name(urls)


def _annotated(home: StoragePath) -> list[str]:
    plan = Run.load(home).plan
    specs = named(home, plan)
    if verb(plan) == "annotate":
        return specs
    check_reachable(home, specs, fetch=False)
    return shards.expand(specs)
