"""Finds the YAML presets by name: `find("models", "blip/base")`, in an installed wheel or in a checkout.

The wheel has the shelves inside the package (deploy/ship.py); a checkout has them beside it. Only the standard library
is imported here, so that the presets of a wheel can be listed with nothing else installed.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal, get_args

from capfilt.errors import RecipeError, did_you_mean

Shelf = Literal["models", "pipelines"]

PACKED = Path(__file__).parent / "_presets"
CHECKOUT = Path(__file__).parent.parent


def find(shelf: Shelf, name: str | Path, within: str = "") -> Path:
    """Return the path of a preset, or of the YAML file that `name` itself points at.

    `find("pipelines", "demo", within="bootstrap")` takes "demo" for "bootstrap/demo" if there is no "demo".
    Raises RecipeError, with the names that exist, for a name that is not on the shelf.
    """
    text = str(name)
    if text.endswith((".yaml", ".yml")):
        if not os.path.isfile(text):  # Path.is_file raises for a name that is too long
            raise RecipeError(f"there is no file {text}; give a YAML file that exists or a preset name.")
        return Path(text)
    known = names(shelf)
    for candidate in (text, f"{within}/{text}"):
        if candidate in known:
            return _root(shelf) / f"{candidate}.yaml"
    elsewhere = [entry for entry in known if entry.endswith(f"/{text}")]
    if within and elsewhere:
        owner = elsewhere[0].partition("/")[0]
        raise RecipeError(f"the preset {text!r} is {elsewhere[0]}, a recipe of `capfilt {owner}` and not of {within}.")
    listed = [entry for entry in known if within and entry.startswith(f"{within}/")] or known
    short = [entry.removeprefix(f"{within}/") for entry in listed]
    raise RecipeError(
        f"there is no preset {text!r} in {shelf}/.{did_you_mean(text, [*listed, *short])}"
        f" There are: {', '.join(listed) or 'none'}. A path to a .yaml file works too."
    )


def folder_of(name: str) -> str:
    """The folder of `pipelines/` in which a preset lies, with or without which it may be named; "models" for a preset
    of `models/`. Raises RecipeError for a name on neither shelf.
    """
    recipes, models = names("pipelines"), names("models")
    for known in recipes:
        folder, _, short = known.partition("/")
        if name in (known, short):
            return folder
    if name in models:
        return "models"
    every = [*recipes, *models]
    hint = did_you_mean(name, [*every, *(recipe.partition("/")[2] for recipe in recipes)])
    raise RecipeError(f"there is no preset {name!r}.{hint} There are: {', '.join(every)}. A path to a .yaml works too.")


def names(shelf: Shelf) -> list[str]:
    """List every preset of a shelf, sorted: ["blip/base", "blip/tiny", ...]."""
    root = _root(shelf)
    return sorted(file.relative_to(root).with_suffix("").as_posix() for file in root.rglob("*.yaml"))


def _root(shelf: Shelf) -> Path:
    assert shelf in get_args(Shelf), shelf
    packed = PACKED / shelf
    # In site-packages a folder models/ beside the package belongs to another package: only in a checkout it counts.
    if packed.is_dir() or not (CHECKOUT / "pyproject.toml").is_file():
        return packed
    return CHECKOUT / shelf
