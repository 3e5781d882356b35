"""The training loop: the same for pretraining and for fine-tuning captioner and filter; only the job differs.

A job is a frozen config that any process can be handed. Draws inside a step come from (seed, step, rank), so a
resumed run ends with the same weights as an undisturbed one (bit for bit in fp32 on CPUs of one kind with the same
number of threads; kernels of a GPU add in orders of their own unless `resources.deterministic` asks for others), and
its log has no line twice.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Mapping
from contextlib import closing

import torch
from torch import Tensor

from capfilt.config import digest
from capfilt.data import shards
from capfilt.data.images.preprocess import ImageFormat
from capfilt.data.loading.loader import Batch, Loader
from capfilt.data.loading.regions import RegionLoader
from capfilt.data.loading.task_rows import loader_of
from capfilt.data.text.bert_tokenizers import BertTokenizer
from capfilt.data.text.tokenizer import Tokenizer
from capfilt.errors import ModelError
from capfilt.models import Model, build, preprocess_of
from capfilt.models.checkpoints import store
from capfilt.models.checkpoints.initial_weights import initialise
from capfilt.objectives.interface import Task
from capfilt.objectives.masking import Vocabulary
from capfilt.objectives.tasks import build_task
from capfilt.runs.ledger import Ledger, fingerprint
from capfilt.storage import documents
from capfilt.storage.paths import StoragePath, make_folder
from capfilt.training import frozen_features
from capfilt.training.checkpoints import states as checkpoint
from capfilt.training.checkpoints.states import States
from capfilt.training.config import EXECUTION_FIELDS
from capfilt.training.deterministic import deterministic
from capfilt.training.distributed import data_parallel, fsdp
from capfilt.training.distributed.data_parallel import Gradients
from capfilt.training.flops import Speed
from capfilt.training.job import LOG, TrainJob
from capfilt.training.log import OnLog, StepLog
from capfilt.training.optimizer import learning_rate, make_optimizer, set_rate

LEFT_BESIDE = {"keep_momentum": True, "keep_best": True}
"""What TrainConfig says of what is left beside the model: of no weight either."""
FORKABLE_FIELDS = {"steps": True, "optimizer": True}
"""What a fork may answer otherwise, and nobody else: how far a training goes, and how its steps are taken."""


def train(job: TrainJob, on_line: OnLog | None = None) -> None:
    """Train to the end, from the newest state if there is one, and leave the model in its folder.

    `on_line` gets each line of the log, in the process that writes it.
    """
    device = job.compute.open()
    with deterministic(job.execution.deterministic, device):
        _train(job, device, on_line)


def _train(job: TrainJob, device: torch.device, on_line: OnLog | None) -> None:
    tokenizer = job.load_tokenizer()
    model = initial_model(job, len(tokenizer))
    make_folder(job.out)
    counted = documents.read_object(job.rows, documents.PLAN_BYTES) if job.rows else {}
    reads_images = job.train.objectives.reads_images
    image_format = ImageFormat(job.architecture.image_size, preprocess_of(job.architecture)) if reads_images else None
    loader = loader_of(
        job.train.objectives.row_kind,
        job.sources,
        job.train.loader,
        tokenizer,
        image_format,
        job.seed,
        data_parallel.rank(),
        data_parallel.world_size(),
        counted.get("rows"),
    )
    if job.train.features:
        folders, contents = (job.features_folder, job.out), counted.get("contents")
        loader.features = frozen_features.prepare(model, job.sources, *folders, device, contents)
    loader.device = device
    model.recompute_vision(job.train.recompute)
    task = build_task(model, job.train.objectives, loader.prompt_tokens)
    if task.momentum is not None and job.train.objectives.resumes_momentum:
        assert job.start is not None, "whoever reads a recipe asks for a start"
        checkpoint.load_momentum(task.momentum, job.start)
    if isinstance(tokenizer, BertTokenizer):
        task.vocabulary = Vocabulary.of(tokenizer, device)
    task.to(device)
    gradients = Gradients(task, job.execution, device, job.compute.dtype)
    optimizer = make_optimizer(task, job.train.optimizer)
    identities = identity(job, tokenizer, loader, task.model) if data_parallel.rank() == 0 else {}
    kept = (job.train.checkpoints, job.train.keep_best, gradients.sharded, origins(job), job.train.steps)
    with closing(States(job.out, identities, *kept)) as states:
        done = states.resume(task, optimizer)
        with StepLog(job.out / LOG, job.train, done, Speed(job, device), on_line) as log:
            regions = region_batches(job, loader, done, counted.get("regions"))
            run_steps(job, gradients, optimizer, loader.batches(start=done), done, states, log, regions)
        states.finish()
        data_parallel.barrier()
        leave(job, task, optimizer, tokenizer, states, log.mean_loss())
    data_parallel.barrier()


def origins(job: TrainJob) -> list[StoragePath]:
    """The folders of the same training in the run that this one's was forked from, in that one's, and so on."""
    folders: list[StoragePath] = []
    ledger = Ledger(job.out.parent, job.out.name).forked_from
    while ledger is not None:
        folders.append(ledger.folder / job.out.name)
        ledger = ledger.forked_from
    return folders


def leave(
    job: TrainJob,
    task: Task,
    optimizer: torch.optim.AdamW,
    tokenizer: Tokenizer,
    states: States,
    last: float | None,
) -> None:
    """Leave the model in its folder, and the best one in another where it is kept. `last`: the loss of the last steps.

    The states stay until the model is in the ledger: a process may be lost between the two.
    """
    whole = fsdp.whole(task.model)
    momentum = fsdp.whole(task.momentum) if task.momentum is not None and job.train.keep_momentum else None
    if data_parallel.rank() == 0:
        tokenizer.save(job.model_folder)
        if momentum is not None:
            checkpoint.save_momentum(momentum, job.model_folder)
        store.save(task.model, job.model_folder, whole)
    if job.train.keep_best:
        every = job.train.checkpoint_every
        share = (job.train.steps % every or every) / every
        if (
            best := data_parallel.of_first(states.better_than(last, share) if data_parallel.rank() == 0 else None)
        ) is not None:
            states.load(task, optimizer, best)
            whole = fsdp.whole(task.model)
        if data_parallel.rank() == 0:
            tokenizer.save(job.best_folder)
            store.save(task.model, job.best_folder, whole)
        data_parallel.barrier()


def identity(job: TrainJob, tokenizer: Tokenizer, loader: Loader, model: Model) -> dict[str, str]:
    """What makes two trainings one and the same, part by part. No path is in it, so that a run folder can be moved,
    and nothing of how the steps are computed."""
    walked = [(shards.name(url), loader.order.rows[url]) for urls, _ in loader.order.sources for url in urls]
    settings = job.train.model_dump(mode="json", exclude=EXECUTION_FIELDS | LEFT_BESIDE | FORKABLE_FIELDS)
    return {
        "architecture": digest(job.architecture),
        # Not where features lie, and the format that was chosen.
        "settings": fingerprint({**settings, "features": bool(job.train.features), "precision": job.compute.precision}),
        checkpoint.PACE: fingerprint(job.train.model_dump(mode="json", include=FORKABLE_FIELDS)),
        "seed": str(job.seed),
        "data": fingerprint(walked, [source.repeat for source in job.sources]),
        "vocabulary": fingerprint(tokenizer.identity),
        "beginning": store.fingerprint(job.start) if job.start else "",
        "frozen weights": frozen(model),
    }


def frozen(model: Model) -> str:
    """The sha256 of the weights that are not trained: states leave them out, so others could take their place."""
    digest = hashlib.sha256()
    for name, p in sorted(model.named_parameters()):
        if not p.requires_grad:
            digest.update(name.encode() + p.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def initial_model(job: TrainJob, vocabulary: int) -> Model:
    """The model before its first step: fresh from the seed, or from a folder."""
    wanted = job.architecture.vocabulary_size
    if vocabulary > wanted:
        setting = job.architecture.vocabulary_setting(vocabulary)
        raise ModelError(
            f"the vocabulary {job.tokenizer} has {vocabulary} entries, the model takes {wanted}: set"
            f" {f'model.{setting}, or ' if setting else ''}`tokenizer` to the vocabulary that belongs to it"
        )
    torch.manual_seed(draw(job.seed, "weights"))
    if job.start is None:
        model = build(job.architecture)
        initialise(model, job.initial.vision, job.initial.text, job.initial.language)
        return model
    model = store.load_continued(job.start, job.architecture)
    initialise(model, language=job.initial.language)
    return model


def run_steps(
    job: TrainJob,
    gradients: Gradients,
    optimizer: torch.optim.AdamW,
    batches: Iterator[Batch],
    done: int,
    states: States,
    log: StepLog,
    regions: Iterator[Batch | None] | None = None,
) -> None:
    """Steps `done` .. `steps`; logs means every `log_every`, saves the state every `checkpoint_every`. `regions` has,
    for each, what a step on regions before it is given, or None where there is none."""
    config = job.train
    for step in range(done, config.steps):
        with log.waiting():
            batch, parts = next(batches), next(regions) if regions is not None else None
        lr = learning_rate(config.optimizer, step, config.steps)
        set_rate(optimizer, lr)
        before = on_regions(job, gradients, optimizer, parts, step) if parts is not None else {}
        seed_draws(gradients.device, job.seed, "step", step, data_parallel.rank())
        given = gradients.task.batch_of(batch).to(gradients.device)
        losses, metrics = gradients.of(given, step / config.steps)
        norm = gradients.clip(config.optimizer.clip)
        if bool(norm.isfinite()):
            optimizer.step()
            gradients.task.after_step()
            figures = losses | metrics | {"grad_norm": norm}
            figures |= {f"region_{name}" if name in figures else name: value for name, value in before.items()}
            log.add(step, figures, batch.unreadable, lr)
        else:
            log.skip_step(step, batch, lr)
        if (step + 1) % config.checkpoint_every == 0 and step + 1 < config.steps:
            states.save(gradients.task, optimizer, step + 1, log.mean_loss())
            log.unsaved = states.failed


def region_batches(
    job: TrainJob, loader: Loader, done: int, rows: Mapping[str, int] | None
) -> Iterator[Batch | None] | None:
    """For each step from `done` on what a step on regions before it is given, or None: all ranks agree which. `rows` as
    of RegionLoader."""
    config = job.train.objectives.region_steps
    if config is None:
        return None
    regions = RegionLoader(loader, job.sources, config, job.architecture.image_grid, rows)

    def due(step: int) -> bool:
        return draw(job.seed, "regions", step) < config.share * 2**63

    batches = regions.batches(start=sum(map(due, range(done))))
    return (next(batches) if due(step) else None for step in itertools.count(done))


def on_regions(
    job: TrainJob, gradients: Gradients, optimizer: torch.optim.AdamW, batch: Batch, step: int
) -> dict[str, Tensor]:
    """A step on regions; returns its losses and metrics. Where its gradients are not finite it is left out."""
    seed_draws(gradients.device, job.seed, "region step", step, data_parallel.rank())
    regions = gradients.task.batch_of(batch).to(gradients.device)
    losses, metrics = gradients.of(regions, step / job.train.steps)
    if not bool(gradients.clip(job.train.optimizer.clip).isfinite()):
        return {"regions_skipped": torch.ones((), device=gradients.device)}
    optimizer.step()
    gradients.task.after_step()
    return losses | metrics | {"region_unreadable": torch.tensor(float(batch.unreadable), device=gradients.device)}


def seed_draws(device: torch.device, *parts: object) -> None:
    """Seed what a step draws on this device. On a CPU its generator alone: `torch.manual_seed` turns to every kind of
    device, and for each that has not begun it keeps the call with its stack, once a step."""
    if device.type == "cpu":
        torch.default_generator.manual_seed(draw(*parts))
    else:
        torch.manual_seed(draw(*parts))


def draw(*parts: object) -> int:
    """A 63-bit number from its arguments: the seed of whatever they name."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big") >> 1
