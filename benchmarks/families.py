"""Families side by side: the same embedded world, as many pairs, for each the table of docs/families.md.

    python benchmarks/families.py blip albef clip --out runs/families

Each family is pretrained as its recipe in miniature says (`pipelines/pretrain/FAMILY-tiny.yaml`) on the demo's web and
human pairs, then fine-tuned as a filter on the human ones, and examined: retrieval on the 250 test images, whose pairs
of colour and shape were never trained on, and as a filter the area under the ROC curve by the kind of wrongness of the
4,000 web texts. Steps and batches are the same for all (--steps, --finetune, --batch). What is done is not done again;
the figures lie in OUT/FAMILY-SEED.json, and a table of all that lie there is printed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

KINDS = ("other", "boilerplate", "seo", "truncated", "attribute")
RECIPES = {"blip2": "blip2-tiny-stage1"}
USUAL = ("train.objectives.losses={itc: 1, itm: 1}", "train.optimizer.lr=1e-3")
"""How a filter is fine-tuned."""
OTHERWISE = {
    "clip": ("train.objectives.losses={itc: 1}",),
    "vilt": (
        "model={extends: vilt/tiny, vision: {depth: 3}, heads: [rank]}",
        "train.objectives={task: vilt-retrieval, wrong_texts: 7}",
    ),
    "vlmo": ("train.objectives.losses={itc: 1, itm: 1, mlm: 0.5}", "train.optimizer.lr=2e-3"),
}
"""What is said later than that for a family that gives no such losses, or learns nothing by them in so few steps."""
HEAD = ("family", "parameters", "steps/s", "TR@1", "IR@1", "CIDEr", "score", "AUC", *KINDS)


def write_world(folder: Path) -> None:
    """The demo's world."""
    from capfilt import presets
    from capfilt.data.synthetic import world

    tree = yaml.safe_load(presets.find("pipelines", "bootstrap/demo").read_text())
    config = world.WorldConfig(**tree["data"]["world"])
    for split in world.SPLITS:
        if not (folder / split / "sizes.json").exists():
            world.write(config, 0, folder, split)


def capfilt(*words: object) -> dict[str, Any]:
    """Run a verb on this machine without Ray's cluster being shared; its result."""
    command = [sys.executable, "-m", "capfilt", *map(str, words), "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def train(recipe: str, out: Path, data: str, steps: int, args: argparse.Namespace, *sets: str) -> Path:
    """A training of a recipe; the folder of its model."""
    common = (f"data={data}", f"train.steps={steps}", f"train.loader.batch_size={args.batch}", f"seed={args.seed}")
    words = itertools.chain.from_iterable(("--set", each) for each in (*common, *sets))
    return Path(capfilt("pretrain", recipe, "--out", out, *words, "--address", args.address)["model"])


def speed(training: Path, batch: int) -> float:
    """Steps a second, the median of the log."""
    lines = [json.loads(line) for line in (training / "pretrain/log.jsonl").read_text().splitlines()]
    return statistics.median(line["samples_per_second"] for line in lines if "samples_per_second" in line) / batch


def areas(model: Path, web: Path) -> dict[str, dict[str, float]]:
    """By score that the filter gives: the area over all kinds as "all", and by kind."""
    from capfilt import load_model
    from capfilt.data import shards
    from capfilt.data.sample import Sample
    from capfilt.evaluation.known_truth import truth
    from capfilt.evaluation.metrics import matching

    loaded = load_model(model)
    samples = [item for url in shards.expand(str(web)) for item in shards.read(url) if isinstance(item, Sample)]
    known = [said for sample in samples if (said := truth(sample)) is not None]
    texts = [str(sample.captions[0]["text"]) for sample in samples]
    scored: list[Any] = []
    for start in range(0, len(samples), 250):
        part = slice(start, start + 250)
        scored += loaded.score([sample.image for sample in samples[part]], texts[part])
    found = {}
    for name in ("itm", "itc"):
        values = [getattr(each, name) for each in scored]
        if all(value is not None for value in values):
            figures = matching.report(values, [matches for matches, _ in known], [kind for _, kind in known], 0.5)
            found[name] = {"all": figures["auc"], **figures["auc_by_kind"]}
    return found


def measure(family: str, args: argparse.Namespace) -> dict[str, Any]:
    """Everything about one family."""
    from capfilt.models import blank
    from capfilt.models.checkpoints import store

    out, recipe, world = args.out / f"{family}-{args.seed}", RECIPES.get(family, f"{family}-tiny"), args.out / "world"
    both = f"[{{shards: {world / 'web'}}}, {{shards: {world / 'human'}}}]"
    # A Q-Former reads the frozen tower of the table's BLIP, whose training comes on top of its own.
    tower = args.out / f"blip-{args.seed}/pretrain/pretrain/checkpoint"
    initial = (f"initial.vision={tower}",) if family == "blip2" else ()
    model = train(recipe, out / "pretrain", both, args.steps, args, *initial)
    sets = (*USUAL[1:], *OTHERWISE[family]) if family in OTHERWISE else USUAL
    begun = (f"start={model}", "initial.vision=null")
    tuned = train(recipe, out / "filter", str(world / "human"), args.finetune, args, *begun, *sets)
    examined = {
        what: capfilt("evaluate", of, world / "test", "--out", out / f"evaluate-{what}", "--address", args.address)
        for what, of in (("pretrained", model), ("fine-tuned", tuned))
    }
    weights = blank(store.architecture(store.find(str(model))))
    return {
        "family": family,
        "seed": args.seed,
        "budget": {"steps": args.steps, "finetune": args.finetune, "batch": args.batch},
        "parameters": sum(p.numel() for p in weights.parameters()),
        "steps_per_second": round(speed(out / "pretrain", args.batch), 2),
        "retrieval": {what: figures["retrieval"] for what, figures in examined.items()},
        "captioning": examined["pretrained"].get("captioning", {}),
        "auc": areas(tuned, world / "web"),
    }


def rows(folder: Path) -> Iterator[tuple[str, ...]]:
    """The rows of the table, a row a score of each family."""
    for path in sorted(folder.glob("*-*.json")):
        each = json.loads(path.read_text())
        recall = [f"{each['retrieval'][what][key]:.1f}" for key in ("tr@1", "ir@1") for what in each["retrieval"]]
        shared = (each["family"], f"{each['parameters']:,}", f"{each['steps_per_second']:.1f}")
        cider = f"{each['captioning']['cider']:.1f}" if each.get("captioning") else ""
        measured = (" / ".join(recall[:2]), " / ".join(recall[2:]), cider)
        for score, area in each["auc"].items():
            yield (*shared, *measured, score, *(f"{area[kind]:.3f}" for kind in ("all", *KINDS)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--finetune", type=int, default=400)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--address", default="local")
    args = parser.parse_args()
    args.out = args.out.absolute()
    write_world(args.out / "world")
    for family in args.families:
        path = args.out / f"{family}-{args.seed}.json"
        if not path.exists():
            path.write_text(json.dumps(measure(family, args), indent=1) + "\n")
    for row in (HEAD, ["---"] * len(HEAD), *rows(args.out)):
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
