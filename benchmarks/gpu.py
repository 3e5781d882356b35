"""Everything that is checked and measured on one GPU, in one command of at most eight minutes.

    python benchmarks/gpu.py --out gpu-h200
    python benchmarks/gpu.py --out gpu-h200 --only annotate,decode

First the tests that need a GPU, then annotation beside transformers and the floor, the decode step, a training step
beside the plain one, `capfilt bench`, and reading of pictures. Each part is a process with a time limit of its own;
what it writes lies in `OUT/PART.txt`, and one that fails or runs over its limit does not stop the others. Neither Ray
nor img2dataset nor faiss need be installed.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

TESTS = ["-m", "pytest", "-q", "-c", "tests/gpu/pytest.ini", "tests/gpu"]
BENCH = ["-m", "capfilt", "bench"]
PARTS: dict[str, tuple[list[str], int]] = {
    "tests": (TESTS, 90),
    "annotate": (["benchmarks/annotate_gpu.py", "--without", "by hand"], 80),
    "shared": (["benchmarks/annotate_gpu.py", "--shared", "--captions", "10", "--batches", "64", "--images", "64"], 45),
    "decode": (["benchmarks/decode_gpu.py"], 45),
    "train": (["benchmarks/pretrain.py", "gpu", "--pairs", "64"], 45),
    "bench-annotate": ([*BENCH, "annotate", "--set", "model=blip/base"], 70),
    "bench-train": ([*BENCH, "train", "--set", "model=blip/base"], 70),
    "pictures": (["benchmarks/decode_pictures.py"], 35),
}
"""By part what python is asked to run, and the seconds that it may take: 480 in all."""


def run(name: str, out: Path) -> str:
    """Run a part, and end it with all that it started at its limit; how it went."""
    words, limit = PARTS[name]
    began = time.perf_counter()
    with (out / f"{name}.txt").open("w") as file:
        part = subprocess.Popen([sys.executable, *words], stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code = part.wait(limit)
            ended = "done" if code == 0 else f"failed ({code})"
        except subprocess.TimeoutExpired:
            os.killpg(part.pid, signal.SIGKILL)
            part.wait()
            ended = "ended at its limit"
    return f"{name}: {ended}, {time.perf_counter() - began:.0f} s"


def main() -> None:
    """Run what is asked, in the order of the table; exits with 1 where a part did not end well."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", default=",".join(PARTS), help="parts, by commas")
    options = parser.parse_args()
    asked = options.only.split(",")
    if unknown := [name for name in asked if name not in PARTS]:
        parser.error(f"no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    options.out.mkdir(parents=True, exist_ok=True)
    well = True
    for name in asked:
        said = run(name, options.out)
        well = well and ": done" in said
        print(said, flush=True)
    sys.exit(0 if well else 1)


if __name__ == "__main__":
    main()
