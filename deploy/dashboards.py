"""Writes what Prometheus and Grafana read, and the table in docs/monitoring.md, from `capfilt/runs/metrics.py`:

    python deploy/dashboards.py

The panels below name metrics of that table; how each is asked for follows from its kind. A test holds the files in the
repository against what this writes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from capfilt.runs.metrics import METRICS, PREFIX, TABLE, Metric

ROOT = Path(__file__).parent.parent
DISCOVERY = "/tmp/ray/prom_metrics_service_discovery.json"
"""Where Ray writes the addresses of all nodes, unless it was started with another --temp-dir."""
BEGIN, END = "<!-- metrics: written by deploy/dashboards.py -->\n", "<!-- end of metrics -->"
SOURCE = {"type": "prometheus", "uid": "${source}"}
WIDTH, HEIGHT, IN_A_ROW = 8, 8, 3

UNITS = {"seconds": "s", "share": "percentunit", "percent": "percent"}
"""Grafana's names of units; others are written behind the number as they are."""


@dataclass(frozen=True)
class Panel:
    """A picture of one metric. A counter is shown as its rate or as its total, a histogram by two quantiles."""

    title: str
    metric: str
    how: Literal["rate", "total", "value", "quantiles"]

    @property
    def of(self) -> Metric:
        """The metric."""
        return METRICS[self.metric]


ROWS: dict[str, tuple[Panel, ...]] = {
    "What became of it": (
        Panel("Samples so far", "capfilt_samples", "total"),
        Panel("Samples a second", "capfilt_samples", "rate"),
        Panel("Samples that failed, by reason", "capfilt_samples_failed", "total"),
        Panel("Texts so far", "capfilt_texts", "total"),
        Panel("Texts a second", "capfilt_texts", "rate"),
        Panel("Texts dropped, by reason", "capfilt_texts_dropped", "total"),
    ),
    "Shards": (
        Panel("Shards not done yet", "capfilt_queue_depth", "value"),
        Panel("Shards that ended", "capfilt_shards", "total"),
        Panel("Seconds a shard takes", "capfilt_shard_seconds", "quantiles"),
        Panel("Workers busy, by phase", "capfilt_phase_seconds", "rate"),
        Panel("Seconds of workers, by phase", "capfilt_phase_seconds", "total"),
        Panel("Samples looked at together", "capfilt_batch_size", "quantiles"),
    ),
    "Training": (
        Panel("Losses", "capfilt_train_loss", "value"),
        Panel("Samples a second, in training", "capfilt_train_samples_per_second", "value"),
        Panel("Time spent waiting for data", "capfilt_train_data_wait", "value"),
        Panel("Norm of the gradients", "capfilt_train_gradient_norm", "value"),
        Panel("Learning rate", "capfilt_train_learning_rate", "value"),
        Panel("Model FLOPs utilisation", "capfilt_train_mfu", "value"),
        Panel("Steps so far", "capfilt_train_steps", "total"),
        Panel("Samples seen in training", "capfilt_train_samples", "total"),
    ),
    "GPUs": (Panel("GPU busy share", "node_gpus_utilization", "value"),),
}


def queries(panel: Panel) -> Iterator[tuple[str, str]]:
    """What a panel asks Prometheus, and the legend of each answer."""
    metric = panel.of
    own = ',WorkerId=~"$driver",stage=~"$stage"' if not metric.from_ray else ""
    series = f'{metric.prometheus_name}{{SessionName=~"$session"{own}}}'
    by, legend = ", ".join(metric.labels), " ".join(f"{{{{{label}}}}}" for label in metric.labels)
    if panel.how == "value":
        yield f"max by ({by}) ({series})", legend
    elif panel.how == "total":
        yield f"sum by ({by}) ({series})", legend
    elif panel.how == "rate":
        yield f"sum by ({by}) (rate({series}[$__rate_interval]))", legend
    else:
        for share in (0.5, 0.95):
            of_all = f"sum by (le, {by}) (rate({series}[$__rate_interval]))"
            yield f"histogram_quantile({share}, {of_all})", f"{legend} p{100 * share:.0f}"


def draw(panel: Panel, number: int, x: int, y: int) -> dict[str, Any]:
    """A panel as Grafana has it: totals as bars, the rest over time."""
    unit = UNITS.get(panel.of.unit) or (f"suffix: {panel.of.unit}" if panel.of.unit else "short")
    if panel.how == "rate":
        unit = "short" if panel.of.unit == "seconds" else f"suffix: {panel.of.unit}/s"  # seconds a second: workers
    totals = panel.how == "total"
    targets = [
        {"refId": chr(65 + i), "datasource": SOURCE, "expr": expr, "legendFormat": legend, "instant": totals}
        for i, (expr, legend) in enumerate(queries(panel))
    ]
    needs = f" Without a {panel.of.needs.upper()} there is nothing to show." if panel.of.needs else ""
    drawn: dict[str, Any] = {
        "id": number,
        "title": panel.title,
        "description": f"{panel.of.help} ({panel.of.prometheus_name}).{needs}",
        "type": "bargauge" if totals else "timeseries",
        "datasource": SOURCE,
        "gridPos": {"x": x, "y": y, "w": WIDTH, "h": HEIGHT},
        "fieldConfig": {"defaults": {"unit": unit, "min": 0}, "overrides": []},
        "targets": targets,
    }
    if totals:
        drawn["options"] = {"orientation": "horizontal", "displayMode": "basic", "showUnfilled": False}
    return drawn


def grafana() -> dict[str, Any]:
    """The dashboard."""
    panels: list[dict[str, Any]] = []
    y = 0
    for title, row in ROWS.items():
        place = {"x": 0, "y": y, "w": WIDTH * IN_A_ROW, "h": 1}
        panels.append({"id": len(panels) + 1, "type": "row", "title": title, "gridPos": place, "panels": []})
        y += 1
        for i, panel in enumerate(row):
            below, right = divmod(i, IN_A_ROW)
            panels.append(draw(panel, len(panels) + 1, WIDTH * right, y + HEIGHT * below))
        y += HEIGHT * (1 + (len(row) - 1) // IN_A_ROW)
    return {
        "uid": "capfilt",
        "title": "capfilt",
        "tags": ["capfilt", "ray"],
        "schemaVersion": 39,
        "time": {"from": "now-1h", "to": "now"},
        "refresh": "10s",
        "templating": {
            "list": [
                {"name": "source", "label": "Prometheus", "type": "datasource", "query": "prometheus"},
                choice("session", "Ray session", "SessionName"),
                choice("driver", "driver (one a command)", "WorkerId"),
                choice("stage", "stage", "stage"),
            ]
        },
        "panels": panels,
    }


def choice(name: str, said: str, label: str) -> dict[str, Any]:
    """A menu of the values of one label; all of them at first."""
    query = f'label_values({{__name__=~"{PREFIX}capfilt_.+"}}, {label})'
    return {
        "name": name,
        "label": said,
        "type": "query",
        "datasource": SOURCE,
        "query": {"query": query, "refId": name},
        "includeAll": True,
        "allValue": ".*",
        "multi": True,
        "current": {"text": "All", "value": "$__all"},
        "refresh": 2,
        "sort": 1,
    }


def prometheus(discovery: str = DISCOVERY, every: str = "10s") -> dict[str, Any]:
    """The configuration of a Prometheus beside a Ray head, which names all nodes in a file of its own.

    `every`: Ray renews its numbers each 10 s, so that asking more often shows nothing more.
    """
    scrape = {
        "job_name": "ray",
        "file_sd_configs": [{"files": [discovery], "refresh_interval": every}],
        # The same for every series.
        "metric_relabel_configs": [{"action": "labeldrop", "regex": "otel_scope_.*"}],
    }
    return {"global": {"scrape_interval": every, "evaluation_interval": every}, "scrape_configs": [scrape]}


def provisioning() -> dict[str, Any]:
    """What Grafana reads at its start: where Prometheus is, and where the dashboard lies."""
    source = {
        "name": "Prometheus",
        "type": "prometheus",
        "access": "proxy",
        "url": "http://localhost:9090",
        "isDefault": True,
        "jsonData": {"timeInterval": "10s"},
    }
    folder = {"name": "capfilt", "type": "file", "options": {"path": "/etc/grafana/dashboards"}}
    return {
        "datasources/prometheus.yml": {"apiVersion": 1, "datasources": [source]},
        "dashboards/capfilt.yml": {"apiVersion": 1, "providers": [folder]},
    }


def rows_of_table() -> Iterator[str]:
    """The table of docs/monitoring.md."""
    yield "| name in Prometheus | kind | unit | labels | what it says |"
    yield "|---|---|---|---|---|"
    for metric in TABLE:
        needs = f"; needs a {metric.needs.upper()}" if metric.needs else ""
        whose = "" if not metric.from_ray else "; measured by Ray itself"
        labels = ", ".join(metric.labels)
        yield f"| `{metric.prometheus_name}` | {metric.kind} | {metric.unit} | {labels} | {metric.help}{whose}{needs} |"


def files() -> dict[Path, str]:
    """Every file that is written, and what is in it."""
    said = "# Written by `python deploy/dashboards.py`.\n"
    grafana_home, page = ROOT / "deploy/grafana", ROOT / "docs/monitoring.md"
    before, _, after = re.split(f"({re.escape(BEGIN)}.*?{re.escape(END)})", page.read_text(), flags=re.DOTALL)
    table = "\n".join(rows_of_table())
    return {
        ROOT / "deploy/prometheus.yml": said + yaml.safe_dump(prometheus(), sort_keys=False),
        grafana_home / "capfilt.json": json.dumps(grafana(), indent=2) + "\n",
        **{
            grafana_home / "provisioning" / name: said + yaml.safe_dump(tree, sort_keys=False)
            for name, tree in provisioning().items()
        },
        page: f"{before}{BEGIN}{table}\n{END}{after}",
    }


if __name__ == "__main__":
    for path, text in files().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
