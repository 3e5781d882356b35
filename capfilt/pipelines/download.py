"""download: shards from lists of URLs, in a run folder of their own."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from typing import Any

from capfilt import config as configs
from capfilt.downloading.failures import KINDS, PLACEHOLDER
from capfilt.downloading.plans import ALL_KINDS, passes
from capfilt.downloading.url_lists.files import find_files
from capfilt.downloading.url_lists.tables import check_columns
from capfilt.errors import UsageError, did_you_mean
from capfilt.runs.run import Run
from capfilt.stages.download import (
    STAGE,
    DownloadConfig,
    DownloadOptions,
    check_success_rate,
    download,
    list_identities,
)
from capfilt.stages.workload import Place
from capfilt.storage.paths import StoragePath


def run(place: Place, config: DownloadConfig, options: DownloadOptions) -> Any:
    """Fetch lists of URLs into a run folder; returns the summary.

    Raises:
        UsageError: `--retry` names no kind of failure.
        ListError: a list is not there, or lacks a column.
        RunError: a shard cannot be fetched.
        ShortfallError: no picture came, or a smaller share than `options.min_success`.
    """
    check_kinds(options.retry)
    check_lists(config, place.out)
    folder = Run.open(place.out, configs.to_yaml(config), plan_of(config))
    begun = time.monotonic()
    with place.connect(STAGE) as (session, worker):
        summary = download(session, config, place.out, worker, place.show, options)
    summary["seconds"] = round(time.monotonic() - begun, 1)
    folder.write_summary(summary)
    folder.log("end", **{key: summary[key] for key in ("samples", "failed", "seconds")})
    check_success_rate(STAGE, summary, options.min_success)
    return summary


def check_lists(config: DownloadConfig, out: StoragePath) -> None:
    """Refuse lists that are not there or lack a column, unless they are planned already. ListError or DataError."""
    if not passes(out / "plan"):
        check_columns(find_files(config.urls, config.input_format)[0], config)


def plan_of(config: DownloadConfig) -> dict[str, Any]:
    """The plan of a download, equal for two that write the same: the lists' contents and the fields that decide it."""
    return {"verb": "download", **config.outcome_fields(), "lists": list_identities(config)}


def check_kinds(retry: Sequence[str]) -> None:
    """Refuse a `--retry` that names no kind of failure."""
    known = [ALL_KINDS, *(kind for kind in KINDS if kind != PLACEHOLDER)]
    for kind in retry:
        if kind not in known and not re.fullmatch(r"http-[3-5]\d\d", kind):
            raise UsageError(f"--retry {kind}: allowed are {', '.join(known)} and http-NNN.{did_you_mean(kind, known)}")
