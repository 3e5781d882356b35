"""What people type wrong, and what `capfilt` answers: the table of `docs/mistakes.md`, which this program writes.

`python tests/cli/mistakes.py` writes the page, with the seconds of real processes; with `run FOLDER` it prints each
outcome as a line of JSON, and which heavy modules were imported before the answer.
"""

from __future__ import annotations

import gc
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "mistakes.md"
HEAVY = ("torch", "ray", "transformers", "img2dataset", "webdataset", "faiss")
"""Modules whose import takes a second or more, or a good part of one."""

ROUND = "runs/demo/round-1"
CHECKPOINT = f"{ROUND}/pretrain/checkpoint"
ROLES = f"--captioner {ROUND}/captioner --filter {ROUND}/filter"
SWAPPED = f"--captioner {ROUND}/filter --filter {ROUND}/captioner"

PIPELINES = (
    *("annotate", "bench.bench", "bootstrap.rounds", "convert", "download", "evaluate", "export", "pretrain", "select"),
    *(f"inspect.{name}" for name in ("explain", "report", "review", "show", "status", "verify")),
    *(f"near.{name}" for name in ("decontaminate", "dedup", "embed", "index", "retrieve")),
)

TRIES = 3
"""Processes of which the fastest counts: others use the machine too."""

LISTS = re.compile(r"(There are|there are|Allowed here|allowed are)(:?) [^.;]*?,[^;]*?(?:\.(?= |$)|(; )|$)")
"""Lists of names in an answer, which grow."""

MISTAKES: tuple[tuple[str, str, int], ...] = (
    ("a verb that is not there", "bootstarp", 2),
    ("an option that is not there", "bootstrap demo --rouds 2", 2),
    ("a word where a number belongs", "bootstrap demo --rounds two", 2),
    ("a number out of range", f"annotate shards {ROLES} --out runs/a --captions 0", 2),
    ("a number of workers that cannot be", f"annotate shards {ROLES} --out runs/a --workers -2", 2),
    ("an argument too many", "show demo blip/base", 2),
    ("an option without its value", "pretrain blip-tiny --out", 2),
    ("a required option left out", "pretrain blip-tiny", 2),
    ("a word that an option does not know", f"select shards --annotations {ROUND} --out runs/s --calibrate lables", 2),
    ("a preset that is not there", "bootstrap dmeo", 2),
    ("a preset of another verb", "pretrain demo --out runs/p", 2),
    ("a recipe that is not there", "bootstrap mine.yml", 2),
    ("a recipe that is no YAML", "bootstrap broken.yaml", 2),
    ("an assignment without a value", "bootstrap demo --set pretrain.steps", 2),
    ("an unknown key", "bootstrap demo --set pretrain.stepz=4", 2),
    ("a value that does not fit", "bootstrap demo --set pretrain.steps=0", 2),
    ("a value that does not fit, in the recipe", "bootstrap mine.yaml", 2),
    ("two keys that contradict each other", "bootstrap demo --set data.web=shards", 2),
    ("an architecture that is not there", "bootstrap demo --set model=blip/bse", 2),
    ("a batch that cannot be split", "bootstrap demo --set pretrain.loader.batch_size=17", 2),
    ("an address of no known form", "bootstrap demo --address nowhere", 2),
    ("shards that are not there", f"annotate shard {ROLES} --out runs/a", 2),
    ("a model that is not there", "evaluate runs/dmeo/checkpoint shards", 2),
    ("a run folder in place of a model", "evaluate runs/demo shards", 2),
    ("a folder in place of a model", "export shards --out exported", 2),
    ("models in each other's place", f"annotate shards {SWAPPED} --out runs/a", 2),
    ("the folder of another verb as --out", f"annotate shards {ROLES} --out runs/demo", 2),
    ("a folder with other files as --out", f"annotate shards {ROLES} --out shards", 2),
    ("a file as --out", f"annotate shards {ROLES} --out urls.csv", 2),
    ("a run folder in place of a round", "select shards --annotations runs/demo --out runs/s", 2),
    ("a threshold that cannot be", f"select shards --annotations {ROUND} --out runs/s --threshold 1.5", 2),
    ("a form that is not there", f"export {CHECKPOINT} --as onnx --out exported", 2),
    ("a folder that is not empty, to export into", f"export {CHECKPOINT} --out shards", 2),
    ("a list that is not there", "download url.csv --out runs/d", 2),
    ("a column that is not there", "download urls.csv --out runs/d --url-col link", 2),
    ("a list whose name does not tell its format", "download urls.list --out runs/d", 2),
    ("a size that cannot be", "download urls.csv --out runs/d --image-size 0", 2),
    ("a failure that is not known", "download urls.csv --out runs/d --retry sometimes", 2),
    ("a task that is not there", "convert vqaa questions.json --images shards --out runs/v", 2),
    ("a published file that is not there", "convert vqa questions.json --images shards --out runs/v", 2),
    ("a folder of pictures that is not there", "convert vqa urls.csv --images pictures --out runs/v", 2),
    ("a split, where files have one each", "convert vqa urls.csv --images shards --split val --out runs/v", 2),
    ("a run folder that is not there", "status runs/dmeo", 2),
    ("a folder inside a run folder", f"report {ROUND}", 2),
    ("a port that cannot be", "review runs/demo --port 99999", 2),
    ("a benchmark that is not there", "bench pretrain", 2),
    ("a job to stop that is not named", "jobs --stop", 2),
    ("an image that is not in the run", "explain runs/demo 000000099", 1),
)  # fmt: skip
"""What it is, the command line after `capfilt`, and the exit code."""


def make_folder(folder: Path) -> None:
    """What the command lines name: a bootstrap's run folder with the models of a round, shards, lists, recipes."""
    from capfilt import config as configs
    from capfilt.data import annotations, shards
    from capfilt.data.annotations import Annotation
    from capfilt.data.sample import Sample
    from capfilt.data.text.tokenizer import Tokenizer
    from capfilt.models import read_architecture
    from capfilt.presets import find

    run = folder / "runs" / "demo"
    architecture, tokenizer = read_architecture(find("models", "blip/tiny")), Tokenizer.load("world")
    for name, role in (("pretrain", None), ("captioner", "captioner"), ("filter", "filter")):
        home = run / "round-1" / name / "checkpoint"
        home.mkdir(parents=True)
        of_role = architecture if role is None else architecture.for_role(role)  # type: ignore[arg-type]
        (home / "architecture.yaml").write_text(configs.to_yaml(of_role))
        (home / "model.safetensors").write_bytes(b"nothing that is read before all else fits")
        tokenizer.save(home)
    (run / "plan.json").write_text(json.dumps({"format": 1, "pretrain": {}, "seed": 0}))
    annotations.write(
        run / "round-1" / "annotations" / "00000.parquet",
        [Annotation("000000000", "0" * 32, "0" * 64, "web", 0, "a cup", 0.5, 0.2, "", "blip-0", 0, 1)],
    )
    shards.write(folder / "shards" / "00000.tar", [Sample("000000000", b"", "jpg", "a cup", {})])
    for name in ("urls.csv", "urls.list"):
        (folder / name).write_text("url,caption\nhttp://127.0.0.1:9/0.jpg,a cup\n")
    (folder / "broken.yaml").write_text("rounds: [1\n")
    (folder / "mine.yaml").write_text("extends: demo\nrounds: -1\n")


def outcomes(folder: Path) -> list[dict[str, Any]]:
    """Make every mistake in `folder`, each in a fork of this process, which has imported all pipelines."""
    import capfilt.cli

    for name in PIPELINES:
        import_module(f"capfilt.pipelines.{name}")
    assert not [name for name in HEAVY if name in sys.modules], "a pipeline imports what only its workers need"
    os.chdir(folder)
    gc.disable()  # it would walk, and so copy, what each fork shares with this process
    return [_outcome(capfilt.cli.main, command) for _, command, _ in MISTAKES]


def _outcome(main: Any, command: str) -> dict[str, Any]:
    with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as record:
        child = os.fork()
        if child == 0:
            for number in (1, 2):
                os.dup2(said.fileno(), number)
            sys.argv = ["capfilt", *shlex.split(command)]
            code: Any = "it came back"
            try:
                main()
            except SystemExit as left:
                code = left.code
            except BaseException as error:  # noqa: BLE001 (it is what the test is to see)
                code = f"{type(error).__name__}: {error}"
            sys.stdout.flush()
            sys.stderr.flush()
            record.write(json.dumps({"code": code, "heavy": [name for name in HEAVY if name in sys.modules]}))
            record.flush()
            os._exit(0)
        os.waitpid(child, 0)
        for file in (said, record):
            file.seek(0)
        return {**json.loads(record.read()), "answer": said.read()}


def answer(said: str, folder: Path) -> str:
    """The last line that was said, as the page has it: paths from the folder on, and lists of names cut."""
    text = said.strip().splitlines()[-1].replace(f"{folder}/", "").replace(f"{ROOT}/", "")
    return LISTS.sub(r"\1\2 ...\3", text)


def row(number: int, what: str, command: str, answer: str, code: object, seconds: str) -> str:
    """A row of the page."""
    cells = (str(number), what, f"`capfilt {command}`", answer, str(code), seconds)
    return f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |"


def write_page() -> None:
    """Write the page from real processes, one after another."""
    program = str(Path(sys.executable).with_name("capfilt"))
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary).resolve()
        make_folder(folder)
        for number, (what, command, _) in enumerate(MISTAKES, 1):
            answers = [_process([program, *shlex.split(command)], folder) for _ in range(TRIES)]
            said, code, _ = answers[0]
            seconds = min(used for _, _, used in answers)
            rows.append(row(number, what, command, answer(said, folder), code, f"{seconds:.2f}"))
    head = PAGE.read_text().partition("| # |")[0]
    table = ["| # | mistake | command | answer | code | CPU s |", "|--|--|--|--|--|--|", *rows]
    PAGE.write_text(head + "\n".join(table) + "\n")


def _process(words: list[str], folder: Path) -> tuple[str, int, float]:
    """What a process said, its exit code, and the CPU seconds that it used."""
    process = subprocess.Popen(words, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    said = process.stdout.read()
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return said, process.returncode, used.ru_utime + used.ru_stime


if __name__ == "__main__":
    if sys.argv[1:2] == ["run"]:
        for outcome in outcomes(Path(sys.argv[2])):
            sys.stdout.write(json.dumps(outcome) + "\n")
    else:
        write_page()
