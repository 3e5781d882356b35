"""select: apply a policy to annotations and write a cleaned dataset; no model is run, but for a calibration."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import capfilt.data.annotations as tables
from capfilt import config as configs
from capfilt.cluster.session import Session
from capfilt.data import duplicates, labels, scores, shards
from capfilt.data.policy import PolicyConfig, Pool, Resolved, check_calibrated, check_further, check_scores
from capfilt.errors import DataError, FolderError, UsageError
from capfilt.inference.config import AnnotateConfig, Precision
from capfilt.inference.roles import check_filter
from capfilt.models.checkpoints import store
from capfilt.runs.progress import Progress
from capfilt.runs.run import Run, verb_of
from capfilt.runs.tally import Tally
from capfilt.stages import inputs
from capfilt.stages.annotation.calibrate import CalibrateJob, calibrate, calibrate_on_labels
from capfilt.stages.compute import ComputeRequest, decide
from capfilt.stages.count_pairs import shard_digests
from capfilt.stages.resolve import resolve_once
from capfilt.stages.select import SelectJob, check_selected, select
from capfilt.stages.workload import Place, of_selection
from capfilt.storage import documents
from capfilt.storage.atomic import write_json
from capfilt.storage.paths import StoragePath, listing
from capfilt.yaml_loader import load_yaml


@dataclass(frozen=True)
class ThresholdSource:
    """What a threshold is calibrated on: human validation pairs and the filter, or labels given in `capfilt review`."""

    val: str | None = None
    """Shards of human pairs."""
    filter: str | None = None
    """A model folder."""
    labels: bool = False


def run(
    place: Place,
    specs: Sequence[str],
    source: StoragePath,
    policy: PolicyConfig,
    calibration: ThresholdSource,
    without: StoragePath | None = None,
) -> dict[str, Any]:
    """The verb: apply a policy to annotated shards and write the cleaned ones into a new run folder.

    `specs` names the shards, `source` is the folder that holds their annotations/, `without` the run folder of a
    deduplication whose copies go. Returns the dataset's folder, the threshold and the counts.
    """
    out, show = place.out, place.show
    urls = shards.expand(specs)
    if (home := labels.run_folder_of(source) / "plan.json").is_file():
        Run.load(home.parent)  # refuses links that lead out of it
    folder, urls_by_name = source / "annotations", inputs.annotated_urls_by_name(source, urls)
    check_annotations(urls_by_name, folder)
    if without is not None:
        duplicates.check_shards(without, urls_by_name)
    first = folder / f"{next(iter(urls_by_name))}.parquet"
    check_given_scores(policy, first)
    by_labels = calibrate_on_labels(source, urls_by_name, policy) if calibration.labels else None
    by_val = None if by_labels else plan_calibration(policy, calibration, first)
    plan = {
        "verb": "select",
        **policy.record(),
        "shards": urls,
        "annotations": str(source.absolute()),
        "calibration": by_labels if by_val is None else {**by_val, "model": str(by_val["model"])},
    }
    if renamed := shards.renamed(urls_by_name):
        plan["names"] = renamed
    if without is not None:
        plan["without"] = str(without.absolute())
    opened = Run.open(out, configs.to_yaml(policy), plan)
    if by_labels:
        write_json(opened.path("calibration.json"), by_labels)
    with place.connect("select", of_selection(folder, urls_by_name)) as (session, worker):
        calibrated = (by_labels or {}).get("threshold")
        if by_val is not None:
            calibrated = _calibrate(session, opened, by_val, source, place)
        pool = Pool(folder, list(urls_by_name), policy.sources, without)
        resolved = resolve_once(session, policy, pool, calibrated, out, worker, show)
        _record_pool(opened, resolved, show)
        job = {"out": out.absolute(), "annotations": folder.absolute(), "without": without and without.absolute()}
        work = SelectJob(**job, rule=resolved.rule, carry=policy.carry)
        tally = select(session, urls_by_name, work, worker, show)
    result = _result(out, resolved, tally) | ({"labels": by_labels["labels"]} if by_labels else {})
    check_selected("select", tally, work.rule, place.options.min_success, result)
    return result


def _result(out: StoragePath, resolved: Resolved, tally: Tally) -> dict[str, Any]:
    """The dataset's folder, the threshold, the counts, and what a share came to."""
    threshold = resolved.rule.threshold
    share = {name: value for name, value in resolved.pool.items() if name != "fused"}
    result = {"dataset": str(out / "dataset")} | ({} if threshold is None else {"threshold": threshold})
    return result | tally.to_json() | ({"pool": share} if share else {})


POOLS = {"texts": "texts", "web": "texts that came with the images", "images": "images"}
"""What a share is of, in words."""


def _record_pool(run: Run, resolved: Resolved, show: Progress) -> None:
    """Say what a share came to, and keep it in the run folder with the constants of a fused score."""
    pool = resolved.pool
    if not pool:
        return
    path = run.path("pool.json")
    if not path.is_file() or documents.read_object(path) != pool:
        write_json(path, pool)
    if "samples_seen" in pool:
        show.say(
            f"{pool['keep_rate']:.1%} of {pool['size']:,} {POOLS[pool['of']]}: so {pool['samples_seen']:,} samples are"
            f" each of them {pool['repeats']:.2f} times"
        )


def _calibrate(session: Session, run: Run, fields: dict[str, Any], source: StoragePath, place: Place) -> float:
    """The threshold that human pairs give, scored in the same precision as the annotations of `source`."""
    worker, show = place.options.model_copy(update={"gpus": None}).resources(session), place.show
    batch_size, precision = scored_with(source)
    compute = decide(session, run, {"calibrate": ComputeRequest(precision, worker)}, show)["calibrate"]
    out = run.folder.absolute()
    contents = shard_digests(session, fields["shards"], {}, out, show)
    job = CalibrateJob(out=out, **fields, contents=contents, batch_size=batch_size, compute=compute)
    return calibrate(session, job, worker, show)


def _in_place_of_annotations(source: StoragePath) -> str:
    """What a folder is that holds no annotations/, and what to give instead."""
    verb, rounds = verb_of(source), []
    if isinstance(source, Path):
        rounds = sorted(source.glob("round-*/annotations"), key=lambda path: (len(path.parent.name), path.parent.name))
    if rounds:
        return f"is the run folder of a `capfilt {verb}`, with annotations of each round: give {rounds[-1].parent}."
    what = f"is the run folder of a `capfilt {verb}` and holds" if verb else "holds"
    return f"{what} no annotations/; give the --out of `capfilt annotate` or a round of a bootstrap."


def check_annotations(names: Iterable[str], folder: StoragePath) -> None:
    """Raise FolderError for a folder without annotations/, DataError for a shard that has none there."""
    if not folder.is_dir():
        raise FolderError(f"{folder.parent} {_in_place_of_annotations(folder.parent)}")
    files = listing(folder)
    for name in names:
        if f"{name}.parquet" not in files:
            raise DataError(f"shard {name} has no annotations in {folder}; annotate it first.")


def check_given_scores(policy: PolicyConfig, annotated: StoragePath) -> None:
    """Refuse a policy by a score that the filter did not give to a shard's texts, where it gave them another; by one
    that was not added to the run; and by languages that cannot be told here."""
    policy.rules.check()
    run = annotated.parent.parent
    how = f"Add it: capfilt annotate --add-score SPEC --out {run} (docs/scores.md)."
    check_further(policy.used_scores, scores.names(run), run, how)
    table = tables.read(annotated, only=["itm", "itc"])
    given = [score for score in ("itm", "itc") if table.column(score).null_count < table.num_rows]
    if given:
        check_scores(policy.needed_scores, given, f"the filter of {annotated.parent}")


def plan_calibration(
    policy: PolicyConfig, calibration: ThresholdSource, annotated: StoragePath
) -> dict[str, Any] | None:
    """The calibration that a policy needs, as fields of `CalibrateJob`; None if it needs none.

    UsageError if the filter is not the one that scored the texts: a threshold holds for one filter only.
    """
    if policy.threshold != "calibrated":
        return None
    check_calibrated(policy.score)
    val, filter_model = calibration.val, calibration.filter
    if val is None or filter_model is None:
        raise UsageError("threshold=calibrated needs --val SHARDS and --filter MODEL; or set threshold to a number.")
    model = store.find(filter_model)
    check_filter(model, [policy.score])
    used = {row.filter for row in tables.rows(tables.read(annotated)) if row.filter}
    if used - {store.fingerprint(model)}:
        raise UsageError(f"{annotated} was scored by another filter than {filter_model}; give the one that scored it.")
    return {
        "model": model,
        "shards": tuple(shards.expand(val)),
        "score": policy.score,
        "recall": policy.recall,
        "max_length": scoring(annotated.parent.parent).max_length,
    }


def scoring(source: StoragePath) -> AnnotateConfig:
    """The settings with which annotations were scored: those of `capfilt annotate`, or of their bootstrap."""
    for file, section in ((source / "recipe.yaml", None), (source.parent / "recipe.yaml", "annotate")):
        if file.is_file():
            tree = load_yaml(documents.check_record(file))
            fields = tree.get(section, {}) if section else tree
            return configs.validate(AnnotateConfig, {key: fields[key] for key in fields if key != "scores"}, file)
    return AnnotateConfig()


def scored_with(source: StoragePath) -> tuple[int, Precision]:
    """The batch size and the precision with which annotations were scored: what their run recorded, else its recipe."""
    config = scoring(source)
    for folder in (source, source.parent):
        if (folder / "plan.json").is_file() and (record := Run.load(folder).decided("annotate")) is not None:
            return config.batch_size, "bf16" if record["precision"] == "bf16" else "fp32"
    return config.batch_size, config.precision
