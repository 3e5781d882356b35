"""The shards that a run read, as its plan or recipe names them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from capfilt import config as configs
from capfilt.reports.places import Place


def verb(plan: Mapping[str, Any]) -> str:
    """The verb that made a run folder; the plans of the two that have recipes are the recipes."""
    return str(plan.get("verb", "bootstrap" if "captioner" in plan else "pretrain"))


def web(folder: Place, tree: Mapping[str, Any]) -> list[str]:
    """The noisy shards of a bootstrap, as a person names them; `tree` is its recipe."""
    named = tree.get("data", {}).get("web")
    if named is None:
        return [str(folder / "data" / "web")]
    return [named] if isinstance(named, str) else list(named)


def named(folder: Place, plan: Mapping[str, Any]) -> list[str]:
    """The shards that were annotated or selected from, for `shards.expand`."""
    if verb(plan) == "bootstrap":
        return web(folder, configs.load(folder / "recipe.yaml"))
    return list(plan["shards"])
