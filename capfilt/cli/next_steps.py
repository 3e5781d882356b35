"""What may come after a command: other commands, with the paths of this one, that work as they are pasted."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capfilt.api.arguments import location
from capfilt.cli.terminal import say

if TYPE_CHECKING:
    import numpy as np

    from capfilt.models import Architecture
    from capfilt.storage.paths import StoragePath

Step = tuple[str, str]
"""What a command does, and the command."""

CAPTIONER, FILTER = "Salesforce/blip-image-captioning-base", "Salesforce/blip-itm-base-coco"
"""Public models for both roles, by their names on the Hugging Face hub."""
TRIAL = "blip-tiny"
"""The recipe of `pretrain` that shows within minutes whether shards can be learned from."""
TRIALS = ("vqa", "nlvr2", "entailment", "dialog")
"""Tasks with such a recipe of `finetune`."""
FIRST_ROWS = 10_000


def print_steps(steps: Iterable[Step]) -> None:
    """Each command on a line of its own, ready to be copied, below what it does."""
    for what, command in steps:
        for line in ("", f"{what}:", f"  {command}"):
            say(line)


def command(verb: str, *words: object, address: str | None = None) -> str:
    """A command line; `address` is given on, where it is not the default."""
    where = () if address in (None, "start", "by-size") else ("--address", address)
    return shlex.join(["capfilt", verb, *(_short(str(word)) for word in (*words, *where))])


def _short(word: str) -> str:
    """A path below the working directory as it is called from there."""
    return word.removeprefix(f"{Path.cwd()}/") if word.startswith("/") else word


def beside(folder: object, suffix: str) -> StoragePath:
    """A folder beside another one, or for one on a store in the working directory, that is not there yet."""
    from capfilt.storage.remote_path import RemotePath

    path = location(str(folder))
    home, name = (location("."), path.name) if isinstance(path, RemotePath) else (path.parent, path.name)
    new = home / f"{name}-{suffix}"
    number = 1
    while new.exists():
        number += 1
        new = home / f"{name}-{suffix}-{number}"
    return new


def page(folder: object, shows: str) -> Step:
    return f"see {shows}, as a page", command("report", folder)


def trial(shards: object, name: object, address: str) -> Step:
    words = (TRIAL, "--out", beside(name, "tiny"), "--set", f"data={_short(str(shards))}")
    what = "train a tiny model on them, to see that they can be learned from (minutes on two CPU cores)"
    return what, command("pretrain", *words, address=address)


def export(model: object, name: object) -> Step:
    """A model for transformers, or as its family's own code writes it."""
    from capfilt.models import family_of
    from capfilt.models.checkpoints import store

    layout = family_of(store.architecture(store.find(str(model)))).written_as
    what = "for transformers" if layout == "hf" else "by the names of its own code"
    return f"write the model {what}", command("export", model, "--as", layout, "--out", beside(name, layout))


def after_download(out: str, again: str, record: dict[str, Any], captions: bool, address: str) -> list[Step]:
    """Annotate with public models, try what failed `again`, train on what came."""
    models = ("--captioner", CAPTIONER, "--filter", FILTER)
    annotate = command("annotate", out, *models, "--out", beside(out, "annotated"), address=address)
    steps = [("write and score texts, with public models from the Hugging Face hub (2 GB, fetched once)", annotate)]
    if failed := record["samples"]["failed"]:
        steps.append((f"try the {failed:,} that failed once more", again))
    return [*steps, trial(out, out, address)] if captions else steps


def after_convert(task: str, out: str, address: str) -> list[Step]:
    """Train on what was made, where there is a tiny recipe of the task."""
    if task in ("retrieval", "captioning"):
        return [trial(out, out, address)]
    if task not in TRIALS:
        return []
    words = (f"{task}-tiny", "--out", beside(out, "tiny"), "--set", f"data={_short(out)}")
    what = "train a tiny model on them from nothing, or with --set start=MODEL from one that was pretrained"
    return [(what, command("finetune", *words, address=address))]


def after_annotate(shards: Sequence[str], out: str, address: str) -> list[Step]:
    """Select by the scores, look at them."""
    what, policy = first_policy(location(out))
    words = (*shards, "--annotations", out, "--out", beside(out, "clean"), *policy)
    return [(what, command("select", *words, address=address)), page(out, "the images with their texts and scores")]


def first_policy(folder: StoragePath) -> tuple[str, list[str]]:
    """A policy that keeps something: CapFilt's own, or the better half by the score that there is."""
    scores = {name: _scores(folder, name) for name in ("itm", "itc")}
    if share := (scores["itm"] >= 0.5).mean() if len(scores["itm"]) else 0.0:
        return (
            f"keep the texts with itm >= 0.5, as CapFilt does: {share:.0%} of the first shard's; another threshold is"
            " another such command, in seconds",
            ["--threshold", "0.5"],
        )
    score = "itc" if len(scores["itc"]) else "itm"
    why = "no text of the first shard has itm >= 0.5" if len(scores["itm"]) else "this filter gives no itm"
    return f"keep the better half of the texts by {score} ({why})", ["--score", score, "--keep-rate", "0.5"]


def _scores(folder: StoragePath, name: str) -> np.ndarray[Any, Any]:
    """A score of the texts of the first annotated shard that has any."""
    import numpy as np

    from capfilt.data import annotations
    from capfilt.storage.paths import listing

    for file in sorted(file for file in listing(folder / "annotations") if file.endswith(".parquet")):
        column = annotations.read(folder / "annotations" / file).column(name).drop_null()
        if len(column):
            return np.asarray(column.to_numpy()[:FIRST_ROWS])
    return np.empty(0)


def after_dedup(out: str) -> list[Step]:
    return [page(out, "the groups, and pairs near the radius")]


def after_select(out: str, dataset: str, address: str) -> list[Step]:
    """Look at what was kept, train on it."""
    return [page(out, "what was kept, what was dropped, and why"), trial(dataset, out, address)]


def after_pretrain(folder: str, trained: str, address: str) -> list[Step]:
    from capfilt.evaluation.tasks import TASKS
    from capfilt.models import family_of
    from capfilt.models.checkpoints import store
    from capfilt.runs.run import Run

    out, model = location(folder), location(trained)
    plan = Run.load(out).plan
    first = plan["data"][0]["shards"][0]
    objectives = plan["train"]["objectives"]
    task = str(objectives.get("task", "")).removesuffix("-classes")
    steps = [page(out, "how the losses fell")]
    if family_of(store.architecture(model)).written_as != "capfilt":
        steps.append(export(model, out))
    if task in TASKS:
        written = ("--set", "by=likelihood") if list(objectives["losses"]) == ["lm"] else ()
        what = "measure it, here on a shard that it was trained on; put held-out rows in its place"
        steps.insert(0, (what, command("evaluate", model, first, "--task", task, *written, address=address)))
    elif _roles(model):
        what = "measure it, here on a shard that it was trained on; put held-out pairs in its place"
        steps.insert(0, (what, command("evaluate", model, first, address=address)))
    return steps


def after_evaluate(model: str, shards: Sequence[str], out: str | None, address: str) -> list[Step]:
    """Let the model play its roles; look at the figures, export."""
    from capfilt.models import family_of
    from capfilt.models.checkpoints import store

    path = store.find(model)
    able, steps = _roles(path), []
    name = out or (_run_of(path) if store.layout(path) == "capfilt" else path.name)
    if able:
        roles = {"captioner": CAPTIONER, "filter": FILTER} | dict.fromkeys(able, model)
        new = beside(name, "annotated")
        words = (*shards, "--captioner", roles["captioner"], "--filter", roles["filter"], "--out", new)
        public = "" if len(able) == 2 else ", with a public model in the other role"
        what = f"let it write and score texts{public}, here for the same shards"
        steps.append((what, command("annotate", *words, address=address)))
    if out is not None:
        steps.append(page(out, "the figures"))
    ours = store.layout(path) == "capfilt" and family_of(store.architecture(path)).written_as != "capfilt"
    return [*steps, export(model, name)] if ours else steps


def _run_of(model: StoragePath) -> StoragePath:
    """The run folder that a model of ours was trained in, as far as its path says."""
    for folder in model.parents:
        if (folder / "plan.json").is_file():
            return folder
    return model


def _roles(model: StoragePath) -> list[str]:
    """The roles that a model can play."""
    from capfilt.inference.roles import NEEDS, lacking
    from capfilt.models.checkpoints import store

    able: Architecture = store.architecture(model)
    return [role for role in NEEDS if not lacking(role, able.capabilities)]


def after_export(written: Iterable[StoragePath]) -> list[Step]:
    readmes = [path / "README.md" for path in written if (path / "README.md").is_file()]
    return [("read how transformers loads it", shlex.join(["cat", *map(str, readmes)]))] if readmes else []


def after_decontaminate(out: object, record: dict[str, Any], address: str) -> list[Step]:
    """After a decontamination that found something: select without it; in any case its page."""
    steps = [page(out, "what was found and what would have been")]
    if record["samples"]["dropped"]:
        words = ("SHARDS", "--annotations", "ANNOTATIONS", "--without", out, "--out", beside(out, "clean"))
        steps.insert(0, ("select from annotated shards without them", command("select", *words, address=address)))
    return steps
