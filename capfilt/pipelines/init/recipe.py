"""init: the recipes that fit some data and a machine, as YAML with comments: written once, then a person's own.

With human pairs it is one recipe of the whole loop; without, CapFilt has nothing to train on, and it is one for
`annotate` and one for `select`, with two models that are there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from capfilt import config as configs
from capfilt import presets
from capfilt.config import tree_to_yaml, value_to_yaml
from capfilt.data.policy import PolicyConfig
from capfilt.errors import UsageError
from capfilt.pipelines.init.profile import SMALL, Profile, look
from capfilt.pipelines.inspect.machine import Machine
from capfilt.printable import printable
from capfilt.runs.progress import Progress
from capfilt.storage.atomic import atomic
from capfilt.yaml_loader import load_yaml

CAPTIONER, FILTER = "Salesforce/blip-image-captioning-base", "Salesforce/blip-itm-base-coco"
"""Public models for both roles, where none are given."""
BERT = Path("bert-base-uncased", "vocab.txt")
"""The vocabulary of the preset `blip`."""
FEW = 2_000
"""Pictures up to which the work itself is done before an estimate would be worth it."""
TRAINED_ON = 32
"""GPUs that the preset `blip` is for."""


@dataclass(frozen=True)
class Answers:
    """What a person said, or left open."""

    captioner: str | None = None
    filter: str | None = None
    human: str | None = None
    val: str | None = None
    test: str | None = None
    keep_rate: float | None = None
    """The share of texts to keep; None: by a threshold."""


@dataclass(frozen=True)
class Written:
    """The texts of recipes by their file names; what each command does that uses them, and its words."""

    files: dict[str, str]
    commands: list[tuple[str, list[str]]]


def run(
    specs: Sequence[str], path: Path, answers: Answers, address: str, seed: int, force: bool, show: Progress
) -> dict[str, Any]:
    """The verb: look at data and machine, write the recipes, `path` and perhaps one beside it.

    Raises:
        UsageError: a recipe is there already and `force` is not given, or `path` is none of a YAML.
        NoShardError: there is no such data; DataError: none of it can be read.
    """
    if path.suffix not in (".yaml", ".yml"):
        raise UsageError(f"--out {path}: a recipe is a .yaml; write --out {path}.yaml.")
    if answers.human is None and (answers.val or answers.test):
        raise UsageError("--val and --test are for a recipe of the whole loop: give --human PAIRS too.")
    given = {} if answers.keep_rate is None else {"threshold": "keep-rate", "keep_rate": answers.keep_rate}
    rate = configs.validate(PolicyConfig, given, "--keep-rate").keep_rate  # what is typed at a prompt is a text
    with show.wait("looking at a sample of the data"):
        found = look(specs, seed)
    here = Machine.look(address, path.parent / "runs", show)
    answers = Answers(**{**asdict(answers), "keep_rate": rate if given else None})
    written = write(specs, path, found, here, answers)
    if not force and (there := [name for name in written.files if Path(name).exists()]):
        raise UsageError(f"{' and '.join(there)} is there already; --force replaces it, --out writes another.")
    path.parent.mkdir(parents=True, exist_ok=True)
    for name, text in written.files.items():
        with atomic(Path(name)) as file:
            file.write(text.encode())
    commands = [{"what": what, "words": words} for what, words in written.commands]
    return {"recipes": list(written.files), **asdict(found), "machine": asdict(here), "next": commands}


def write(specs: Sequence[str], path: Path, profile: Profile, machine: Machine, answers: Answers) -> Written:
    """The recipes for some data, the first of them at `path`."""
    runs = f"runs/{path.stem}"
    where = [] if machine.address == "start" else ["--address", machine.address]
    data, commands = list(specs), []
    if profile.url_col:
        data, columns = [f"shards/{path.stem}"], ["--url-col", profile.url_col]
        columns += ["--caption-col", profile.caption_col] if profile.caption_col else []
        fetch = ["capfilt", "download", *specs, "--out", *data, *columns, "--contact", "YOUR-ADDRESS", *where]
        commands.append(("fetch the pictures (put in how a webmaster reaches you)", fetch))
    head = _head(profile, machine)
    if answers.human is not None:
        if _vocabulary(answers) is None and not BERT.is_file():
            words = ["hf", "download", "google-bert/bert-base-uncased", BERT.name, "--local-dir", str(BERT.parent)]
            commands.append(("fetch BERT's vocabulary", words))
        commands.append(("clean and train, in rounds", ["capfilt", "bootstrap", str(path), "--out", runs, *where]))
        return Written({str(path): head + _loop(data, machine, answers)}, commands)
    select = path.with_name(f"{path.stem}-select.yaml")
    models = ["--captioner", answers.captioner or CAPTIONER, "--filter", answers.filter or FILTER]
    work = [*data, "--recipe", str(path), *models]
    estimate = ["capfilt", "estimate", *work, "--policy", str(select), "--out", f"{runs}-estimate", *where]
    clean = ["capfilt", "select", *data, "--recipe", str(select), "--annotations", runs, "--out", f"{runs}-clean"]
    if profile.figures.get("samples", math.inf) > FEW:
        commands.append(("learn what it will take, keep and cost, from a sample", estimate))
    annotate = ["capfilt", "annotate", *work, "--out", runs, *where]
    commands.append(("write texts for the pictures and score all texts", annotate))
    commands.append(("keep what passes, as cleaned shards", clean))
    commands.append(("see what was kept, what was dropped, and why", ["capfilt", "report", f"{runs}-clean"]))
    return Written({str(path): head + _annotate(machine), str(select): _select(profile, answers)}, commands)


def _head(profile: Profile, machine: Machine) -> str:
    today = datetime.now(UTC).date().isoformat()
    lines = [
        f"What `capfilt init` found on {today}, in a sample, and below what follows. Every line may be changed.",
        "",
    ]
    lines += [f"{name:<12}{printable(words)}" for name, words in {**profile.facts, "Machine": str(machine)}.items()]
    return "".join(f"# {line}".rstrip() + "\n" for line in lines)


def _annotate(machine: Machine) -> str:
    size = "# batch_size: 64 # pictures at a time; while it is not set, batches grow from 64" if machine.gpus else ""
    return f"""captions: 1 # texts to write for each picture; BLIP-2 writes 10 and keeps 2
{size or "batch_size: 16 # pictures at a time"}
precision: auto # bf16 where all GPUs have it, fp32 on CPUs
decode: {{method: nucleus, top_p: 0.9, min_length: 5, max_length: 30}} # or method: beam
"""


def _select(profile: Profile, answers: Answers) -> str:
    figures, rate = profile.figures, answers.keep_rate
    lines = ["# Which texts are kept: `capfilt select` by this file takes seconds, so try several."]
    lines += ["score: itm # P(picture and text match), from the filter; itc is a cosine"]
    by_share = f"threshold: keep-rate\nkeep_rate: {rate} # of all texts, the best by score"
    lines.append("threshold: 0.5 # as CapFilt; or keep-rate, with keep_rate: 0.3" if rate is None else by_share)
    lines.append("keep: all # of a picture's texts that pass; web-first: one, synthetic only where no web text passes")
    noise, (code, share) = figures.get("boilerplate", 0.0), next(iter(figures.get("languages", {}).items()), ("en", 0))
    rule = f"rules: {{no_boilerplate: true, no_urls: true}} # {noise:.0%} of the sampled texts break them"
    lines.append(rule if noise >= 0.01 else f"# {rule}")
    lines.append(
        f"# rules.languages: [{code}] drops what is clearly of another language; of the sample {share:.0%} is {code}"
    )
    if figures.get("small", 0.0) >= 0.05:
        lines.append(f"# conditions: [{{score: side, min: {SMALL}}}] drops small pictures; annotate with --scores side")
    return "\n".join(lines) + "\n"


def _loop(data: Sequence[str], machine: Machine, answers: Answers) -> str:
    """A recipe of `capfilt bootstrap`, over the preset for GPUs or the one for CPUs."""
    lines = ["extends: blip # `capfilt show` prints what it has"]
    lines += ["rounds: 1 # round 0 trains on everything, as a baseline; round 1 cleans"]
    lines += ["data:", f"  web: {value_to_yaml(list(data))} # to be cleaned"]
    for name, what in (("human", "clean pairs"), ("val", "sets the threshold"), ("test", "held out, for figures")):
        lines.append(f"  {name}: {value_to_yaml(getattr(answers, name))} # {what}")
    models = {role: getattr(answers, role) for role in ("captioner", "filter") if getattr(answers, role) is not None}
    lines += [f"{role}: {{pretrained: {value_to_yaml(model)}}} # used as it is" for role, model in models.items()]
    if (vocabulary := _vocabulary(answers)) is not None:
        lines.append(f"tokenizer: {value_to_yaml(str(vocabulary))} # the checkpoint's vocabulary")
    lines.append(
        "initial: {vision: null, text: null} # random weights; without this line DeiT's and BERT's, from the hub"
    )
    score = "itc" if answers.filter is None else "itm"  # itc is learned sooner
    rate = answers.keep_rate if answers.keep_rate is not None or answers.val is not None else 0.5
    rule = "threshold: calibrated, recall: 0.8" if rate is None else f"threshold: keep-rate, keep_rate: {rate}"
    lines.append(f"select: {{score: {score}, {rule}}} # calibrated takes data.val; recall is of right texts")
    gpus, cpus, workers, more = len(machine.gpus), machine.cpus, 1, ""
    if gpus:
        cpus, workers = max(1, cpus // gpus), min(TRAINED_ON, 2 ** int(math.log2(gpus)))  # they divide the batches
        more = f", micro_batches: {TRAINED_ON // workers}"
    each = f"workers: {min(16, workers)}, cpus: {cpus}, gpus: {min(1, gpus)}"
    train = each.replace(f"workers: {min(16, workers)}", f"workers: {workers}")
    annotate = f"{{cpus: {cpus if gpus else 1}, gpus: {min(1, gpus)}}}"
    lines += ["cluster:", f"  train: {{{train}{more}}}", f"  finetune: {{{each}}}", f"  annotate: {annotate}"]
    small = "" if gpus else "# a small model, as the preset blip-cpu has it\n" + _small(models)
    return "\n".join([*lines, "  select: {cpus: 1}", small])


def _small(models: Mapping[str, str]) -> str:
    """The sizes and trainings of the preset for a laptop, which a recipe cannot extend: it extends `blip` itself."""
    tree = load_yaml(presets.find("pipelines", "blip-cpu", within="bootstrap"))
    keys = {"model", "pretrain", "captioner", "filter", "annotate", "evaluate"} - set(models)
    return tree_to_yaml({key: value for key, value in tree.items() if key in keys})


def _vocabulary(answers: Answers) -> Path | None:
    """The vocabulary of a checkpoint that was given."""
    files = (Path(model, "vocab.txt") for model in (answers.captioner, answers.filter) if model is not None)
    return next((file for file in files if file.is_file()), None)
