"""Which score tells wrong web texts from right ones? The table of docs/scores.md, on the embedded world.

    python benchmarks/scores_world.py --out runs/scores --encoder models/all-MiniLM-L6-v2

A BLIP and a CLIP are pretrained in miniature on the demo's web and human pairs and fine-tuned on the human ones, as in
families.py; the BLIP's captioner writes eight texts for each of the 4,000 web images, its filter gives itm and itc,
and `--add-score` the others. The weights of the fused scores are chosen on the images whose uid is even in its last
digit; every area under the ROC curve is of the others. What is done is not done again.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import numpy as np
from families import KINDS, OTHERWISE, USUAL, capfilt, train, write_world

FUSED = (("itc", "sieve"), ("itm", "sieve"), ("itm", "itc", "sieve", "clip-world"))
"""What is mixed; the first two as SIEVE mixes CLIP's cosine with its own."""
STEPS = 10
"""Weights are multiples of 1 / STEPS."""


def models(args: argparse.Namespace) -> tuple[Path, Path, Path]:
    """The captioner, the filter and the CLIP."""
    world = args.out / "world"
    both = f"[{{shards: {world / 'web'}}}, {{shards: {world / 'human'}}}]"
    human, out = str(world / "human"), args.out
    blip = train("blip-tiny", out / "blip", both, args.steps, args)
    clip = train("clip-tiny", out / "clip", both, args.steps, args)
    begun = ("initial.vision=null", USUAL[1])
    captioner = train(
        "blip-tiny", out / "captioner", human, args.finetune, args, f"start={blip}", *begun,
        "train.objectives.losses={lm: 1}",
    )  # fmt: skip
    filter_ = train("blip-tiny", out / "filter", human, args.finetune, args, f"start={blip}", *begun, USUAL[0])
    tuned = train(
        "clip-tiny", out / "clip-filter", human, args.finetune, args, f"start={clip}", begun[0], *OTHERWISE["clip"]
    )
    return captioner, filter_, tuned


def scored(args: argparse.Namespace) -> tuple[dict[str, np.ndarray], np.ndarray, list[str], np.ndarray]:
    """The scores of the web texts by name, whether each text is right, its kind, and whether it is measured on."""
    import capfilt as library
    from capfilt.evaluation.known_truth import truth

    captioner, filter_, clip = models(args)
    web, run = args.out / "world/web", args.out / "annotated"
    words = ("--captioner", captioner, "--filter", filter_, "--captions", 8, "--address", args.address)
    capfilt("annotate", web, *words, "--out", run)
    specs = (f"sieve={args.encoder}", f"clip-world={clip}")
    added = itertools.chain.from_iterable(("--add-score", spec) for spec in specs)
    capfilt("annotate", web, *added, "--out", run, "--address", args.address)
    known = {sample.uid: truth(sample) for sample in library.read_shards(web)}
    rows = [row for row in library.read_annotations(run) if row.source == "web" and known[row.uid] is not None]
    names = ("itm", "itc", "sieve", "clip-world")
    low = {name: min(row.score(name) for row in rows if row.score(name) is not None) for name in names}
    values = {
        name: np.array([low[name] if row.score(name) is None else row.score(name) for row in rows]) for name in names
    }
    right, kinds = zip(*(known[row.uid] for row in rows), strict=True)
    return values, np.array(right), list(kinds), np.array([int(row.uid[-1], 16) % 2 == 1 for row in rows])


def area(values: np.ndarray, right: np.ndarray, kinds: list[str], use: np.ndarray) -> dict[str, float]:
    """The area under the ROC curve over all kinds as "all", and by kind."""
    from capfilt.evaluation.metrics import matching

    chosen = np.flatnonzero(use)
    figures = matching.report(values[chosen], right[chosen].tolist(), [kinds[i] for i in chosen], 0.5)
    return {"all": figures["auc"], **figures["auc_by_kind"]}


def best_weights(parts: list[np.ndarray], right: np.ndarray, kinds: list[str], use: np.ndarray) -> tuple[float, ...]:
    """The weights, in steps, whose sum separates best."""
    grid = itertools.product(range(STEPS + 1), repeat=len(parts))
    mixes = [tuple(w / STEPS for w in weights) for weights in grid if sum(weights) == STEPS]
    return max(
        mixes, key=lambda mix: area(sum(w * x for w, x in zip(mix, parts, strict=True)), right, kinds, use)["all"]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--encoder", type=Path, required=True, help="The sentence encoder of sieve.")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--finetune", type=int, default=400)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--address", default="local")
    args = parser.parse_args()
    args.out = args.out.absolute()
    write_world(args.out / "world")
    values, right, kinds, measured = scored(args)
    normalised = {name: (x - x.min()) / (x.max() - x.min()) for name, x in values.items()}
    table = dict(values)
    for names in FUSED:
        parts = [normalised[name] for name in names]
        mixes = {best_weights(parts, right, kinds, ~measured)}
        if len(names) == 2:
            mixes.add((0.5, 0.5))
        for mix in sorted(mixes):
            label = " + ".join(f"{w:g} {name}" for w, name in zip(mix, names, strict=True) if w)
            table[label] = sum(w * x for w, x in zip(mix, parts, strict=True))
    print(f"{measured.sum()} web texts, {(~right & measured).sum()} of them wrong")
    for row in (("score", "all", *KINDS), ["---"] * (len(KINDS) + 2)):
        print(f"| {' | '.join(row)} |")
    for name, x in table.items():
        found = area(x, right, kinds, measured)
        print(f"| {name} | {' | '.join(f'{found[kind]:.3f}' for kind in ('all', *KINDS))} |")


if __name__ == "__main__":
    main()
