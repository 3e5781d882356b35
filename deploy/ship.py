"""The wheel's build hook: carries the YAML of models/ and pipelines/ into the package as capfilt/_presets/.

Only for a real wheel. An editable install reads the shelves live from the checkout, and a copy inside the
package would shadow them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SHELVES = ("models", "pipelines")


class Ship(BuildHookInterface):
    """Map every YAML of the shelves to its place in the wheel; refuse to build a wheel without presets."""

    PLUGIN_NAME = "ship"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Add the shelves to a standard wheel; `version` is "editable" for `pip install -e`."""
        if version != "standard":
            return
        for shelf in SHELVES:
            root = Path(self.root) / shelf
            files = sorted(root.rglob("*.yaml"))
            if not files:
                raise FileNotFoundError(f"{root} holds no YAML; a wheel without its presets would not work")
            for file in files:
                target = Path("capfilt", "_presets", shelf, file.relative_to(root))
                build_data["force_include"][str(file)] = target.as_posix()
