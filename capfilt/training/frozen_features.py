"""Before the first step: what the frozen tower sees of every image of a training, computed where it is not kept yet."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path

import torch

from capfilt.data import shards
from capfilt.data.images.preprocess import ImageFormat
from capfilt.data.loading import features
from capfilt.data.loading.config import Source
from capfilt.data.loading.features import Features
from capfilt.data.sample import Sample
from capfilt.errors import DataError, ModelError
from capfilt.inference.batches import pictures
from capfilt.models import Model, preprocess_of
from capfilt.models.interface import FrozenTower
from capfilt.runs.ledger import fingerprint
from capfilt.storage.atomic import write_json
from capfilt.storage.paths import StoragePath, make_folder, remove_file
from capfilt.training.distributed import data_parallel
from capfilt.training.job import PROGRESS

BATCH = 64
PATIENCE = timedelta(days=30)
"""How long a rank waits for the slowest: a large tower takes hours. Whoever started the ranks sees a dead one."""


def prepare(
    model: Model,
    sources: Sequence[Source],
    folder: Path,
    progress: StoragePath,
    device: torch.device,
    contents: Mapping[str, str] | None = None,
) -> Features:
    """Keep in `folder` what the tower sees of these shards; every rank computes its share of what is missing.

    Shards are known by their sha256 where `contents` has it by their urls, else by size and time.
    A file appears whole or not at all, so a training that was killed goes on with the next shard. Rank 0 tells in
    `progress` how far it is.

    Raises:
        ModelError: a model whose tower is trained.
    """
    frozen = model.frozen_tower
    if frozen is None:
        raise ModelError(
            "train.features keeps what a frozen tower computes, and this one is trained: set features=false"
        )
    urls = [url for source in sources for url in shards.expand(source.shards)]
    make_folder(folder)
    tower = fingerprint_of(frozen)
    known = contents or shards.identities(shards.stats(urls))
    files = {url: folder / f"{fingerprint(tower, known[url])[:32]}.safetensors" for url in urls}
    share = sorted(files)[data_parallel.rank() :: data_parallel.world_size()]
    mine = [url for url in share if not files[url].is_file()]
    frozen.module.to(device)
    for done, url in enumerate(mine):
        if data_parallel.rank() == 0:
            write_json(progress / PROGRESS, {"done": done, "of": len(mine)})
        image_format = ImageFormat(model.config.image_size, preprocess_of(model.config))
        features.write(files[url], encoded(frozen, url, image_format, device))
    data_parallel.barrier(PATIENCE)
    if data_parallel.rank() == 0:
        remove_file(progress / PROGRESS)
    if gone := [url for url in urls if not files[url].is_file()]:
        raise DataError(f"{folder} lacks the features of {gone[0]}: it must be a folder that all processes see")
    return Features(files)


def fingerprint_of(tower: FrozenTower) -> str:
    """What decides the features of a picture: the tower's shape, its weights and the format that it computes in."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tower.module.state_dict().items()):
        digest.update(
            name.encode() + tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        )
    return fingerprint(*tower.described, digest.hexdigest())


def encoded(
    tower: FrozenTower, url: str, image_format: ImageFormat, device: torch.device
) -> Iterator[tuple[list[str], torch.Tensor]]:
    """Uids of a shard and the tower's features of their pictures [B, N, D], in the tower's format."""
    with_text = (item for item in shards.read(url) if isinstance(item, Sample) and item.captions)
    for batch in pictures(with_text, BATCH, [image_format], device=device):
        if batch.samples:
            pixels = batch.on(device, [image_format]).pixels(image_format)
            yield [sample.uid for sample in batch.samples], tower.encode(pixels).to(tower.dtype)
