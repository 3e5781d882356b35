"""The recipes that fit some data and a machine, as YAML with comments: written once, then a person's own.

With human pairs it is one recipe of the whole loop; without, CapFilt has nothing to train on, and it is one for
`annotate` and one for `select`, with two models that are there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from capfilt.config import value_to_yaml
from capfilt.pipelines.init.profile import Profile
from capfilt.pipelines.inspect.machine import Machine

CAPTIONER, FILTER = "Salesforce/blip-image-captioning-base", "Salesforce/blip-itm-base-coco"
"""Public models for both roles, where none are given."""
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
    """The texts of recipes by their file names, and the commands that use them."""

    files: dict[str, str]
    commands: tuple[tuple[str, list[str]], ...]
    """What each does, and its words after `capfilt`."""


def write(specs: Sequence[str], path: Path, profile: Profile, machine: Machine, answers: Answers) -> Written:
    """The recipes for some data, the first of them at `path`."""
    runs = f"runs/{path.stem}"
    where = () if machine.address == "start" else ("--address", machine.address)
    data, commands = list(specs), []
    if profile.layout == "list":
        data, words = [f"shards/{path.stem}"], ["--url-col", profile.url_col]
        words += ["--caption-col", profile.caption_col] if profile.caption_col else []
        fetch = ["download", *specs, "--out", data[0], *words, "--contact", "YOUR-ADDRESS"]
        commands.append(("fetch the pictures (put in how a webmaster reaches you)", [*fetch, *where]))
    head = _head(profile, machine)
    if answers.human is not None:
        commands.append(("clean and train, in rounds", ["bootstrap", str(path), "--out", runs, *where]))
        return Written({str(path): head + _loop(data, machine, answers)}, tuple(commands))
    select = path.with_name(f"{path.stem}-select.yaml")
    models = ["--captioner", answers.captioner or CAPTIONER, "--filter", answers.filter or FILTER]
    annotate = ["annotate", *data, "--recipe", str(path), *models, "--out", runs, *where]
    clean = ["select", *data, "--recipe", str(select), "--annotations", runs, "--out", f"{runs}-clean"]
    estimate = ["estimate", *data, "--recipe", str(path), "--policy", str(select), *models, "--out", f"{runs}-estimate"]
    few = profile.figures.get("samples", math.inf) <= 2_000
    commands += [] if few else [("learn what it will take, keep and cost, from a sample", [*estimate, *where])]
    commands.append(("write texts for the pictures and score all texts", annotate))
    commands.append(("keep what passes, as cleaned shards", clean))
    commands.append(("see what was kept, what was dropped, and why", ["report", f"{runs}-clean"]))
    files = {str(path): head + _annotate(machine), str(select): _select(profile, answers)}
    return Written(files, tuple(commands))


def _head(profile: Profile, machine: Machine) -> str:
    today = datetime.now(UTC).date().isoformat()
    width = max(map(len, (*profile.facts, "Machine"))) + 2
    lines = [f"What `capfilt init` found on {today}, in a sample; below, what follows from it. Change what you like:"]
    lines += ["`capfilt show THIS-FILE --explain` says what each key means.", ""]
    lines += [f"{name:<{width}}{words}" for name, words in (*profile.facts.items(), ("Machine", str(machine)))]
    return "".join(f"# {_plain(line)}".rstrip() + "\n" for line in lines)


def _plain(text: str) -> str:
    """A line of a comment, whatever the data had in its names."""
    return " ".join("".join(c if c.isprintable() else "?" for c in text).split("\n")) if text else ""


def _annotate(machine: Machine) -> str:
    size = 64 if machine.gpus else 16
    return f"""captions: 1 # texts to write for each picture; BLIP-2 writes 10 and keeps 2
batch_size: {size} # pictures at a time; {"halve it where memory runs out" if machine.gpus else "CPUs gain nothing from more"}
precision: auto # bf16 where all GPUs have it, fp32 on CPUs
decode: {{method: nucleus, top_p: 0.9, min_length: 5, max_length: 30}} # method: beam writes safer texts, which teach less
"""


def _select(profile: Profile, answers: Answers) -> str:
    lines = ["# Which texts are kept: `capfilt select` by this file takes seconds, so try several."]
    lines += ["score: itm # P(picture and text match), from the filter; itc is a cosine"]
    if answers.keep_rate is None:
        lines.append("threshold: 0.5 # as CapFilt; or `threshold: keep-rate` with `keep_rate: 0.3`")
    else:
        lines.append(f"threshold: keep-rate\nkeep_rate: {answers.keep_rate:g} # of all texts, the best by score")
    lines.append("keep: all # of a picture's texts that pass; web-first: one, synthetic only where no web text passes")
    share = profile.figures.get("boilerplate", 0.0)
    rule = f"rules: {{no_boilerplate: true, no_urls: true}} # {share:.0%} of the sampled texts break them"
    lines.append(rule if share >= 0.01 else f"# {rule}")
    languages = profile.figures.get("languages", {})
    if languages:
        code = next((name for name in languages if name != "unclear"), "en")
        lines.append(f"# rules.languages: [{code}] drops what is clearly of another language; {languages.get(code, 0):.0%} is {code}")
    if profile.figures.get("small", 0.0) >= 0.05:
        lines.append("# conditions: [{score: side, min: 200}] drops small pictures; annotate with --scores side first")
    return "\n".join(lines) + "\n"


def _loop(data: Sequence[str], machine: Machine, answers: Answers) -> str:
    """A recipe of `capfilt bootstrap`, over the preset for GPUs or the one for CPUs."""
    gpus = len(machine.gpus)
    lines = [f"extends: {'blip' if gpus else 'blip-cpu'} # `capfilt show` prints what it has"]
    lines += ["rounds: 1 # round 0 trains on everything, as a baseline; round 1 cleans"]
    lines += ["data:", f"  web: {value_to_yaml(list(data))} # to be cleaned"]
    for name, what in (("human", "clean pairs"), ("val", "for the threshold"), ("test", "held out: figures")):
        given = getattr(answers, name)
        lines.append(f"  {name}: {value_to_yaml(given)} # {what}" if given else f"  {name}: null # {what}")
    for role in ("captioner", "filter"):
        if (model := getattr(answers, role)) is not None:
            lines.append(f"{role}: {{pretrained: {value_to_yaml(model)}}} # used as it is in every round")
    vocabulary = next((str(f) for m in (answers.captioner, answers.filter) if m and (f := Path(m, "vocab.txt")).is_file()), "")
    if vocabulary:
        lines.append(f"tokenizer: {value_to_yaml(vocabulary)} # the checkpoint's vocabulary")
    lines.append("initial: {} # random weights; leave the line out for those of DeiT and BERT, from the Hugging Face hub")
    if answers.val is None or answers.keep_rate is not None:
        share = 0.5 if answers.keep_rate is None else answers.keep_rate
        lines.append(f"select: {{threshold: keep-rate, keep_rate: {share:g}}} # with data.val: threshold: calibrated")
    return "\n".join([*lines, *_cluster(machine)]) + "\n"


def _cluster(machine: Machine) -> list[str]:
    gpus, cpus = len(machine.gpus), machine.cpus
    if not gpus:
        each = f"{{workers: 1, cpus: {cpus}, gpus: 0}}"
        return ["cluster:", f"  train: {each}", f"  finetune: {each}", "  annotate: {cpus: 1, gpus: 0}", "  select: {cpus: 1}"]
    share = max(1, cpus // gpus)
    workers = min(TRAINED_ON, 2 ** int(math.log2(gpus)))  # by which the presets' batches can be divided
    train = f"  train: {{workers: {workers}, cpus: {share}, gpus: 1, micro_batches: {TRAINED_ON // workers}}}"
    finetune = f"  finetune: {{workers: {min(16, workers)}, cpus: {share}, gpus: 1}}"
    return ["cluster:", train, finetune, f"  annotate: {{cpus: {share}, gpus: 1}}", "  select: {cpus: 1}"]
