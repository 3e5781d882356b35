from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from capfilt.runs.metrics import TABLE
from deploy import dashboards


@pytest.fixture(scope="module")
def board() -> dict[str, Any]:
    result: dict[str, Any] = json.loads((dashboards.ROOT / "deploy/grafana/capfilt.json").read_text())
    return result


@pytest.mark.parametrize("path", dashboards.files(), ids=lambda path: path.name)
def test_the_files_are_what_the_table_makes(path: Path) -> None:
    assert path.read_text() == dashboards.files()[path], "run python deploy/dashboards.py"


def test_every_metric_is_drawn_and_no_other(board: dict[str, Any]) -> None:
    queries = [target["expr"] for panel in board["panels"] for target in panel.get("targets", ())]
    requested = {name for query in queries for name in re.findall(r"(\w+)\{", query)}
    assert requested == {metric.prometheus_name for metric in TABLE}


def test_panels_do_not_lie_on_each_other(board: dict[str, Any]) -> None:
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in board["panels"])
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(cells) == len(set(cells))
    assert {x for x, _ in cells} == set(range(24))
    numbers = [panel["id"] for panel in board["panels"]]
    assert len(numbers) == len(set(numbers))


def test_prometheus_takes_its_configuration() -> None:
    tool = shutil.which("promtool")
    if tool is None:
        pytest.skip("no prometheus is installed")
    words = [tool, "check", "config", str(dashboards.ROOT / "deploy/prometheus.yml")]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
