"""The verbs that run a pipeline into a run folder: bootstrap, pretrain, finetune, annotate, select."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from capfilt.api import commands
from capfilt.cli.execute import call
from capfilt.cli.next_steps import after_annotate, after_pretrain, after_select
from capfilt.cli.options import (
    Address,
    Cpus,
    Debug,
    Fork,
    Json,
    MinSuccess,
    Out,
    Price,
    Sets,
    Shards,
    SizedAddress,
    Workers,
    preset_names,
    recipe_of,
    setting,
)
from capfilt.cli.tables import print_cost, print_next, print_rounds
from capfilt.cli.terminal import say

if TYPE_CHECKING:
    from capfilt.api.results import BootstrapResult


Captions = Annotated[
    int | None, typer.Option(min=1, max=1000, help="Texts to write for each image [default: 1]; BLIP-2: 10.")
]
Gpus = Annotated[
    float | None, typer.Option(min=0, help="GPUs of each worker [default: 1 where the cluster has any, else 0].")
]
Limit = Annotated[
    float,
    typer.Option(
        min=0, help="Seconds that a shard may take; on Ray it is then tried once more on another node. 0: no limit."
    ),
]


class Calibration(StrEnum):
    """What a threshold may be calibrated on, besides validation pairs."""

    labels = "labels"


CalibrateOn = Annotated[
    Calibration | None,
    typer.Option("--calibrate", help="labels: set the threshold on the labels that people gave in `capfilt review`."),
]


def bootstrap(
    recipe: Annotated[str, recipe_of("bootstrap")] = "demo",
    rounds: Annotated[
        int | None, typer.Option(min=0, help="Rounds of CapFilt after the baseline (round 0) [default: the recipe's].")
    ] = None,
    out: Annotated[
        str | None,
        typer.Option("--out", help="The run folder [default: runs/RECIPE]. The same command resumes it."),
    ] = None,
    sets: Sets = None,
    fork: Fork = None,
    price: Price = None,
    address: Address = "start",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Run CapFilt: caption, filter and pretrain, in rounds.

    Example: `capfilt bootstrap --rounds 2`, the demo on the embedded world;
    `capfilt bootstrap my.yaml --out runs/mine --set seed=1`.
    """
    call(commands.bootstrap, locals() | {"out": out or None}, _print_bootstrap)


def _print_bootstrap(done: BootstrapResult) -> None:
    print_rounds(done.record)
    say(f"summary     {done.out / 'summary.json'}")
    say(f"run folder  {done.out}")
    print_cost(done.record)
    print_next(done.out, done.record)


def pretrain(
    recipe: Annotated[str, recipe_of("pretrain")],
    out: Out,
    sets: Sets = None,
    fork: Fork = None,
    address: Address = "start",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Pretrain or fine-tune one model on shards, under Ray Train.

    Example: `capfilt pretrain blip-tiny --out runs/tiny --set 'data=shards/{00000..00009}.tar'`
    """
    call(commands.pretrain, locals(), then=lambda record: after_pretrain(fork or out, record["model"], address))


def finetune(
    recipe: Annotated[str, recipe_of("finetune")],
    out: Out,
    sets: Sets = None,
    fork: Fork = None,
    address: Address = "start",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Fine-tune a model for a downstream task: VQA, NLVR2, visual entailment, visual dialog, grounding.

    Example: `capfilt finetune entailment-tiny --out runs/ve --set start=runs/tiny/pretrain/checkpoint`
    """
    call(commands.finetune, locals(), then=lambda record: after_pretrain(fork or out, record["model"], address))


SCORES = "side, aspect, entropy, sieve=ENCODER, clip:MODEL, aesthetic|nsfw|watermark=HEAD@MODEL"
Without = Annotated[
    str | None,
    typer.Option(
        "--without", help="The --out of `capfilt dedup` or `capfilt decontaminate`: what these found is left out."
    ),
]
AnnotateRecipe = Annotated[
    str | None,
    typer.Option(
        help="A preset of pipelines/annotate/, or a YAML [default: one text, as CapFilt].",
        autocompletion=preset_names("annotate"),
    ),
]


def annotate(
    shards: Shards,
    out: Out,
    captioner: Annotated[
        str | None,
        typer.Option(help="What writes the texts: a model folder, hf:FOLDER-OR-NAME (a VLM), or openai:URL#MODEL."),
    ] = None,
    filter_: Annotated[
        str | None, typer.Option("--filter", help="Model folder that scores them and the web texts.")
    ] = None,
    captions: Captions = None,
    recipe: AnnotateRecipe = None,
    seed: Annotated[int, typer.Option(help="Seed of the sampled texts.")] = 0,
    val: Annotated[
        str | None, typer.Option(help="Human pairs: also measure the filter's AUC on them against shuffled ones.")
    ] = None,
    scores: Annotated[
        list[str] | None,
        typer.Option("--scores", metavar="SPEC", help=f"A score beside itm and itc, several by several: {SCORES}."),
    ] = None,
    add_score: Annotated[
        list[str] | None,
        typer.Option(
            "--add-score", metavar="SPEC", help="Only add this score to what --out has annotated; no model captions."
        ),
    ] = None,
    without: Without = None,
    keep_vectors: Annotated[
        bool, typer.Option("--keep-vectors", help="Keep the filter's vectors of the images, as `capfilt embed` would.")
    ] = False,
    sets: Annotated[list[str] | None, setting("E.g. decode.method=beam, decode.top_p=0.95, batch_size=128.")] = None,
    gpus: Gpus = None,
    workers: Workers = 0,
    cpus: Cpus = None,
    limit: Limit = 0,
    retry: Annotated[
        str | None,
        typer.Option(metavar="failed", help="failed: repeat the shards in which samples or captions failed."),
    ] = None,
    min_success: MinSuccess = 0,
    fork: Fork = None,
    price: Price = None,
    address: Address = "start",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write synthetic texts for images and score them and the web texts.

    Example: `capfilt annotate shards/ --captioner CAP --filter FILT --out runs/a --captions 10`
    Example: `capfilt annotate shards/ --add-score side --add-score clip:MODEL --out runs/a`
    """
    call(commands.annotate, locals(), then=lambda _: after_annotate(shards, fork or out, address))


Annotations = Annotated[
    str,
    typer.Option(help="The folder of their annotations/: the --out of `capfilt annotate`, or a round of a bootstrap."),
]
PolicyRecipe = Annotated[
    str | None,
    typer.Option(
        help="A preset of pipelines/select/, or a YAML [default: itm >= 0.5, as CapFilt].",
        autocompletion=preset_names("select"),
    ),
]
Threshold = Annotated[
    str | None,
    typer.Option(
        metavar="NUMBER|calibrated|keep-rate|none",
        help="Texts at or above it pass; calibrated: set on human pairs; keep-rate: so that a share passes;"
        " none: all pass [default: 0.5; with --top-k, none].",
    ),
]
Score = Annotated[
    str | None,
    typer.Option(
        metavar="itm|itc|NAME",
        help="What it compares: itm, itc, or a score added by `annotate --add-score` [default: itm].",
    ),
]
KeepRate = Annotated[float | None, typer.Option(help="The share of all texts to keep; implies --threshold keep-rate.")]
SamplesSeen = Annotated[
    int | None,
    typer.Option(help="Samples that a training will see; sets the share so that few are repeated (--max-repeats)."),
]
MaxRepeats = Annotated[
    float | None, typer.Option(help="With --samples-seen: how often each kept text may be seen [default: 4].")
]
TopK = Annotated[int | None, typer.Option(help="How many of an image's texts are kept, the best by itc; BLIP-2: 2.")]
Keep = Annotated[
    str | None,
    typer.Option(
        metavar="all|web-first|best",
        help="Of an image's texts that pass: all; web-first: one, synthetic only where no web text passes; best:"
        " the best one by itc [default: all].",
    ),
]
PolicySets = Annotated[
    list[str] | None, setting("Any key of the policy, e.g. other_threshold=0.3, carry=false.", "a=b")
]
HumanPairs = Annotated[str | None, typer.Option(help="Human pairs, for --threshold calibrated.")]
CalibratedFilter = Annotated[str | None, typer.Option("--filter", help="The filter, for --threshold calibrated.")]


def select(
    shards: Annotated[list[str], typer.Argument(help="The shards that were annotated.")],
    annotations: Annotations,
    out: Out,
    recipe: PolicyRecipe = None,
    threshold: Threshold = None,
    score: Score = None,
    keep_rate: KeepRate = None,
    samples_seen: SamplesSeen = None,
    max_repeats: MaxRepeats = None,
    top_k: TopK = None,
    keep: Keep = None,
    sets: PolicySets = None,
    val: HumanPairs = None,
    filter_: CalibratedFilter = None,
    calibrate: CalibrateOn = None,
    without: Without = None,
    workers: Workers = 0,
    cpus: Cpus = None,
    min_success: MinSuccess = 0,
    fork: Fork = None,
    address: SizedAddress = "by-size",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Apply a policy to annotations and write the cleaned shards; no model is needed.

    Example: `capfilt select shards/ --annotations runs/a --out runs/clean --threshold 0.5`
    """
    call(commands.select, locals(), then=lambda record: after_select(fork or out, record["dataset"], address))
