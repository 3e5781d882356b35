"""What goes out of a bootstrap's web before round 0: copies (`data.dedup`), then held-out pictures; and a last look for
these, byte for byte, which is always taken.

The web is hashed once for both, and shards that lose samples are written without them: no round trains on, captions
or scores what has gone, the baseline neither, whose figures would say less otherwise.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext

from capfilt.cluster.session import Session, connect
from capfilt.cluster.worker_pool import Resources
from capfilt.data import shards
from capfilt.errors import RunError
from capfilt.index.near import Near, parse_near
from capfilt.inference.device import Compute
from capfilt.pipelines.bootstrap.pool.data import DataConfig, DecontaminateSection
from capfilt.pipelines.near import decontaminate, dedup
from capfilt.runs.progress import Progress
from capfilt.stages.near.decontaminate import compare, rows
from capfilt.stages.near.decontaminate.compare import Settings
from capfilt.stages.near.decontaminate.criteria import Criteria
from capfilt.stages.near.embed import EmbedConfig, EmbedJob, embed
from capfilt.stages.near.leave_out import LeaveOutJob, leave_out
from capfilt.stages.runner import run_stage
from capfilt.stages.workload import of_shards
from capfilt.storage.paths import StoragePath, make_folder

TRAINED, HELD_OUT = ("web", "human"), ("test", "val")


def clean_web(
    session: Session,
    config: DataConfig,
    splits: Mapping[str, list[str]],
    folder: StoragePath,
    resources: Resources,
    show: Progress,
) -> dict[str, list[str]]:
    """The splits with the web as `config` leaves it; what is found and written lies in `folder`.

    Raises:
        DataError: nothing is left of the web, or a held-out set cannot be read.
    """
    if config.dedup is None and config.decontaminate is None:
        return dict(splits)
    named = shards.by_name(splits["web"])
    compute = Compute(device="cpu", precision="fp32")
    job = EmbedJob(out=folder / "embeddings", model=None, config=EmbedConfig(), compute=compute)
    embed(session, splits["web"], job, resources, show, "hash the web")
    without = []
    if (section := config.dedup) is not None:
        without.append(folder / "dedup")
        chosen = dedup.DedupConfig(by=parse_near(section.by), keep=section.keep, merge_texts=section.merge_texts)
        sources, out = dedup.Sources(job.out), without[-1]
        pool = dedup.pool_of(sources)
        if dedup.finished(pool, sources, chosen, out) is None:
            dedup.deduplicate(session, pool, named, sources, chosen, out, resources, show)
    if config.decontaminate is not None:
        without.append(folder / "decontaminate")
        _decontaminate(session, config.decontaminate, splits, job, without[-1], resources, show)
    work = LeaveOutJob(out=folder / "web-kept", without=tuple(without))
    return {**splits, "web": list(leave_out(session, named, work, resources, show).values())}


def _decontaminate(
    session: Session,
    section: DecontaminateSection,
    splits: Mapping[str, list[str]],
    job: EmbedJob,
    out: StoragePath,
    resources: Resources,
    show: Progress,
) -> None:
    criteria = Criteria.parse(section.by)
    more = {name: shards.expand(spec) for name, spec in section.against.items()}
    sets = each_once({**held_out_splits(splits), **more})
    settings = Settings(criteria=criteria, self_test=section.self_test)
    pool = decontaminate.pool_of(job.out, criteria).model_copy(update={"urls": shards.by_name(splits["web"])})
    described = job.model_copy(update={"out": out}) if criteria.compares_pixels else None
    tables, _ = compare.describe_held_out(session, sets, settings, described, out, resources, show)
    record = compare.compare(session, pool, tables, settings, out, resources, show)
    compare.write_record(out, record)
    show.say(compare.verdict_line(record))


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

    Only equal bytes count here: of the embedded world's pictures, drawn apart, 3 of 4,000 have the perceptual hash of a
    test picture, and a scan that decodes every web picture would cost as much as an annotation. `data.decontaminate`
    finds changed copies.

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
