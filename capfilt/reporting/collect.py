"""Collects what the page of a run folder shows: figures, losses, annotations with pictures.

Reads the run folder of a bootstrap, finished or not, an annotate, a select, a pretrain or an evaluate; runs no model.
"""

from __future__ import annotations

import contextlib
import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic_core import to_jsonable_python

import capfilt.data.annotations as tables
from capfilt import config as configs
from capfilt.data import labels, shards
from capfilt.data.policy import PolicyConfig, Pool, RankConfig, Rule, resolve, score_range
from capfilt.errors import RunError, ShardError
from capfilt.models import FAMILIES
from capfilt.reporting.counts import SCORE_RANGES
from capfilt.reporting.gallery import TextKey, make_gallery
from capfilt.reporting.near import contamination
from capfilt.reporting.page_data import MAX_ROUNDS, AnnotatedRound, PageData, Training, Usage
from capfilt.reporting.sampling import RoundSource
from capfilt.reporting.sections import HUMAN_AUC
from capfilt.runs import cost, round_figures, stage_status
from capfilt.runs.cost import Price
from capfilt.runs.round_figures import is_number
from capfilt.runs.run import Run
from capfilt.stages import inputs
from capfilt.stages.count_pairs import num_without_text
from capfilt.stages.resolve import read_rule
from capfilt.storage import documents
from capfilt.storage.paths import StoragePath, storage_path
from capfilt.storage.remote_path import RemotePath
from capfilt.yaml_loader import load_yaml

PAGE = "report.html"
LOG_FIELDS = {
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
"""What the log of a training has beside losses."""
DECONTAMINATE = "decontaminate"
"""The verb, and the folder in the data of a bootstrap that did the same."""
WITHOUT_PAGE = ("convert", "download", "embed", "export", "pack")
"""The verbs whose run folders have no page."""
MAX_COMMAND = 1000
"""Characters of shards in a command of the page; longer lists are put into braces, else summed up in words."""


@dataclass(frozen=True)
class Report:
    """What the page shows, and which text each of its rows is: `texts[annotated round][row]`."""

    page: PageData
    texts: list[list[TextKey]]


@dataclass(frozen=True)
class RunRecord:
    """What a run folder says of itself, and where its annotations and their pictures lie."""

    folder: StoragePath
    command: str
    plan: Mapping[str, Any]
    events: Sequence[Mapping[str, Any]]
    """The lines of log.jsonl."""
    rounds: list[dict[str, Any]]
    """The entries of summary.json, else of the rounds that an unfinished run has logged."""
    seconds: float | None
    sources: list[RoundSource]
    """Every round that has annotations, in order."""
    urls: dict[str, str]
    """The URL of each annotated shard by its name; empty, with a note, where they are gone or may not be fetched."""


def read_run(folder: StoragePath, fetch: bool, web: Sequence[str] | None, notes: list[str]) -> RunRecord:
    """Read a run folder; adds to `notes` why there are no pictures. Arguments and errors as in `collect_report`."""
    run = Run.load(folder)
    command = inputs.verb_of(run.plan)
    if command in WITHOUT_PAGE:
        raise RunError(
            f"{folder} is a run of {command}, which has no page: `capfilt status` tells how far it is, `capfilt"
            " explain` what became of an image."
        )
    events = list(documents.read_json_lines(folder / "log.jsonl"))
    rounds, seconds = _summary(folder, command, events)
    if command == "select":
        inputs.check_reachable(folder, [str(inputs.annotations_source(folder, run.plan))], fetch)
    sources = [s for s in _sources(folder, command, run.plan, rounds) if any(s.annotations.glob("*.parquet"))]
    urls = _urls(folder, run.plan, fetch, web, notes) if sources else {}
    return RunRecord(folder, command, run.plan, events, rounds, seconds, sources, urls)


def collect_report(
    folder: StoragePath, fetch: bool = False, web: Sequence[str] | None = None, price: Price | None = None
) -> Report:
    """Everything that the page of a run folder shows; with a price also what it costs.

    `fetch` allows to read shards that the run's plan names on other machines; `web` says where the shards lie, instead
    of the plan, which holds no secrets of an address. RunError for a folder that has nothing to show.
    """
    notes: list[str] = []
    run = read_run(folder, fetch, web, notes)
    worked = [str(event.get("ts", "")) for event in run.events if event.get("event") == "worked"]
    given_labels = labels.read(labels.run_folder_of(folder)) if run.sources else {}
    gallery = make_gallery(run.sources, run.urls, given_labels)
    rounds = [_with_human_auc(entry, gallery.rounds) for entry in run.rounds]
    trainings = list(_trainings(folder))
    notes += gallery.notes
    notes += [f"Round {each.number}: {line}" for each in run.sources if (line := _fixed_parts(each.rule))]
    notes += [line for entry in rounds for line in stage_lines(entry)]
    if num_bare := num_without_text(folder):
        notes.append(f"{num_bare:,} pictures have no text: they were not trained on.")
    found = contamination.read(folder if run.command == DECONTAMINATE else folder / "data" / DECONTAMINATE)
    if not (rounds or gallery.rounds or trainings or found):
        raise RunError(f"{folder} holds nothing to show yet; give it a round, an annotated shard or a training.")
    page = PageData(
        name=folder.absolute().name,
        command=run.command,
        rounds=rounds,
        seconds=run.seconds,
        finished=f"{worked[-1][:16].replace('T', ' ')} UTC" if worked else "",
        trainings=trainings,
        annotated_rounds=gallery.rounds,
        images=gallery.images,
        identities=gallery.identities,
        reasons=list(gallery.lists.reasons),
        kinds=list(gallery.lists.kinds),
        notes=notes,
        usage=_usage(folder, price),
        contamination=found,
    )
    return Report(page, gallery.texts)


def _usage(folder: StoragePath, price: Price | None) -> Usage:
    """What the stages used, as a table, and a line of what that costs."""
    stands = [stage_status.read_status(ledger) for ledger in stage_status.find_ledgers(folder)]
    records = [{"label": stand.plan.label, **cost.stage_figures(stand, price)} for stand in stands]
    headings, rows = cost.table_of_usage([record for record in records if "usage" in record])
    return Usage(headings, rows, [] if price is None else list(cost.lines(cost.run_cost(stands, price))))


def next_steps(folder: StoragePath, summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What to do after a bootstrap, three commands at most: what it does, the command."""
    newest, home = summary["rounds"][-1]["round"], shlex.quote(str(folder))
    made = [*summary["rounds"][-1].get("stages", {"pretrain": None})][-1]
    model = shlex.quote(str(folder / f"round-{newest}/{made}/checkpoint"))
    layout = FAMILIES[Run.load(folder).plan["architecture"]["family"]].written_as
    exported = shlex.quote(f"{folder.name if isinstance(folder, RemotePath) else folder}-{layout}")
    what = "for transformers" if layout == "hf" else "by the names of its own code"
    steps = [(f"the newest model {what}", f"capfilt export {model} --as {layout} --out {exported}")]
    if newest:
        (last,) = (s for s in _sources(folder, "bootstrap", {}, summary["rounds"]) if s.number == newest)
        policy = f"--set score={last.score} --set threshold={last.threshold:.3f}"
        select = f"{last.select_command} --out {last.out_prefix}-clean {policy}"
        steps = [
            (f"say of some texts whether they are right ({folder / PAGE} with buttons)", f"capfilt review {home}"),
            ("another threshold: change the number, no model is run", select),
            *steps,
        ]
    return steps


def stage_lines(entry: Mapping[str, Any]) -> Iterator[str]:
    """One line for each stage of a round that ended in several (BLIP-2): its model and its figures."""
    names = {"TR@1": ("retrieval", "tr@1"), "IR@1": ("retrieval", "ir@1"), "CIDEr": ("captioning", "cider")}
    for stage, record in entry.get("stages", {}).items():
        measured = [
            f"{name} {record[kind][key]:.1f}" for name, (kind, key) in names.items() if key in record.get(kind, {})
        ]
        text = ", ".join(measured) or "not measured"
        yield f"Round {entry['round']}, {stage.replace('-', ' ')} ({record['model']}): {text}."


# ---- figures and losses ----


def _summary(
    folder: StoragePath, command: str, events: list[dict[str, Any]]
) -> tuple[list[dict[str, Any]], float | None]:
    """The entries of summary.json, else of the rounds that an unfinished run has logged; and the seconds of the run."""
    if (folder / "summary.json").is_file() and command != DECONTAMINATE:
        return round_figures.read_summary(folder / "summary.json")
    if command == "evaluate" and (path := folder / "metrics.json").is_file():
        return [round_figures.check_round({"round": 0, **documents.read_object(path)}, path)], None
    return round_figures.logged_rounds(events, folder / "log.jsonl"), None


def _with_human_auc(entry: dict[str, Any], annotated: Sequence[AnnotatedRound]) -> dict[str, Any]:
    """The figures of a round with those of its filter on human pairs, by the score that the round's policy uses."""
    for each in annotated:
        if each.round == entry["round"] and (area := each.human_auc.get(each.score)) is not None:
            return {**entry, "filter": {**entry.get("filter", {}), HUMAN_AUC: area}}
    return entry


def _trainings(folder: StoragePath) -> Iterator[Training]:
    """The losses of every training, by kind and round."""
    for what in ("pretrain", "captioner-pretrain", "captioner", "filter-pretrain", "filter", "stage-*"):
        logs = [path for path in folder.glob(f"round-*/{what}/log.jsonl") if _is_round(path.parent.parent)]
        for path in sorted(logs, key=lambda p: (p.parent.name, _number(p.parent.parent))):
            yield Training(path.parent.name, _number(path.parent.parent), _losses(path))
    if losses := _losses(folder / "pretrain" / "log.jsonl"):
        yield Training("pretrain", 0, losses)


def _losses(path: StoragePath) -> dict[str, list[tuple[float, float]]]:
    losses: dict[str, dict[float, float]] = {}
    for line in documents.read_json_lines(path):  # of a very long one the newest
        for name, value in line.items():
            if name not in LOG_FIELDS and is_number(value) and is_number(line.get("step")):
                losses.setdefault(name, {})[float(line["step"])] = float(value)
    return {name: sorted(points.items()) for name, points in losses.items()}


def _is_round(folder: StoragePath) -> bool:
    return re.fullmatch("round-[0-9]{1,9}", folder.name) is not None


def _number(folder: StoragePath) -> int:
    return int(folder.name.removeprefix("round-"))


# ---- annotations ----


def _sources(
    folder: StoragePath, command: str, plan: Mapping[str, Any], rounds: list[dict[str, Any]]
) -> Iterator[RoundSource]:
    """Every round of a run that has annotations."""
    recipe = load_yaml(documents.check_record(folder / "recipe.yaml"))
    if command == "bootstrap":
        policy = configs.validate(PolicyConfig, recipe.get("select", {}), folder / "recipe.yaml")
        entries = {entry["round"]: entry for entry in rounds}
        homes = (path.parent for path in folder.glob("round-*/annotations") if _is_round(path.parent))
        for home in sorted(homes, key=_number)[-MAX_ROUNDS:]:
            threshold = entries.get(_number(home), {}).get("filter", {}).get("threshold")
            web = inputs.web_shards(folder, recipe)
            yield _source(_number(home), (home, home), policy, threshold, folder, web)
    elif command == "annotate":
        web = _by_folder(inputs.input_shards(folder, plan))
        yield _source(0, (folder, None), PolicyConfig(), None, folder, web)
    elif command == "select":
        policy = configs.validate(PolicyConfig, recipe, folder / "recipe.yaml")
        web = _by_folder(inputs.input_shards(folder, plan))
        yield _source(0, (inputs.annotations_source(folder, plan), folder), policy, None, folder, web)


def _source(
    number: int,
    homes: tuple[StoragePath, StoragePath | None],
    policy: PolicyConfig,
    threshold: float | None,
    folder: StoragePath,
    web: list[str],
) -> RoundSource:
    """One round. `homes`: what holds its annotations/ and, where there are verdicts, its dataset/; a threshold of None
    is determined as `select` determines it."""
    source, selected = homes
    annotations = source / "annotations"
    if threshold is None and policy.threshold == "calibrated":
        calibration = (selected or source) / "calibration.json"
        threshold = round_figures.read_threshold(calibration) if calibration.is_file() else 0.5
    names = tables.shards_in(annotations)
    kept = read_rule(selected) if selected is not None else None
    pool = Pool(annotations, names, policy.sources)
    rule = (resolve(policy, pool, threshold) if kept is None else kept[1]).rule
    ranges = SCORE_RANGES
    dataset = selected / "dataset" if selected is not None and (selected / "dataset").is_dir() else None
    suffix = f"-round-{number}" if number else ""
    score = rule.score if rule.threshold is not None else rule.rank
    if score not in ranges:
        low, high = score_range(score, pool, rule.fused)
        ranges = {**ranges, score: (low, high if high > low else low + 1.0)}
    return RoundSource(
        number=number,
        annotations=annotations,
        dataset=dataset,
        rule=rule,
        score=score,
        threshold=ranges[score][0] if rule.threshold is None else rule.threshold,
        select_command=_select_command(web, source, policy),
        out_prefix=shlex.quote(f"{folder}{suffix}"),
        ranges=ranges,
        human_auc=round_figures.read_human_auc(source) | (round_figures.read_human_auc(selected) if selected else {}),
    )


def _fixed_parts(rule: Rule) -> str:
    """What of a policy the page does not move with its threshold; "" for nothing."""
    parts = [f"top_k={rule.top_k}"] * bool(rule.top_k) + [f"keep={rule.keep}"] * (rule.keep != "all")
    if not parts:
        return ""
    return (
        f"with another threshold the gallery and the live figures still leave out what {', '.join(parts)} has left out"
        " at the policy's own; the command decides anew."
    )


def _select_command(web: list[str], source: StoragePath, policy: PolicyConfig) -> str:
    """The command that selects from these annotations, without its threshold and its --out."""
    many = f"the {len(web)} shards of the run"
    if sum(map(len, web)) > MAX_COMMAND and sum(map(len, web := _in_braces(web))) > MAX_COMMAND:
        web = [many]
    words = " ".join(shlex.quote(str(word)) for word in (*web, "--annotations", source))
    default = PolicyConfig()
    for name in (*RankConfig.model_fields, "fused", "normalise"):
        if (value := getattr(policy, name)) != getattr(default, name):
            written = value if isinstance(value, str) else json.dumps(to_jsonable_python(value))
            words += " --set " + shlex.quote(f"{name}={written}")
    return f"capfilt select {words}"


def _by_folder(urls: list[str]) -> list[str]:
    """Shards as a user would name them: by their folders, if they are all that is in these."""
    folders = sorted({url.rpartition("/")[0] for url in urls})
    if not any("://" in url for url in urls):  # stores are not asked
        with contextlib.suppress(ShardError):  # all of them are gone
            if all(storage_path(one).is_dir() for one in folders) and sorted(shards.expand(folders)) == sorted(urls):
                return folders
    return urls


def _in_braces(urls: list[str]) -> list[str]:
    """Shards that differ by a number alone as one pattern each, `web/{00000..00999}.tar`; others as they are."""
    runs: dict[tuple[str, str, int, int], list[str]] = {}
    for place, url in enumerate(sorted(urls, key=lambda url: (len(url), url))):
        numbered = re.fullmatch(r"([^{},]*?)(\d+)([^\d{},]*(?:\.tar\.bz2)?)", url)
        if numbered is None:
            runs["", url, 0, 0] = [url]
            continue
        before, digits, after = numbered.groups()
        runs.setdefault((before, after, len(digits), int(digits) - place), []).append(digits)
    return [
        f"{before}{{{run[0]}..{run[-1]}}}{after}" if run[1:] else f"{before}{run[0] if width else ''}{after}"
        for (before, after, width, _), run in runs.items()
    ]


def _urls(
    folder: StoragePath, plan: Mapping[str, Any], fetch: bool, web: Sequence[str] | None, notes: list[str]
) -> dict[str, str]:
    """The URLs of the web shards by name; empty, with a note, if they are gone or may not be fetched."""
    try:
        if web is None:
            web = inputs.input_shards(folder, plan)
            inputs.check_reachable(folder, web, fetch)
        return inputs.urls_by_name(plan, shards.expand(web))
    except (ShardError, RunError) as error:
        notes.append(f"No pictures and no truth: {error}")
        return {}
