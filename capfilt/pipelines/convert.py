"""convert: the published files of a downstream task's data set, and its pictures, to shards in a run folder."""

from __future__ import annotations

import hashlib
import time
from typing import Any

from capfilt import config as configs
from capfilt.data.tasks.official.json_stream import opened
from capfilt.errors import CapfiltError
from capfilt.runs.progress import Progress
from capfilt.runs.run import Run
from capfilt.stages import convert as stage
from capfilt.stages.convert import ConvertConfig
from capfilt.stages.runner import withdraw_failed
from capfilt.stages.workload import Place, Workload
from capfilt.storage.paths import remove_file, remove_folder


def run(place: Place, config: ConvertConfig, retry: str | None) -> dict[str, Any]:
    """The verb: returns what became of every picture and every row.

    Raises:
        UsageError: splits that are not there, a file or folder that is not.
        DataError: a file that is not of the task.
        ShortfallError: no picture could be used, or a smaller share than `min_success`.
    """
    out, show = place.out, place.show
    stage.check_config(config)
    if retry is not None:
        withdraw_failed(out, stage.STAGE, retry)
    opened = Run.open(out, configs.to_yaml(config), plan_of(config, show))
    if retry is not None:  # pictures that were not there may be now
        remove_file(out / stage.PLAN / "plan.json")
    begun = time.monotonic()
    try:
        plan = stage.make_plan(config, out, show)
    except CapfiltError:
        if not opened.resumed:  # so that the same --out takes the command once it is right
            remove_folder(out / stage.PLAN)
            remove_file(out / "plan.json")
        raise
    with place.connect(stage.STAGE, Workload(plan.shards, plan.rows)) as (session, worker):
        summary = stage.convert_shards(session, config, plan, out, worker, show)
    opened.write_summary(summary)
    opened.log("end", **{name: summary[name] for name in ("samples", "rows")}, seconds=time.monotonic() - begun)
    stage.check_converted(summary, place.options.min_success)
    return summary


def plan_of(config: ConvertConfig, show: Progress) -> dict[str, Any]:
    """The plan of a conversion: its settings, with the sha256 of every file in place of its path."""
    files = []
    with show.wait(f"reading {len(config.files)} files"):
        for url in config.files:
            with opened(url) as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
                files.append({"name": url.rpartition("/")[2], "bytes": file.tell(), "sha256": digest})
    return {"verb": stage.STAGE, **config.model_dump(mode="json", exclude={"files"}), "files": files}
