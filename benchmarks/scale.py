"""What each step costs that grows with the number of shards: ledgers and tables that the script writes itself.

    python benchmarks/scale.py 1000 20000 100000 --out /tmp/scale

For each number a run folder is made with so many shards of `--images` images (annotations, verdicts, both ledgers, and
a tar of ten kilobytes of zeros each, which no step may read), and each step is measured in a process of its own: CPU
seconds (user and system: other work on the machine does not count), peak memory over that of a process that has only
imported, and microseconds a shard. The last column is the line through the two largest numbers at a million shards.
`--steps` chooses some; with another capfilt on PYTHONPATH the same is measured of that one.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from capfilt.cluster.session import connect
from capfilt.cluster.worker_pool import Resources
from capfilt.config import Config
from capfilt.data import annotations, shards
from capfilt.data.loading.config import Source
from capfilt.data.policy import PolicyConfig, Pool
from capfilt.runs import stage_status
from capfilt.runs.ledger import Completion, Input, Ledger, Output, check_balance, fingerprint
from capfilt.runs.progress import Progress
from capfilt.runs.run import Run
from capfilt.runs.tally import Tally
from capfilt.stages import runner

QUIET = Progress(quiet=True)
TARGET = 1_000_000
OWN = 200
"""Shards at the end whose images are their own; the others are links to one of every `LINKS`."""
LINKS = 50_000


def names(num: int) -> list[str]:
    return [f"{i:07d}" for i in range(num)]


# ---- the run folder ----


def make(run: Path, num: int, images: int) -> None:
    """Write the run folder of a `select` beside its annotations."""
    for folder in ("annotations", "dataset", "ledger/annotate", "ledger/select"):
        (run / folder).mkdir(parents=True)
    urls = [str(run / f"dataset/{name}.tar") for name in names(num)]
    (run / "plan.json").write_text(json.dumps({"verb": "annotate", "shards": urls, "format": 2}))
    (run / "recipe.yaml").write_text("")
    rng, tally = np.random.default_rng(0), tally_of(images)
    table = table_of(images, rng)
    for i, name in enumerate(names(num)):
        paths = [run / f"annotations/{name}.parquet", run / f"dataset/{name}.tar", run / f"dataset/{name}.parquet"]
        if i % LINKS and i < num - OWN:  # the bytes of another: what is measured is the work, and no disk
            for path in paths:
                os.link(path.with_name(f"{i - i % LINKS:07d}{path.suffix}"), path)
        else:
            write(paths, named(table, name, images))
        for stage, outputs in (("annotate", paths[:1]), ("select", paths[1:])):
            record(run, stage, name, outputs, tally[stage])
    for stage in ("annotate", "select"):
        ledger = Ledger(run, stage)
        plan = stage_status.StagePlan(stage, num)
        stage_status.write_plan(ledger, plan, dict.fromkeys(names(num), "f" * 64))
        total = sum((tally[stage] for _ in range(3)), Tally.zero())  # any: `status` shows it, no step checks it
        pace = {"done": num, "seconds": 60.0, "in_all": num, "tally": total.to_json()}
        (run / f"ledger/{stage}.pace.json").write_text(json.dumps(pace))


def named(table: pa.Table, shard: str, images: int) -> pa.Table:
    """The table with keys and uids of its own."""
    keys = [f"{shard}{row // 2:05d}" for row in range(2 * images)]
    uids = [hashlib.sha256(key.encode()).hexdigest() for key in keys]
    for at, values in enumerate((keys, [uid[:32] for uid in uids], uids)):
        table = table.set_column(at, annotations.SCHEMA.field(at), pa.array(values, pa.string()))
    return table


def write(paths: list[Path], table: pa.Table) -> None:
    """The annotations of a shard, a tar of zeros and the verdicts."""
    why = np.where(table["itm"].to_numpy() < 0.5, "itm below threshold", "")
    pq.write_table(table, paths[0], compression="zstd")
    paths[1].write_bytes(bytes(10240))
    verdict = pa.array(np.where(why == "", "kept", "dropped"))
    pq.write_table(table.append_column("verdict", verdict).append_column("why", pa.array(why)), paths[2])


def record(run: Path, stage: str, name: str, outputs: list[Path], tally: Tally) -> None:
    """A completion, without the two fsyncs of a commit."""
    made = tuple(Output(str(path.relative_to(run)), path.stat().st_size, "a" * 64) for path in outputs)
    done = Completion(name, "f" * 64, made, tally, Input(10240, "c" * 64, "1700000000.5"))
    (run / f"ledger/{stage}/{name}.json").write_text(json.dumps(done.to_json()))


def tally_of(images: int) -> dict[str, Tally]:
    texts = {"in": Counter(web=images, synthetic=images)}
    samples, members = Counter({"in": images, "kept": images}), Counter({"in": 3 * images, "used": 3 * images})
    annotated = Tally(samples=samples, texts={**texts, "kept": texts["in"], "dropped": Counter()}, members=members)
    half, reason = images // 2, "itm below threshold"
    kept, dropped = Counter(web=half, synthetic=half), {f"{s}: {reason}": images - half for s in ("web", "synthetic")}
    texts |= {"kept": kept, "dropped": Counter(dropped)}
    return {"annotate": annotated, "select": Tally(samples=samples, texts=texts, members=members)}


def table_of(images: int, rng: np.random.Generator) -> pa.Table:
    """The annotations of a shard, but for what identifies its images."""
    words = np.array([*"abcdefghij", "dog", "cat", "street", "woman", "umbrella", "bicycle"])
    rows = []
    for i in range(images):
        for source in ("synthetic", "web"):
            text = " ".join(rng.choice(words, 9))
            score = float(np.float32(rng.random()))
            by = ("c" * 70 if source == "synthetic" else "", "f" * 70)
            rows.append((str(i), "", "", source, 0, text, score, score / 2, *by, 0, 1, "ok", ""))
    columns = dict(zip(annotations.SCHEMA.names, zip(*rows, strict=True), strict=True))
    return pa.Table.from_pydict({name: list(values) for name, values in columns.items()}, annotations.SCHEMA)


# ---- the steps ----


class Done(Config):
    """A stage of which everything is done; its inputs are looked at, as those of annotate and select are."""

    out: Path

    @property
    def name(self) -> str:
        return "select"

    def identity(self, item: str) -> str:
        return "f" * 64

    def open(self) -> Callable[[str], None]:
        raise AssertionError("all of it is done")


def step_ledger(run: Path, num: int) -> None:
    """Read every completion."""
    assert Ledger(run, "select").total().samples["kept"]


def step_balance(run: Path, num: int) -> None:
    """Compare verdicts with annotations at the end of `select`."""
    check_balance(Ledger(run, "annotate"), Ledger(run, "select"), names(num))


def step_rerun(run: Path, num: int) -> None:
    """Find that all of a stage is done."""
    items = {name: f"{run}/dataset/{name}.tar" for name in names(num)}
    with connect("local") as session:
        runner.run_stage(session, Done(out=run), items, Resources(), QUIET, "select")


def step_status(run: Path, num: int) -> None:
    """`capfilt status`."""
    from capfilt.pipelines.inspect import status

    assert status.run(run)["stages"][0]["done"] == num


def step_count(run: Path, num: int) -> None:
    """Count the rows and take the sha256 of what `select` wrote, as a training does before its first step."""
    from capfilt.stages import count_pairs

    source = Source(shards=str(run / "dataset"))
    urls = shards.expand(source.shards)
    with connect("local") as session:
        try:
            from capfilt.stages.count_pairs import written_shards
        except ImportError:  # an older capfilt reads every tar
            count_pairs.shard_digests(session, urls, {}, run.parent / f"counts-{os.getpid()}", QUIET)
            return
        written = written_shards(urls)
        made = {url: one.sha256 for url, one in written.items()}
        assert len(count_pairs.shard_digests(session, urls, made, run, QUIET)) == num
        count_pairs.count_rows(session, [source], "all", run, QUIET, written=written)


def step_keep_rate(run: Path, num: int) -> None:
    """The pass over all scores before `select --set threshold=keep-rate`, by one process."""
    from capfilt.data.policy import resolve

    resolve(PolicyConfig(threshold="keep-rate", keep_rate=0.3), Pool(run / "annotations", names(num)), None)


def step_keep_rate_again(run: Path, num: int) -> None:
    """The same in a rerun of what is done."""
    try:
        from capfilt.stages import resolve
    except ImportError:
        step_keep_rate(run, num)
        return
    policy, pool = PolicyConfig(threshold="keep-rate", keep_rate=0.3), Pool(run / "annotations", names(num))
    key = resolve.fingerprint(policy.record(), resolve._content(policy, pool))
    rule = {"of": key, "rule": policy.rule(0.7).model_dump(mode="json"), "pool": {}}
    if not (run / "ledger" / resolve.RULE).is_file():
        (run / "ledger" / resolve.RULE).write_text(json.dumps(rule))
        return  # the first call only prepares
    with connect("local") as session:
        found = resolve.resolve_once(session, policy, pool, None, run, Resources(), QUIET)
    assert found.rule.threshold == 0.7


def step_index(run: Path, num: int) -> None:
    """Write the index of images, by one process."""
    from capfilt.stages import image_index

    with connect("local") as session:
        image_index.extend(session, Ledger(run, "annotate"), Resources(), QUIET)


def step_explain(run: Path, num: int) -> None:
    """`capfilt explain`, by the key of an image in the last shard."""
    from capfilt.pipelines.inspect import explain

    assert explain.run(run, f"{num - 1:07d}00000")["found"]


def step_report(run: Path, num: int) -> None:
    """`capfilt report`, without pictures."""
    from capfilt.reporting.gallery import make_gallery
    from capfilt.reporting.sampling import RoundSource

    rule = PolicyConfig(threshold=0.5).rule(0.5)
    source = RoundSource(1, run / "annotations", run / "dataset", rule, "itm", 0.5, "", "")
    assert make_gallery([source], {}, {}).rounds


def step_report_undecided(run: Path, num: int) -> None:
    """The same before there are verdicts: each text is judged."""
    from capfilt.reporting.gallery import make_gallery
    from capfilt.reporting.sampling import RoundSource

    rule = PolicyConfig(threshold=0.5).rule(0.5)
    assert make_gallery([RoundSource(1, run / "annotations", None, rule, "itm", 0.5, "", "")], {}, {}).rounds


def step_plan(run: Path, num: int) -> None:
    """Plan a run: shards by braces, their stats, names and fingerprints, what is done of them, and both plans."""
    urls = shards.expand(str(run / f"dataset/{{{0:07d}..{num - 1:07d}}}.tar"))
    out = run.parent / f"planned-{os.getpid()}"
    opened = Run.open(out, "", {"verb": "annotate", "shards": urls})
    named = shards.by_name(urls)
    identities = {name: fingerprint(shards.stat(url)) for name, url in named.items()}
    ledger = Ledger(opened.folder, "annotate")
    assert not ledger.recorded_shards()
    stage_status.write_plan(ledger, stage_status.StagePlan("annotate", num), identities)
    shutil.rmtree(out)


STEPS: dict[str, Callable[[Path, int], None]] = {
    name.removeprefix("step_"): function for name, function in list(globals().items()) if name.startswith("step_")
}
"""In this order: what writes the index comes before what uses it."""


# ---- measuring ----


def cpu() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def measure(step: str, run: Path, num: int) -> dict[str, float]:
    """One step, in this process."""
    for warm in ("numpy", "pyarrow", "capfilt.reporting.gallery", "capfilt.pipelines.inspect.explain"):
        __import__(warm)
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    spent = cpu()
    STEPS[step](run, num)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"cpu": cpu() - spent, "wall": time.perf_counter() - began, "mb": (peak - before) / 1000}


def table(results: dict[str, dict[int, dict[str, float]]], numbers: list[int]) -> str:
    """The results as Markdown."""
    heads = [f"{n:,}: CPU s" for n in numbers] + [f"µs a shard at {numbers[-1]:,}", f"MB at {numbers[-1]:,}"]
    lines = [f"| step | {' | '.join(heads)} | at {TARGET:,}: CPU s | MB |", "|---" * (len(heads) + 3) + "|"]
    for step, by_number in results.items():
        if not by_number:
            continue
        cells = [f"{by_number[n]['cpu']:.2f}" if n in by_number else "" for n in numbers]
        known = sorted(by_number)
        last, base = by_number[known[-1]], by_number[known[-2]] if len(known) > 1 else {"cpu": 0, "mb": 0}
        span = known[-1] - (known[-2] if len(known) > 1 else 0)
        far = {key: last[key] + (last[key] - base[key]) / span * (TARGET - known[-1]) for key in ("cpu", "mb")}
        cells += [f"{last['cpu'] / known[-1] * 1e6:.0f}", f"{last['mb']:.0f}"]
        lines.append(f"| {step} | {' | '.join(cells)} | {max(far['cpu'], 0):.0f} | {max(far['mb'], 0):.0f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("numbers", type=int, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--images", type=int, default=10, help="of a shard")
    parser.add_argument("--steps", default=",".join(STEPS))
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    words: Any = parser.parse_args()
    chosen, numbers = words.steps.split(","), sorted(words.numbers)
    if words.one:
        json.dump(measure(chosen[0], words.out, numbers[0]), sys.stdout)
        return
    results: dict[str, dict[int, dict[str, float]]] = {step: {} for step in chosen}
    for num in numbers:
        run = words.out / f"run-{num}-{words.images}"
        if not run.is_dir():
            make(run, num, words.images)
        for step in chosen:
            command = [sys.executable, __file__, str(num), "--out", str(run), "--steps", step, "--one"]
            times = 2 if step == "keep_rate_again" else 1
            done = [subprocess.run(command, capture_output=True, text=True, check=False) for _ in range(times)]
            if done[-1].returncode:
                sys.stderr.write(f"{step} at {num:,}: {done[-1].stderr.strip().splitlines()[-1:]}\n")
                continue
            results[step][num] = json.loads(done[-1].stdout)
            sys.stderr.write(f"{step} {num:,}: {results[step][num]}\n")
    sys.stdout.write(table(results, numbers))


if __name__ == "__main__":
    main()
