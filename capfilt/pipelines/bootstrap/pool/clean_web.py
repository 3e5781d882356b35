"""What goes out of a bootstrap's web before round 0: copies (`data.dedup`), then held-out pictures.

The web is hashed once for both, and shards that lose samples are written without them: no round trains on, captions
or scores what has gone, the baseline neither, whose figures would say less otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping

from capfilt.cluster.session import Session
from capfilt.cluster.worker_pool import Resources
from capfilt.data import shards
from capfilt.index.near import parse_near
from capfilt.inference.device import Compute
from capfilt.pipelines.bootstrap.pool.contamination import each_once, held_out_splits
from capfilt.pipelines.bootstrap.pool.data import DataConfig, DecontaminateSection
from capfilt.pipelines.near import decontaminate, dedup
from capfilt.runs.progress import Progress
from capfilt.stages.near.decontaminate import compare
from capfilt.stages.near.decontaminate.compare import Settings
from capfilt.stages.near.decontaminate.criteria import Criteria
from capfilt.stages.near.embed import EmbedConfig, EmbedJob, embed
from capfilt.stages.near.leave_out import LeaveOutJob, leave_out
from capfilt.storage.paths import StoragePath


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
        dedup.deduplicate(session, named, dedup.Sources(job.out), chosen, without[-1], resources, show)
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
