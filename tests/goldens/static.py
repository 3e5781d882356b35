"""Goldens of what can be seen of capfilt without a run: names, options, recipes, weights, random draws; each is a text.

`python tests/goldens/static.py` writes `static/*.txt` anew, `test_static.py` compares. Modules of capfilt are imported
inside the functions here and in `draws.py`: a module that moves changes an import, and no golden.
"""

from __future__ import annotations

import ast
import difflib
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

sys.path.append(str(Path(__file__).parent.parent))

from goldens import command_line, draws
from pydantic_core import to_jsonable_python

ROOT = Path(__file__).resolve().parent.parent.parent
FOLDER = Path(__file__).with_name("static")

TERMINAL = {"COLUMNS": "600", "TERMINAL_WIDTH": "600", "TERM": "dumb", "NO_COLOR": "1", "LC_ALL": "C.UTF-8"}
"""A terminal that is the same everywhere, and so wide that nothing is wrapped."""
PASSED_ON = ("PATH", "HOME", "TMPDIR", "LD_LIBRARY_PATH", "VIRTUAL_ENV")

# ---- the command line ----


def help_pages() -> str:
    """`--help` of everything, in a process of its own: typer reads the terminal when it is imported."""
    environment = {name: os.environ[name] for name in PASSED_ON if name in os.environ} | TERMINAL
    words = [sys.executable, str(Path(__file__).with_name("command_line.py"))]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---- names: presets, metrics, environment, stages ----


def names() -> str:
    """Presets and their files, stages, metrics."""
    from capfilt import presets
    from capfilt.runs.metrics import TABLE
    from capfilt.runs.stage_status import ORDER

    lines = [f"preset {shelf}: {name}" for shelf in ("models", "pipelines") for name in presets.names(shelf)]
    lines += [
        f"file {path.relative_to(ROOT).as_posix()}"
        for shelf in ("models", "pipelines")
        for path in sorted((ROOT / shelf).rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    ]
    lines += [f"stage {stage}" for stage in ORDER]
    for metric in TABLE:
        labels, buckets = ",".join(metric.labels), f" buckets={[*metric.buckets]}" if metric.buckets else ""
        lines.append(
            f"metric {metric.prometheus_name} = {metric.name}: {metric.kind} by {labels} [{metric.unit}]{buckets}"
        )
        lines.append(f"       {metric.help}{f' (needs {metric.needs})' if metric.needs else ''}")
    return "".join(f"{line}\n" for line in lines)


def environment() -> str:
    """Names of environment variables that the source reads or sets: upper-case strings that are nothing else."""
    actual: set[str] = set()
    for path in (ROOT / "capfilt").rglob("*.py"):
        actual |= set(_variables(ast.parse(path.read_text())))
    return "".join(f"{name}\n" for name in sorted(actual))


_VARIABLE = re.compile(r"(?!BYTE_ARRAY$|O_PATH$)[A-Z][A-Z0-9]*(_[A-Z0-9]+)+|TMPDIR|HOME|PATH")
"""But for a type of Parquet and a flag of open(2)."""


def _variables(tree: ast.AST) -> Iterator[str]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            continue
        if isinstance(node, ast.keyword) and node.arg == "metavar":
            continue
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("sysconf"):
            continue
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and _VARIABLE.fullmatch(node.value):
            yield node.value
        yield from _variables(node)


# ---- recipes ----


def shown() -> str:
    """`capfilt show` of every preset as printed; of `--json`, which has the same content, the digest of its bytes."""
    import yaml

    from capfilt import presets

    parts = []
    for name in [*presets.names("models"), *presets.names("pipelines")]:
        (code, plain, _), (_, machine, _) = command_line.run("show", name), command_line.run("show", name, "--json")
        assert code == 0, f"capfilt show {name} ends with {code}"
        assert yaml.safe_load(plain) == json.loads(machine), f"capfilt show {name}: --json says something else"
        digest = hashlib.sha256(machine.encode()).hexdigest()[:16]
        parts.append(f"$ capfilt show {name}    # --json: sha256 {digest}\n{plain.replace(str(ROOT), '.')}")
    return "".join(parts)


def fields() -> str:
    """Field names, types, bounds and defaults of every config that a verb reads or a worker is handed, by dotted key.

    Class names are not in it. A section that stands in several places is written out where it comes first.
    """
    lines: list[str] = []
    first: dict[type, str] = {}
    for name, kind in _configs().items():
        lines += _section(name, kind, first)
    return "".join(f"{line}\n" for line in lines)


def _configs() -> dict[str, type]:
    from capfilt.cluster.worker_pool import Resources
    from capfilt.data.images.preprocess import Preprocess
    from capfilt.data.policy import PolicyConfig, Rule
    from capfilt.downloading.http.client import Limits
    from capfilt.downloading.http.politeness import Politeness
    from capfilt.downloading.plans import Pass
    from capfilt.evaluation.config import EvaluateConfig
    from capfilt.evaluation.tasks import TASKS
    from capfilt.inference.config import AnnotateConfig
    from capfilt.models import Blip2Config, BlipConfig
    from capfilt.pipelines.bench.bench import BenchConfig, BenchDownloadConfig, BenchTrainConfig
    from capfilt.pipelines.bootstrap.config import BootstrapConfig
    from capfilt.pipelines.bootstrap.roles.taught import LanguageJob
    from capfilt.pipelines.pretrain import PretrainConfig
    from capfilt.stages.annotation.annotate import AnnotateJob
    from capfilt.stages.annotation.calibrate import CalibrateJob
    from capfilt.stages.count_pairs import RowsJob
    from capfilt.stages.download import DownloadJob, DownloadOptions
    from capfilt.stages.evaluate import EvaluateJob
    from capfilt.stages.runner import CommandOptions
    from capfilt.stages.select import SelectJob
    from capfilt.stages.world import WorldJob
    from capfilt.training.job import TrainJob

    return {
        "blip": BlipConfig, "blip2": Blip2Config, "bootstrap": BootstrapConfig, "pretrain": PretrainConfig,
        "annotate": AnnotateConfig, "select": PolicyConfig, "evaluate": EvaluateConfig, "bench": BenchConfig,
        "bench train": BenchTrainConfig, "bench download": BenchDownloadConfig,
        "download": DownloadOptions, "options": CommandOptions, "resources": Resources, "rule": Rule, "pass": Pass,
        "preprocess.json": Preprocess, "limits": Limits, "politeness": Politeness, "train job": TrainJob,
        "annotate job": AnnotateJob, "calibrate job": CalibrateJob, "select job": SelectJob, "world job": WorldJob,
        "download job": DownloadJob, "evaluate job": EvaluateJob, "language job": LanguageJob, "rows job": RowsJob,
        **{f"evaluate {name}": task for name, task in TASKS.items()},
    }  # fmt: skip


def _section(path: str, kind: type, first: dict[type, str]) -> Iterator[str]:
    if kind in first:
        yield f"{path}: as {first[kind]}"
        return
    first[kind] = path
    for name, field in kind.model_fields.items():
        bounds = "".join(f" {bound}" for bound in field.metadata if type(bound).__module__ == "annotated_types")
        yield f"{path}.{name}: {_told(field.annotation)}{bounds} {_default(field)}"
        for number, inner in enumerate(_models(field.annotation)):
            yield from _section(f"{path}.{name}{f'|{number}' if number else ''}", inner, first)


def _default(field: Any) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if hasattr(value, "model_fields_set") and not value.model_fields_set:
        return "= its defaults"
    return f"= {json.dumps(to_jsonable_python(value, fallback=str), ensure_ascii=False)}"


def _told(annotation: Any) -> str:
    """An annotation in words that do not name our classes."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return "|".join(map(repr, arguments))
    if origin in (Union, UnionType):
        answer = dict.fromkeys(map(_told, arguments))
        return "place" if "RemotePath" in {getattr(a, "__name__", "") for a in arguments} else "|".join(answer)
    if hasattr(annotation, "__metadata__"):
        return _told(arguments[0])
    if arguments:
        return f"{getattr(origin, '__name__', origin)}[{', '.join(map(_told, arguments))}]"
    if isinstance(annotation, type):
        own = annotation.__module__.partition(".")[0] == "capfilt"
        return ("section" if hasattr(annotation, "model_fields") else "object") if own else annotation.__name__
    return str(annotation)


def _models(annotation: Any) -> list[type]:
    from capfilt.models import FAMILIES, ArchitectureConfig
    from capfilt.objectives.kinds import TaskConfig
    from capfilt.objectives.tasks import task_configs

    if annotation is ArchitectureConfig:  # stands for the architecture of any family
        return [family.config for family in FAMILIES.values()]
    if annotation is TaskConfig:
        return [*task_configs().values()]
    if isinstance(annotation, type) and hasattr(annotation, "model_fields"):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models(argument)]


# ---- weights ----


def state_dicts() -> str:
    """Keys, shapes and formats of every model preset, and of the trained state of the small ones.

    In the order of the keys, a line a module, numbers within keys drawn together; the digest is of the keys as they
    are. float32 and a gradient where nothing else is said.
    """
    import torch

    from capfilt import presets
    from capfilt.models import blank, read_architecture
    from capfilt.objectives.tasks import build_task, tasks_of

    parts = []
    for name in presets.names("models"):
        model = blank(read_architecture(presets.find("models", name)))
        with torch.device("meta"):
            parts.append(_collapsed(name, model))
            if "/tiny" in name:
                config = tasks_of(model.config.family)[0].config
                queue = {"queue": 128} if "queue" in config.model_fields else {}
                losses = {"losses": {"lm": 1.0}} if name == "blip2/tiny-opt" else {}
                task = build_task(model, config(**queue, **losses))
                parts.append(_collapsed(f"training of {name}", task))
    return "".join(parts)


def _collapsed(name: str, module: Any) -> str:
    gradient = {key: p.requires_grad for key, p in module.named_parameters(remove_duplicate=False)}
    whole, modules = [], dict[str, dict[str, None]]()
    numbers: dict[str, list[list[int]]] = {}
    for key, tensor in module.state_dict().items():
        kind = str(tensor.dtype).removeprefix("torch.").replace("float32", "")
        also = {True: "", False: "frozen", None: "buffer"}[gradient.get(key)]
        said = " ".join([str(list(tensor.shape)), *filter(None, (kind, also))])
        whole.append(f"{key} {said}")
        place, _, last = _NUMBER.sub("#", key).rpartition(".")
        modules.setdefault(place, {})[f"{last} {said}"] = None
        numbers.setdefault(place, []).append([int(number) for number in _NUMBER.findall(key)])
    lines = [f"{name}: {len(whole)} tensors, sha256 {hashlib.sha256(chr(10).join(whole).encode()).hexdigest()[:16]}"]
    for place, tensors in modules.items():
        for drawn in zip(*numbers[place], strict=True):
            place = place.replace("#", _ranges(sorted(set(drawn))), 1)
        lines.append(f"  {place}: {', '.join(tensors)}")
    return "".join(f"{line}\n" for line in lines)


_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] as "{0..2,5}", [3] as "3"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    answer = ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}..{run[-1]}" for run in runs)
    return answer if answer.isdigit() else f"{{{answer}}}"


# ---- kept and compared ----

GOLDENS: Mapping[str, Callable[[], str]] = {
    "help": help_pages,
    "options": command_line.options,
    "exits": command_line.exit_codes,
    "names": names,
    "environment": environment,
    "show": shown,
    "fields": fields,
    "state_dicts": state_dicts,
    "draws": draws.drawn,
}
"""What makes the text of each file of `static/`."""


def kept(name: str) -> tuple[str, str]:
    """The line that says what a golden was made with, and the golden."""
    head, _, text = (FOLDER / f"{name}.txt").read_text().partition("\n")
    return head, text


def changed(name: str) -> str:
    """What is now otherwise than in the golden, as a diff; "" for nothing."""
    before, now = kept(name)[1].splitlines(), GOLDENS[name]().splitlines()
    return "\n".join(difflib.unified_diff(before, now, f"static/{name}.txt", "now", lineterm="", n=2))


def write(expected: Iterable[str]) -> None:
    """Write goldens anew; those that say the same keep the commit that they were made with."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()
    FOLDER.mkdir(exist_ok=True)
    for name in expected:
        text = GOLDENS[name]()
        if not (FOLDER / f"{name}.txt").is_file() or kept(name)[1] != text:
            head = f"# Made with commit {commit} by `python tests/goldens/static.py {name}`."
            (FOLDER / f"{name}.txt").write_text(f"{head}\n{text}")


if __name__ == "__main__":
    write(sys.argv[1:] or GOLDENS)
