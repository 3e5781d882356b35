"""Makes the goldens of small runs: what every file of a run folder is, and run folders that were cut in the middle.

`python tests/goldens/make_run.py` writes `run/*.json` anew, `--cuts` the cut runs too; `tests/goldens/test_run.py` has
the same runs made and compares. The last bits of a model depend on the kind of CPU, so this starts itself again with
the environment of `AVX2`, whatever it was started with.
"""

from __future__ import annotations

import argparse
import hashlib
import http.server
import io
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent / "run"
CUTS = HERE / "cuts.tar.xz"
MADE_BY = "78cc473"
"""The commit that made what lies in `run/`."""

AVX2 = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
}
TIME = 1_700_000_000
"""When shards were written whose time of writing counts: fingerprints of what was counted of them hold it."""
PICTURES = ("127.83.71.15", 18080)
"""Where the pictures are served that `download` fetches. An address of loopback that nobody else takes: it is written
into every shard."""

SAID = "--json"
"""Under this name stands among the files of a run what its command printed."""

Tree = dict[str, Any]


# ---- a run folder as a tree of what can be compared ----

_TIMES = {"ts", "seconds", "step_seconds", "samples_per_second", "data_wait", "start_time", "end_time", "duration"}
_TIMES |= {"per_second"}
_ROWS = re.compile(r"(ledger/rows/.+)-[0-9a-f]{16}\.json")


def tree(folder: Path, dated: bool = False) -> Tree:
    """Every file of a run folder by its path: the contents of text, the sha256 of anything else.

    What is another each time is replaced: seconds and times of day by "<time>", the working directory by "<here>".
    Unless all shards that were read have the times of writing of `date`, so are those, and fingerprints and names that
    contain them (of the stage `rows`) by "<dated>". JSON that is not written as the ledger writes it (keys sorted,
    indent 1) stands here as its text. What workers used is left out: how many lines say it is another each time, too.
    """
    result: Tree = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() or path.is_symlink()):
        if path.name.endswith(".usage.jsonl"):
            continue
        name, content = str(path.relative_to(folder)), _content(path)
        if not dated:
            content = _undated(content, rows="/rows" in f"/{name}")
            name = _ROWS.sub(r"\1.json", name)
        while name in result:  # shards of two folders may have one name
            name += "+"
        result[name] = content
    return _ordered(result)


def _ordered(result: Tree) -> Tree:
    """Files of one name, whose order was that of a time, in the order of their contents."""
    groups: dict[str, list[Any]] = {}
    for name, content in result.items():
        groups.setdefault(name.rstrip("+"), []).append(content)
    for contents in groups.values():
        contents.sort(key=json.dumps)
    return {name: groups[name.rstrip("+")].pop(0) for name in result}


def _content(path: Path) -> Any:
    data = path.read_bytes()
    if path.suffix == ".json":
        parsed = json.loads(data)
        same = json.dumps(parsed, sort_keys=True, indent=1, ensure_ascii=False).encode() + b"\n" == data
        return _timeless(parsed) if same else data.decode()
    if path.suffix == ".jsonl":
        return [_timeless(json.loads(line)) for line in data.decode().splitlines()]
    if path.suffix == ".yaml":
        return data.decode().splitlines()
    if path.suffix == ".html":
        return "<a page>"  # it shows seconds, and is for people
    return {"sha256": hashlib.sha256(data).hexdigest(), **_table(path)}


def _table(path: Path) -> Tree:
    """Of a Parquet how many rows and which columns it has, so that a difference can be understood."""
    if path.suffix != ".parquet":
        return {}
    import pyarrow.parquet

    file = pyarrow.parquet.read_table(path)
    return {"rows": file.num_rows, "columns": {field.name: str(field.type) for field in file.schema}}


def _timeless(content: Any) -> Any:
    if isinstance(content, dict):
        # What img2dataset writes of a shard says how long it took, and so do its size and its sha256.
        own = {"bytes", "sha256"} if str(content.get("path")).endswith("_stats.json") else set()
        return {
            key: "<time>" if key in _TIMES | own else _timeless(value)
            for key, value in content.items()
            if key != "usage"
        }
    if isinstance(content, list):
        return [_timeless(value) for value in content]
    return content.replace(os.getcwd(), "<here>") if isinstance(content, str) else content


def _undated(content: Any, rows: bool) -> Any:
    if isinstance(content, dict):
        dated = {"version", "fingerprint", "shard"} if rows else {"version"}
        return {
            key: "<dated>" if key in dated and isinstance(value, str) else _undated(value, rows)
            for key, value in content.items()
        }
    if isinstance(content, list):
        pair = rows and len(content) == 2 and all(isinstance(part, str) for part in content)
        return ["<dated>", "<dated>"] if pair else [_undated(part, rows) for part in content]
    return content


# ---- the runs ----


def capfilt(*words: object) -> Any:
    """Run a verb in this process; what it said as JSON, and where it failed its error: what it wrote until then says
    more of the reason."""
    from typer.testing import CliRunner

    from capfilt.cli import app

    where = () if words[0] in ("status", "verify", "explain", "export") else ("--address", "local")
    done = CliRunner().invoke(app, [*map(str, words), *where, "--json"])
    if done.exit_code != 0:
        return _timeless(f"left with {done.exit_code}: {done.stderr.strip() or repr(done.exception)}")
    return _timeless(json.loads(done.stdout))


def bootstrap(recipe: str, out: str) -> Tree:
    """All rounds of a recipe."""
    said = capfilt("bootstrap", recipe, "--out", out)
    return {SAID: said, **tree(Path(out))}


def verbs() -> Tree:
    """The other verbs, each by itself, on the shards and models of `bootstrap`."""
    shutil.copytree("run/data", "data")
    date(Path("data"))
    models = {role: f"run/round-1/{role}/checkpoint" for role in ("captioner", "filter", "pretrain")}
    own = ("--cpus", "1")
    roles = ("--captioner", models["captioner"], "--filter", models["filter"])
    decode = ("--set", "decode.max_length=12", "--set", "decode.min_length=3", "--set", "max_length=35")
    beam = ("--set", "decode.max_length=12", "--set", "decode.method=greedy")
    commands: dict[str, tuple[object, ...]] = {
        "annotate": ("annotate", "data/web", *roles, "--captions", 2, "--seed", 7, *decode, *own),
        "select": ("select", "data/web", "--annotations", "annotate", "--set", "threshold=0.3", *own),
        "select-top": ("select", "data/web", "--annotations", "annotate", "--set", "top_k=1", *own),
        "evaluate": ("evaluate", models["pretrain"], "data/test", *beam, *own),
        "evaluate-filter": ("evaluate", models["filter"], "data/web", "--set", "score=itc", *own),
        "pretrain": ("pretrain", "pretrain.yaml"),
    }
    made: Tree = {}
    for name, words in commands.items():
        said = capfilt(*words, "--out", name)
        made[name] = {SAID: said, **tree(Path(name), dated=True)}
    for words in (("status", "run"), ("verify", "run"), ("explain", "run", "000010001")):
        made[words[0]] = {SAID: capfilt(*words)}
    for name, model in {"export": models["pretrain"], "export-blip2": "blip2/round-1/stage-2/checkpoint"}.items():
        made[name] = {SAID: capfilt("export", model, "--as", "hf", "--out", name), **tree(Path(name))}
    return made | {"download": download()}


def download() -> Tree:
    """A list of pictures that one address of loopback serves, two of which it does not have."""
    with tarfile.open("data/human/00000.tar") as tar:
        pictures = {f"/{entry.name}": tar.extractfile(entry).read() for entry in tar if entry.name.endswith(".jpg")}  # type: ignore[union-attr]
    root = "http://{}:{}".format(*PICTURES)
    names = [*pictures, "/none-1.jpg", "/none-2.jpg"]
    lines = [{"url": root + name, "text": f"a picture called {name[1:]}", "n": i} for i, name in enumerate(names)]
    Path("list.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    polite = ("--allow-private", "127.0.0.0/8", "--host-rate", 0, "--thread-count", 2, "--retries", 0)
    kept = ("--caption-col", "text", "--save-additional-columns", "n", "--shard-size", 4)
    with serve(pictures):
        said = capfilt("download", "list.jsonl", "--out", "download", *kept, *polite)
    return {SAID: said, **tree(Path("download"), dated=True)}


@contextmanager
def serve(pictures: dict[str, bytes]) -> Iterator[None]:
    """A web server with these pictures. Waits for its address, where another of these tests runs beside."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            data = pictures.get(self.path)
            self.send_response(404 if data is None else 200)
            self.send_header("Content-Length", str(len(data or b"")))
            self.end_headers()
            self.wfile.write(data or b"")

        def log_message(self, format: str, *args: object) -> None:
            pass

    for _ in range(300):
        try:
            server = http.server.ThreadingHTTPServer(PICTURES, Handler)
            break
        except OSError as error:
            problem = error
            time.sleep(0.2)
    else:
        sys.exit(f"{PICTURES} cannot be listened at: {problem}")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()


def date(folder: Path) -> None:
    """Give every shard a time of writing of its own: two of one name, size and time are told apart by their paths."""
    for i, path in enumerate(sorted(folder.rglob("*.tar"))):
        os.utime(path, (TIME + i, TIME + i))


# ---- runs that were cut ----

PLACES = {
    "captioner": ("bootstrap.yaml", "after", "round-1/captioner/states/000000002/state.json"),
    "annotate": ("bootstrap.yaml", "before", "round-1/ledger/annotate/00001.json"),
    "pretrain": ("bootstrap.yaml", "after", "round-1/pretrain/states/000000002/state.json"),
    "stage-1": ("blip2.yaml", "after", "round-1/stage-1/states/000000002/state.json"),
    "stage-2": ("blip2.yaml", "after", "round-1/stage-2/states/000000002/state.json"),
}
"""The recipe of each cut run, and where it was killed: before that file got its name, or after."""


def cut(name: str) -> None:
    """Begin the bootstrap and end this process, as a kill does, at its place. Shards are as if written a second apart
    from `TIME` on."""
    recipe, when, place = PLACES[name]
    seconds, reached = itertools.count(TIME + 1), []

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if reached == [threading.get_ident()] and event != "os.kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if event != "os.rename" or arguments[3] < 0:  # torch names its files by their paths
            return
        source, target, source_folder, target_folder = arguments
        path = f"{os.readlink(f'/proc/self/fd/{target_folder}')}/{os.fsdecode(target)}"
        if path.endswith(".tar"):
            os.utime(source, (second := next(seconds), second), dir_fd=source_folder)
        if path.endswith(place):
            if when == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            reached.append(threading.get_ident())

    sys.addaudithook(hook)
    said = capfilt("bootstrap", recipe, "--out", name)
    sys.exit(f"{name} was not cut, {place} never came: {said}")


def pack(folders: Sequence[Path]) -> None:
    """Put cut runs into one archive, in which nothing tells of where they were made. Their locks stay out: a driver
    that cannot be seen from here is watched for a minute."""
    with tarfile.open(CUTS, "w:xz", preset=9) as tar:
        for folder in folders:
            for path in sorted(path for path in folder.rglob("*") if path.is_file()):
                if re.fullmatch(r"lock-\d+\.json", path.name):
                    continue
                name = re.sub(
                    r"(\.capfilt-part-).+-\d+-(\w+)$", r"\1elsewhere-1-\2", str(path.relative_to(folder.parent))
                )
                entry, data = tarfile.TarInfo(name), path.read_bytes()
                if path.name == "rows.json":  # a training's own list of its shards, by their whole paths
                    data = data.replace(str(folder.parent).encode(), b"/elsewhere")
                entry.size, entry.mtime = len(data), int(path.stat().st_mtime) if path.suffix == ".tar" else TIME
                tar.addfile(entry, io.BytesIO(data))


def resume() -> Tree:
    """Give the same command to every cut run; what its folder is then, and what of it was there before."""
    with tarfile.open(CUTS.name) as tar:
        tar.extractall(".", filter="data")
    made: Tree = {}
    for name, (recipe, _, _) in PLACES.items():
        result = bootstrap(recipe, name)
        kept = sorted(path for path in Path(name).rglob("*") if path.is_file() and path.stat().st_mtime < TIME + 1000)
        made[name] = {"run": result, "kept": [str(path.relative_to(name)) for path in kept]}
    return made


# ---- the command line of this file ----


def whole() -> Tree:
    """Every verb; where the first fails, the others have nothing to work on."""
    result = {"bootstrap": bootstrap("bootstrap.yaml", "run"), "blip2": bootstrap("blip2.yaml", "blip2")}
    failed = any(isinstance(run[SAID], str) for run in result.values())
    return result | ({} if failed else verbs())


RUNS: dict[str, Callable[[], Tree]] = {"whole": whole, "resume": resume}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cuts", action="store_true", help="cut new runs too; only with the commit that is to be held")
    parser.add_argument("what", nargs="*", help="for the tests: one of the runs, or several, each in its folder")
    given = parser.parse_args()
    if any(os.environ.get(name) != value for name, value in AVX2.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **AVX2})
    if unknown := [what for what in given.what if what not in (*RUNS, *PLACES)]:
        parser.error(f"found {unknown[0]}, allowed: {', '.join((*RUNS, *PLACES))}")
    if not given.what:
        regenerate(given.cuts)
    elif given.what[0] in PLACES:
        cut(given.what[0])
    else:
        json.dump({what: in_folder(what) for what in given.what}, sys.stdout)


def in_folder(what: str) -> Tree:
    """Do one of `RUNS` in the folder of its name."""
    home = os.getcwd()
    os.chdir(what)
    try:
        return RUNS[what]()
    finally:
        os.chdir(home)


def regenerate(cuts: bool) -> None:
    """Write all goldens."""
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        if cuts:
            provide(work)
            for name in PLACES:
                if (code := begin(work, name).returncode) != -signal.SIGKILL:
                    sys.exit(f"{name} left with {code}")
            pack([work / name for name in PLACES])
        result = made(work)
        write("runs", result["whole"])
        write("cuts", {"kept": {name: run["kept"] for name, run in result["resume"].items()}})


def begin(work: Path, *what: str) -> subprocess.CompletedProcess[str]:
    """Do some of `RUNS`, or one of `PLACES`, in another process."""
    return subprocess.run([sys.executable, __file__, *what], cwd=work, capture_output=True, text=True, check=False)


def made(work: Path) -> Tree:
    """What came of all `RUNS`, which are made in folders of `work`."""
    for what in RUNS:
        provide(work / what)
    done = begin(work, *RUNS)
    if done.returncode:
        sys.exit(f"it left with {done.returncode}: {done.stderr}")
    result: Tree = json.loads(done.stdout)
    if wrong := re.findall(r"left with \d.*?\\n|left with \d.*?\"", done.stdout):
        sys.exit(wrong[0])
    return result


def provide(folder: Path) -> None:
    """Make a folder with what the runs begin from."""
    folder.mkdir(exist_ok=True)
    for path in (*HERE.glob("*.yaml"), *HERE.glob(CUTS.name)):
        shutil.copy(path, folder)


def write(name: str, result: Tree) -> None:
    """Write a golden: a line for each file."""
    head = f'{{\n "commit": "{MADE_BY}",\n'
    parts = [
        f' "{part}": {{\n' + ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in own.items()) + "\n }"
        for part, own in result.items()
    ]
    (HERE / f"{name}.json").write_text(head + ",\n".join(parts) + "\n}\n")


if __name__ == "__main__":
    main()
