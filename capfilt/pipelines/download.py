"""download: shards from lists of URLs, in a run folder of their own."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from typing import Any

from capfilt import config as configs
from capfilt.cluster.session import connect
from capfilt.downloading import placeholders, plans
from capfilt.downloading.failures import KINDS
from capfilt.errors import UsageError, did_you_mean
from capfilt.runs.progress import Progress
from capfilt.runs.run import Run
from capfilt.stages.download import STAGE, DownloadConfig, Wishes, check_enough, download, list_identities
from capfilt.stages.runner import CommandOptions
from capfilt.storage.paths import StoragePath


def run(
    address: str, config: DownloadConfig, wishes: Wishes, out: StoragePath, options: CommandOptions, show: Progress
) -> Any:
    """The verb: fetch a list into a run folder. RunError where a shard is missing, ShortfallError where
    too little came.
    """
    check_kinds(wishes.retry)
    folder = Run.open(out, configs.to_yaml(config), plan_of(config))
    begun = time.monotonic()
    with connect(address) as session:
        summary = download(session, config, out, options.resources(session), show, wishes)
    summary["seconds"] = round(time.monotonic() - begun, 1)
    folder.write_summary(summary)
    folder.log("end", **{key: summary[key] for key in ("samples", "failed", "seconds")})
    check_enough(STAGE, summary, wishes.min_success)
    return summary


def plan_of(config: DownloadConfig) -> dict[str, Any]:
    """What makes two downloads the same: the lists' contents, and all that decides what is written."""
    return {"verb": "download", **config.decides(), "lists": list_identities(config)}


def check_kinds(retry: Sequence[str]) -> None:
    """Refuse a `--retry` that names no kind of failure."""
    known = [plans.EVERY, *(kind for kind in KINDS if kind != placeholders.KIND)]
    for kind in retry:
        if kind not in known and not re.fullmatch(r"http-[3-5]\d\d", kind):
            raise UsageError(f"--retry {kind}: allowed are {', '.join(known)} and http-NNN.{did_you_mean(kind, known)}")
