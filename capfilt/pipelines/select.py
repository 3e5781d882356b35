"""select: a policy turns annotations into a cleaned dataset; no model is asked again."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import capfilt.data.annotations as tables
from capfilt import config as configs
from capfilt.cluster.session import connect
from capfilt.data import labels, shards
from capfilt.data.policy import PolicyConfig
from capfilt.errors import DataError, UsageError
from capfilt.inference.device import Precision
from capfilt.inference.filters.fusion import NEEDS
from capfilt.models.checkpoints import store
from capfilt.runs.progress import Progress
from capfilt.runs.run import Run
from capfilt.stages import inputs
from capfilt.stages.annotate import AnnotateConfig, check_role
from capfilt.stages.calibrate import CalibrateJob, calibrate, calibrate_on_labels
from capfilt.stages.compute import ComputeRequest, decide
from capfilt.stages.count_pairs import contents_of
from capfilt.stages.runner import CommandOptions
from capfilt.stages.select import SelectJob, check_selected, resolve_threshold, select
from capfilt.storage import documents
from capfilt.storage.atomic import write_json
from capfilt.storage.paths import StoragePath, listing


@dataclass(frozen=True)
class ThresholdSource:
    """What a threshold may be set on: validation pairs and the filter, or what people said under `capfilt review`."""

    val: str | None = None
    filter: str | None = None
    labels: bool = False


def run(
    address: str,
    specs: Sequence[str],
    source: StoragePath,
    out: StoragePath,
    sets: Sequence[str],
    calibration: ThresholdSource,
    show: Progress,
    recipe: str | None = None,
    options: CommandOptions | None = None,
) -> dict[str, Any]:
    """The verb: judge annotated shards by a policy and write the cleaned ones into a run folder of its own."""
    options = options or CommandOptions()
    own = policy_by_labels(sets, calibration) if calibration.labels else sets
    policy = configs.named(PolicyConfig, recipe, own)
    urls = shards.expand(specs)
    if (home := labels.home(source) / "plan.json").is_file():
        Run.load(home.parent)  # refuses what leads out of it
    folder, named = source / "annotations", inputs.as_annotated(source, urls)
    check_annotations(named, folder)
    said = calibrate_on_labels(source, named, policy) if calibration.labels else None
    asked = None if said else plan_calibration(policy, calibration, folder / f"{next(iter(named))}.parquet")
    plan = {
        "verb": "select",
        **policy.model_dump(mode="json"),
        "shards": urls,
        "annotations": str(source.absolute()),
        "calibration": said if asked is None else {**asked, "model": str(asked["model"])},
    }
    if renamed := shards.renamed(named):
        plan["names"] = renamed
    opened = Run.open(out, configs.to_yaml(policy), plan)
    if said:
        write_json(opened.path("calibration.json"), said)
    with connect(address) as session:
        calibrated = (said or {}).get("threshold")
        if asked is not None:
            worker = options.model_copy(update={"gpus": None}).resources(session)
            batch_size, precision = scored_with(source)
            compute = decide(session, opened, {"calibrate": ComputeRequest(precision, worker)}, show)["calibrate"]
            known = contents_of(session, asked["shards"], {}, out.absolute(), show)
            job = CalibrateJob(out=out.absolute(), **asked, contents=known, batch_size=batch_size, compute=compute)
            calibrated = calibrate(session, job, worker, show)
        threshold = resolve_threshold(policy, folder, named, calibrated)
        rule = policy.rule(threshold)
        work = SelectJob(out=out.absolute(), annotations=folder.absolute(), rule=rule, carry=policy.carry)
        tally = select(session, named, work, options.resources(session), show)
    number = {} if threshold is None else {"threshold": threshold}
    found = {"dataset": str(out / "dataset"), **number, **tally.to_json()}
    result = found | ({"labels": said["labels"]} if said else {})
    check_selected("select", tally, work.rule, options.min_success, result)
    return result


def policy_by_labels(sets: Sequence[str], calibration: ThresholdSource) -> list[str]:
    """What `--calibrate labels` sets; what would say another threshold beside it is refused."""
    if (
        any(assignment.partition("=")[0].strip() == "threshold" for assignment in sets)
        or calibration.val
        or calibration.filter
    ):
        raise UsageError("--calibrate labels sets the threshold itself; leave out threshold=..., --val and --filter.")
    return [*sets, "threshold=calibrated"]


def check_annotations(names: Iterable[str], folder: StoragePath) -> None:
    """Refuse shards that were not annotated."""
    if not folder.is_dir():
        raise DataError(
            f"{folder.parent} holds no annotations/; give the --out of `capfilt annotate` or a round of a bootstrap."
        )
    there = listing(folder)
    for name in names:
        if f"{name}.parquet" not in there:
            raise DataError(f"shard {name} has no annotations in {folder}; annotate it first.")


def plan_calibration(
    policy: PolicyConfig, calibration: ThresholdSource, annotated: StoragePath
) -> dict[str, Any] | None:
    """The calibration that a policy asks for, as fields of its job. A threshold holds for the filter that it was
    measured with alone."""
    if policy.threshold != "calibrated":
        return None
    val, judge = calibration.val, calibration.filter
    if val is None or judge is None:
        raise UsageError("threshold=calibrated needs --val SHARDS and --filter MODEL; or set threshold to a number.")
    model = store.find(judge)
    check_role("filter", model, NEEDS)
    used = {row.filter for row in tables.rows(tables.read(annotated)) if row.filter}
    if used - {store.fingerprint(model)}:
        raise UsageError(f"{annotated} was scored by another filter than {judge}; give the one that scored it.")
    return {
        "model": model,
        "shards": tuple(shards.expand(val)),
        "score": policy.score,
        "recall": policy.recall,
        "max_length": scoring(annotated.parent.parent).max_length,
    }


def scoring(source: StoragePath) -> AnnotateConfig:
    """How annotations were scored: by the recipe of `capfilt annotate`, or of the bootstrap whose round they are."""
    for file, section in ((source / "recipe.yaml", None), (source.parent / "recipe.yaml", "annotate")):
        if file.is_file():
            tree = configs.load(documents.checked(file))
            return configs.validated(AnnotateConfig, tree.get(section, {}) if section else tree, file)
    return AnnotateConfig()


def scored_with(source: StoragePath) -> tuple[int, Precision]:
    """The batch size of annotations, and the format in which they were scored: as their run chose it, if it says so."""
    config = scoring(source)
    for folder in (source, source.parent):
        if (folder / "plan.json").is_file() and (record := Run.load(folder).decided("annotate")) is not None:
            return config.batch_size, "bf16" if record["precision"] == "bf16" else "fp32"
    return config.batch_size, config.precision
