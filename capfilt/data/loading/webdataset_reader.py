"""Shards as a webdataset pipeline, for training loops that are not capfilt's own.

Tars are read by `capfilt.data.shards`, so that every layout and every fsspec URL works that the verbs take, and no
`pipe:` URL runs a command; webdataset gives the pipeline around it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
import webdataset as wds
from webdataset.utils import pytorch_worker_info

from capfilt.data import shards
from capfilt.data.images import decode
from capfilt.data.sample import Sample
from capfilt.errors import DataError, ImageError, ShardError

Handler = Callable[[Exception], bool]
"""What becomes of a sample that cannot be read: it raises, or says whether to go on. webdataset has some:
`reraise_exception`, `warn_and_continue`, `ignore_and_continue`."""


def webdataset(
    spec: str | Sequence[str],
    *,
    caption: Literal["first", "random"] = "first",
    min_scores: Mapping[str, float] | None = None,
    shuffle: int = 0,
    seed: int = 0,
    handler: Handler = wds.reraise_exception,
) -> ShardPipeline:
    """Read shards, cleaned ones above all, as a webdataset pipeline of decoded images with one text each.

    Samples are dicts of `image` (an upright RGB PIL image), `text`, `caption` (the text as `captions` of the json has
    it, with `source`, `itm`, `itc` and `round` where it was scored), `json`, `__key__` and `__url__`. Shards are split
    by rank and by DataLoader worker. All of webdataset's stages can follow:

        dataset = capfilt.webdataset("run/round-1/dataset", caption="random", min_scores={"itm": 0.7}, shuffle=2000)
        batches = dataset.map_dict(image=transform).to_tuple("image", "text").batched(64)
        for epoch in range(10):
            batches.set_epoch(epoch)
            for images, texts in DataLoader(batches, batch_size=None, num_workers=4):
                ...

    Ranks get equal numbers of shards at best, never of samples: where every rank must take as many steps as the others,
    end an epoch with `.repeat(nbatches=N)`, which is N batches from each DataLoader worker.

    Args:
        spec: tars, folders of tars, braces, globs, `a::b` lists or fsspec URLs, as every verb takes them.
        caption: "first" takes the text that `select` found best (KEY.txt), or where that does not pass the first one
            that does; "random" draws one of those that pass, anew in every epoch.
        min_scores: what a text's score must reach, by its name in the json ("itm", "itc"). An image none of whose texts
            passes is left out. Texts of the source "human" have no scores and always pass; a score that is null fails.
        shuffle: encoded samples that a worker holds back to draw from; with 0 shards and samples come in order.
        seed: of every draw, together with the epoch.
        handler: is given the error of each sample or shard that cannot be read; by default it is raised.

    Raises:
        ShardError: `spec` names nothing; while iterating, what the handler raises, or fewer shards than ranks.
    """
    if caption not in ("first", "random"):
        raise DataError(f"caption {caption!r}; allowed are 'first' and 'random'")
    if shuffle < 0:
        raise DataError(f"shuffle {shuffle}; it is a number of samples, 0 for none")
    reader = _Reader(caption == "random", dict(min_scores or {}), seed, handler)
    return ShardPipeline(shards.expand(spec), reader, shuffle, seed)


class ShardPipeline(wds.DataPipeline, wds.FluidInterface):
    """What `webdataset` returns: an iterable dataset of torch's to which stages of webdataset's can be added."""

    def __init__(self, urls: Sequence[str], reader: _Reader, shuffle: int, seed: int) -> None:
        super().__init__()
        self.urls = list(urls)
        self._reader = reader
        self._shuffle = shuffle
        self._seed = seed
        # In shared memory, because workers that persist from epoch to epoch have copies of everything else.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Draw the order and the random captions of this epoch, as DistributedSampler.set_epoch does.

        Without it each pass of a DataLoader is that of epoch 0; passes of one `repeat` are epochs of their own.
        """
        self._epoch.fill_(epoch)

    def iterator(self) -> Iterator[Any]:
        """One pass after another, as many as `repeat` said."""
        first = int(self._epoch)
        for number in range(self.repetitions):
            empty = True
            for item in self._one_pass(first + number):
                empty = False
                yield item
            if empty:
                return

    def _one_pass(self, epoch: int) -> Iterator[Any]:
        rank, world_size, worker, workers = pytorch_worker_info()
        # A worker without a shard would end at once where each of the others gives as many batches as `repeat` said.
        readers = world_size * (workers if self.repetitions != 1 else 1)
        if len(self.urls) < readers:
            raise ShardError(
                f"{len(self.urls)} shards for {world_size} ranks"
                + (f" of {workers} DataLoader workers each" if readers > world_size else "")
                + ": each needs one at least. Write smaller shards, or read with fewer."
            )
        urls = list(self.urls)
        if self._shuffle:  # in the same order on every rank, else two of them would read the same shard
            random.Random(f"{self._seed} {epoch}").shuffle(urls)
        source: Any = self._reader.encoded(wds.split_by_worker(wds.split_by_node(urls)))
        if self._shuffle:
            rng = random.Random(f"{self._seed} {epoch} {rank} {worker}")
            source = wds.shuffle(self._shuffle, initial=self._shuffle, rng=rng)(source)
        source = self._reader.decoded(source, epoch)
        for stage in self.pipeline:
            source = self.invoke(stage, source)
        yield from source


class _Reader:
    """Reads samples, chooses their captions, decodes their images."""

    def __init__(self, draw: bool, min_scores: dict[str, float], seed: int, handler: Handler) -> None:
        self._draw = draw
        self._min_scores = min_scores
        self._seed = seed
        self._handler = handler

    def encoded(self, urls: Iterable[str]) -> Iterator[tuple[str, Sample]]:
        """Every sample of these shards, with its shard."""
        for url in urls:
            for item in _read(url):
                if isinstance(item, Sample):
                    yield url, item
                elif not self._handler(item):
                    return

    def decoded(self, samples: Iterable[tuple[str, Sample]], epoch: int) -> Iterator[dict[str, Any]]:
        """Those with a caption that passes, as dicts."""
        for url, sample in samples:
            try:
                chosen = self._choose(sample, epoch)
                image = decode.decode(sample.image) if chosen else None
            except (DataError, ImageError) as error:
                if self._handler(type(error)(f"{url}: {sample.key}: {error}")):
                    continue
                return
            if chosen:
                place = {"__key__": sample.key, "__url__": url}
                yield {**place, "image": image, "text": chosen["text"], "caption": chosen, "json": sample.meta}

    def _choose(self, sample: Sample, epoch: int) -> dict[str, Any] | None:
        if not sample.captions:
            raise DataError("has no text")
        passing = [caption for caption in sample.captions if self._passes(caption)]
        if not passing:
            return None
        if self._draw:  # by uid: which rank or worker reads the sample does not matter
            return random.Random(f"{self._seed} {epoch} {sample.uid}").choice(passing)
        return next((caption for caption in passing if caption["text"] == sample.text), passing[0])

    def _passes(self, caption: Mapping[str, Any]) -> bool:
        if caption["source"] == "human":
            return True
        if absent := [name for name in self._min_scores if name not in caption]:
            known = sorted(
                name for name, value in caption.items() if isinstance(value, (int, float)) and name != "round"
            )
            have = f"the scores {', '.join(known)}" if known else "no scores: is this what `capfilt select` wrote?"
            raise DataError(f"a text has no score {absent[0]!r}; it has {have}")
        scores = {name: caption[name] for name in self._min_scores}
        return all(
            isinstance(score, (int, float)) and score >= self._min_scores[name] for name, score in scores.items()
        )


def _read(url: str) -> Iterator[Sample | ShardError]:
    """What a shard holds, and an error for what cannot be read of it."""
    try:
        for item in shards.read(url):
            yield item if isinstance(item, Sample) else ShardError(f"{url}: {item.key}: {item.reason}")
    except ShardError as error:
        yield error
