"""Whether what a bootstrap trains on holds pictures of its validation or test split, byte for byte; always checked.

Only equal bytes count here: of the embedded world's pictures, drawn apart, 3 of 4,000 have the perceptual hash of a
test picture, and a scan that decodes every web picture would cost as much as an annotation. `data.decontaminate` finds
changed copies.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext

from capfilt.cluster.session import Session, connect
from capfilt.cluster.worker_pool import Resources
from capfilt.data import shards
from capfilt.errors import RunError
from capfilt.index.near import Near
from capfilt.runs.progress import Progress
from capfilt.stages.near.decontaminate import compare, rows
from capfilt.stages.near.decontaminate.compare import Settings
from capfilt.stages.near.decontaminate.criteria import Criteria
from capfilt.stages.runner import run_stage
from capfilt.stages.workload import of_shards
from capfilt.storage.paths import StoragePath, make_folder

TRAINED, HELD_OUT = ("web", "human"), ("test", "val")


def check_held_out(
    session: Session,
    splits: Mapping[str, Sequence[str]],
    out: StoragePath,
    allowed: bool,
    resources: Resources,
    show: Progress,
) -> None:
    """Compare the bytes of the pictures that are trained on with the held-out ones, each shard once, in the run folder
    `out`; small data in this process, whatever the session.

    Raises:
        RunError: some are equal; with `allowed` a warning says so instead.
    """
    held_out = each_once(held_out_splits(splits))
    if not held_out:
        return
    make_folder(out)
    trained = shards.by_name(dict.fromkeys(url for split in TRAINED for url in splits[split]))
    everything = [*trained.values(), *(url for urls in held_out.values() for url in urls)]
    with connect("local") if of_shards(everything).is_small else nullcontext(session) as where:
        settings = Settings(criteria=Criteria(near=(Near(kind="sha256"),)))
        tables, _ = compare.describe_held_out(where, held_out, settings, None, out, resources, show)
        job = compare.exact_job(settings.criteria, tables, trained, out)
        run_stage(where, job, trained, resources, show, "check held-out")
    counts = rows.merge(out, [job.name])
    if not (number := counts.samples[""]):
        return
    first = next(rows.read(out / rows.TABLE))
    found = (
        f"{number:,} samples of data.web and data.human are held-out pictures, byte for byte: the first is"
        f" {first['key']} of shard {first['shard']}, which is {first['held_out_key']} of data.{first['set']}."
    )
    if not allowed:
        raise RunError(
            f"{found} Figures on pictures that were trained on say little: data.decontaminate drops them from the web,"
            " and data.allow_contamination=true goes on as it is."
        )
    logging.getLogger(__name__).warning("%s data.allow_contamination lets it be.", found)


def held_out_splits(splits: Mapping[str, Sequence[str]]) -> dict[str, Sequence[str]]:
    """Those that no model may be trained on."""
    return {split: splits[split] for split in HELD_OUT if split in splits}


def each_once(splits: Mapping[str, Iterable[str]]) -> dict[str, list[str]]:
    """The shards of each split, without those of a split before it."""
    seen: set[str] = set()
    left: dict[str, list[str]] = {}
    for split, urls in splits.items():
        if new := [url for url in dict.fromkeys(urls) if url not in seen]:
            left[split] = new
        seen.update(new)
    return left
