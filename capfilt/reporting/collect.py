"""report: a run folder as one HTML page that needs nothing else: figures, charts, a gallery, a threshold to move.

Reads a bootstrap, finished or not, an annotate, a select, a pretrain or an evaluate; computes nothing with a model.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from capfilt import config as configs
from capfilt.data import labels, shards
from capfilt.data.policy import PolicyConfig, RankConfig
from capfilt.errors import RunError, ShardError
from capfilt.evaluation.evaluate import Truth, truths
from capfilt.reporting import gallery
from capfilt.reporting.gallery import Counted, Round, Spot, Words
from capfilt.reporting.page import MAX_ROUNDS, Facts, Look, Training
from capfilt.runs import figures
from capfilt.runs.figures import is_number
from capfilt.runs.run import Run
from capfilt.stages import inputs
from capfilt.stages.count_pairs import without_text
from capfilt.stages.select import resolve_threshold
from capfilt.storage import documents, paths
from capfilt.storage.paths import StoragePath
from capfilt.storage.remote_path import RemotePath

PAGE = "report.html"
NOT_LOSSES = {
    "step",
    "steps",
    "lr",
    "samples_per_second",
    "data_wait",
    "unreadable",
    "skipped",
    "grad_norm",
    "itm_stuck",
    "step_seconds",
    "mfu",
}


MAX_COMMAND = 1000
"""Characters of the shards that a command in the page names one by one."""


@dataclass(frozen=True)
class Gathered:
    """What the page shows, and the rows behind its texts: [look][row] -> (uid, source, text in full).

    The uid is "" where a picture could not be read, or the text is too long to be held in full.
    """

    facts: Facts
    rows: list[list[tuple[str, str, str]]]


def gather(folder: StoragePath, fetch: bool = False, web: Sequence[str] | None = None) -> Gathered:
    """Everything that the page of a run folder shows; `fetch` and `web` as in `run`."""
    opened = Run.load(folder)
    command = inputs.verb_of(opened.plan)
    events = list(_lines(folder / "log.jsonl"))
    rounds, seconds = _summary(folder, command, events)
    worked = [str(event.get("ts", "")) for event in events if event.get("event") == "worked"]
    notes: list[str] = []
    if command == "select":
        inputs.check_reachable(folder, [str(inputs.annotations_source(folder, opened.plan))], fetch)
    found = [r for r in _rounds(folder, command, opened.plan, rounds) if any(r.annotations.glob("*.parquet"))]
    urls = _urls(folder, opened.plan, fetch, web, notes) if found else {}
    looks, images, words, rows = _looks(found, urls, folder, notes)
    trainings = list(_trainings(folder))
    notes += [line for entry in rounds for line in told_of_stages(entry)]
    if bare := without_text(folder):
        notes.append(f"{bare:,} pictures have no text: they were not trained on.")
    if not (rounds or looks or trainings):
        raise RunError(f"{folder} holds nothing to show yet; give it a round, an annotated shard or a training.")
    facts = Facts(
        name=folder.absolute().name,
        command=command,
        rounds=rounds,
        seconds=seconds,
        finished=f"{worked[-1][:16].replace('T', ' ')} UTC" if worked else "",
        trainings=trainings,
        looks=looks,
        images=images,
        reasons=list(words.reasons),
        kinds=list(words.kinds),
        notes=notes,
    )
    return Gathered(facts, rows)


def next_steps(folder: StoragePath, summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What to do after a bootstrap, three commands at most: what it does, the command."""
    newest, home = summary["rounds"][-1]["round"], shlex.quote(str(folder))
    made = [*summary["rounds"][-1].get("stages", {"pretrain": None})][-1]
    model = shlex.quote(str(folder / f"round-{newest}/{made}/checkpoint"))
    exported = shlex.quote(f"{folder.name if isinstance(folder, RemotePath) else folder}-hf")
    steps = [("the newest model for transformers", f"capfilt export {model} --as hf --out {exported}")]
    if newest:
        (last,) = (found for found in _rounds(folder, "bootstrap", {}, summary["rounds"]) if found.number == newest)
        other = f"{last.select} --out {last.out}-clean --set score={last.score} --set threshold={last.threshold:.3f}"
        steps = [
            (f"say of some texts whether they are right ({folder / PAGE} with buttons)", f"capfilt review {home}"),
            ("another threshold: change the number, no model is touched", other),
            *steps,
        ]
    return steps


def told_of_stages(entry: Mapping[str, Any]) -> Iterator[str]:
    """What a round that ended in stages has of each, a line a stage."""
    places = {"TR@1": ("retrieval", "tr@1"), "IR@1": ("retrieval", "ir@1"), "CIDEr": ("captioning", "cider")}
    for stage, own in entry.get("stages", {}).items():
        found = [f"{word} {own[kind][key]:.1f}" for word, (kind, key) in places.items() if key in own.get(kind, {})]
        told = ", ".join(found) or "not measured"
        yield f"Round {entry['round']}, {stage.replace('-', ' ')} ({own['model']}): {told}."


# ---- figures that lie in the run folder ----


def _summary(
    folder: StoragePath, command: str, events: list[dict[str, Any]]
) -> tuple[list[dict[str, Any]], float | None]:
    """The entries of summary.json, or of the rounds that an unfinished run has logged; and the seconds of it all."""
    if (folder / "summary.json").is_file():
        return figures.summary(folder / "summary.json")
    if command == "evaluate" and (path := folder / "metrics.json").is_file():
        return [figures.entry({"round": 0, **documents.read_object(path)}, path)], None
    return figures.logged(events, folder / "log.jsonl"), None


def _trainings(folder: StoragePath) -> Iterator[Training]:
    """Every training's losses, kind by kind and round by round."""
    for what in ("pretrain", "captioner", "filter", "stage-*"):
        logs = [path for path in folder.glob(f"round-*/{what}/log.jsonl") if _is_round(path.parent.parent)]
        for path in sorted(logs, key=lambda p: (p.parent.name, _number(p.parent.parent))):
            yield Training(path.parent.name, _number(path.parent.parent), _losses(path))
    if found := _losses(folder / "pretrain" / "log.jsonl"):
        yield Training("pretrain", 0, found)


def _losses(path: StoragePath) -> dict[str, list[tuple[float, float]]]:
    found: dict[str, dict[float, float]] = {}
    for line in _lines(path):
        for name, value in line.items():
            if name not in NOT_LOSSES and is_number(value) and is_number(line.get("step")):
                found.setdefault(name, {})[float(line["step"])] = float(value)
    return {name: sorted(points.items()) for name, points in found.items()}


def _lines(path: StoragePath) -> Iterator[dict[str, Any]]:
    """The lines of a log, the newest ones of a very long one; one that a kill cut short is none."""
    return documents.read_json_lines(path)


def _is_round(folder: StoragePath) -> bool:
    return re.fullmatch("round-[0-9]{1,9}", folder.name) is not None


def _number(folder: StoragePath) -> int:
    return int(folder.name.removeprefix("round-"))


# ---- annotations ----


def _rounds(
    folder: StoragePath, command: str, plan: Mapping[str, Any], rounds: list[dict[str, Any]]
) -> Iterator[Round]:
    """Every round of a run that has annotations."""
    tree = configs.load(documents.check_record(folder / "recipe.yaml"))
    if command == "bootstrap":
        policy = configs.validated(PolicyConfig, tree.get("select", {}), folder / "recipe.yaml")
        entries = {entry["round"]: entry for entry in rounds}
        found = (p.parent for p in folder.glob("round-*/annotations") if _is_round(p.parent))
        for place in sorted(found, key=_number)[-MAX_ROUNDS:]:
            threshold = entries.get(_number(place), {}).get("filter", {}).get("threshold")
            yield _round(_number(place), place, place, policy, threshold, folder, inputs.web_shards(folder, tree))
    elif command == "annotate":
        yield _round(0, folder, None, PolicyConfig(), None, folder, _named(inputs.input_shards(folder, plan)))
    elif command == "select":
        policy = configs.validated(PolicyConfig, tree, folder / "recipe.yaml")
        source, web = inputs.annotations_source(folder, plan), _named(inputs.input_shards(folder, plan))
        yield _round(0, source, folder, policy, None, folder, web)


def _round(
    number: int,
    source: StoragePath,
    judged: StoragePath | None,
    policy: PolicyConfig,
    threshold: float | None,
    folder: StoragePath,
    web: list[str],
) -> Round:
    """One round; its threshold, where nobody tells it, is found as `select` finds it."""
    annotations = source / "annotations"
    if threshold is None:
        calibration = (judged or source) / "calibration.json"
        calibrated = figures.calibrated(calibration) if calibration.is_file() else 0.5
        names = sorted(path.stem for path in annotations.glob("*.parquet"))
        threshold = resolve_threshold(policy, annotations, names, calibrated)
    if sum(map(len, web)) > MAX_COMMAND:
        web = [f"the {len(web)} shards of the run"]
    words = " ".join(shlex.quote(str(word)) for word in (*web, "--annotations", source))
    suffix = f"-round-{number}" if number else ""
    dataset = judged / "dataset" if judged is not None and (judged / "dataset").is_dir() else None
    out = shlex.quote(f"{folder}{suffix}")
    rule = policy.rule(threshold)
    usual = RankConfig()
    for name in RankConfig.model_fields:
        if getattr(policy, name) != getattr(usual, name):
            words += f" --set {name}={getattr(policy, name)}"
    score, begin = (policy.rank, -1.0) if threshold is None else (policy.score, threshold)
    return Round(number, annotations, dataset, rule, score, begin, f"capfilt select {words}", out)


def _named(urls: list[str]) -> list[str]:
    """Shards as a person names them: by their folder, where they are all that is in it."""
    folders = {url.rpartition("/")[0] for url in urls}
    if len(folders) == 1 and not any("://" in url for url in urls):  # what lies elsewhere is not asked
        (only,) = folders
        if paths.storage_path(only).is_dir() and shards.expand(only) == sorted(urls):
            return [only]
    return urls


def _looks(
    rounds: list[Round], urls: Mapping[str, str], folder: StoragePath, notes: list[str]
) -> tuple[list[Look], list[tuple[str, str | None]], Words, list[list[tuple[str, str, str]]]]:
    words = Words()
    if not rounds:
        return [], [], words, []
    names = sorted({path.stem for r in rounds for path in r.annotations.glob("*.parquet")})
    drawn = gallery.chosen_shards(names)
    counted = [Counted(r, gallery.MAX_TEXTS // len(rounds), gallery.MAX_PAGE // len(rounds)) for r in rounds]
    known: dict[str, Truth] = {}
    for name in names:
        told = truths(urls[name]) if name in urls else {}
        for own in counted:
            if (own.round.annotations / f"{name}.parquet").is_file():
                own.add(name, told, name in drawn)
        if name in drawn:
            known |= told
    places: dict[Spot, int] = {}
    uids = {image.place: image for own in counted for image in own.images}
    for image in sorted(uids.values(), key=lambda image: (gallery.chance(image), image.place)):
        places[image.place] = len(places)
    thumbs = gallery.thumbnails(urls, gallery.wanted(counted), gallery.room(counted))
    said = labels.read(labels.home(folder))
    looks = [gallery.look(own, places, known, said, words) for own in counted]
    rows = [
        [
            ("" if (row.source, row.candidate) in image.cut else row.uid, row.source, row.text)
            for image in own.images
            for row, _ in image.rows
        ]
        for own in counted
    ]
    _tell(counted, len(names), len(drawn), (len(thumbs), len(places)), notes)
    return looks, [(key, thumbs.get((shard, key))) for shard, key in places], words, rows


def _urls(
    folder: StoragePath, plan: Mapping[str, Any], fetch: bool, web: Sequence[str] | None, notes: list[str]
) -> dict[str, str]:
    """The web's shards by name; none, and a note, where they are not there any more, or not to be fetched."""
    try:
        if web is None:
            web = inputs.input_shards(folder, plan)
            inputs.check_reachable(folder, web, fetch)
        return inputs.urls_by_name(plan, shards.expand(web))
    except (ShardError, RunError) as error:
        notes.append(f"No pictures and no truth: {error}")
        return {}


def _tell(counted: list[Counted], num_shards: int, num_drawn: int, thumbs: tuple[int, int], notes: list[str]) -> None:
    """Say what of the run is in the page."""
    total = sum(sum(own.totals.values()) for own in counted)
    here = sum(own.num_rows for own in counted)
    if here < total:
        of = f" of {num_drawn} of the {num_shards} shards" if num_drawn < num_shards else ""
        notes.append(
            f"Tables and histograms count all {total:,} texts. The gallery and the live figures hold {here:,} of them:"
            f" those of {thumbs[1]:,} images drawn at random{of}."
        )
    else:
        notes.append(f"Tables, histograms, live figures and gallery hold all {total:,} texts.")
    if thumbs[0] < thumbs[1]:
        notes.append(
            f"{thumbs[0]:,} of {thumbs[1]:,} images have a thumbnail: the closest calls, and others at random."
        )
