"""A captioner that is an endpoint: the pictures of the next batches are sent while the earlier ones are scored.

The answers of a shard are kept beside the run, so that a shard that is done again pays for none of them twice.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from PIL import Image

from capfilt.data.images import decode
from capfilt.data.sample import Sample
from capfilt.inference.captioners.endpoint.cache import AnswerCache
from capfilt.inference.captioners.endpoint.client import Answer, EndpointClient
from capfilt.inference.captioners.endpoint.requests import data_url, key_of, probe_request, request, sampling, seed_of
from capfilt.inference.captioners.guard_rails import guard
from capfilt.inference.captioners.prompts import Prompt, prompts_of, templates, web_text
from capfilt.inference.interface import Caption
from capfilt.runs import deadline
from capfilt.runs.tally import CAPTION_FAILED

if TYPE_CHECKING:
    from capfilt.data.images.preprocess import ImageFormat
    from capfilt.inference.batches import Images
    from capfilt.inference.config import AnnotateConfig
    from capfilt.storage.paths import StoragePath

POLL_SECONDS = 1.0
"""Between two looks at the time limit of the shard while an answer is waited for."""


class _Wanted(NamedTuple):
    """One text of an image."""

    key: str
    prompt: Prompt
    seed: int


class EndpointCaptioner:
    """Has `captions` texts per image written by a server; each has a seed of (seed, round, uid, candidate)."""

    image_formats: tuple[ImageFormat, ...] = ()

    def __init__(
        self, address: tuple[str, str], config: AnnotateConfig, seed: int, round_: int, answers: StoragePath | None
    ):
        """`address`: URL and model; `answers`: the folder of the answers that are kept, None for nowhere."""
        self.config, self.seed, self.round, self._answers = config, seed, round_, answers
        self._fields, self._templates = sampling(config), templates(config.vlm)
        self._client = EndpointClient(*address, config.requests, probe_request(self._fields))
        self._cache = AnswerCache(None)
        self._asked: dict[str, Future[Answer]] = {}  # by key, until the image's texts are taken
        self._lock = threading.Lock()
        self._unwritten: dict[str, Answer] = {}
        self._writing, self._writer = asyncio.Lock(), ThreadPoolExecutor(1, thread_name_prefix="answers")

    @property
    def ahead(self) -> int:
        """Images that are asked about beyond the batch that is waited for."""
        return 2 * self.config.requests.in_flight

    @contextmanager
    def shard(self, name: str) -> Iterator[None]:
        """Keep the answers of a shard, and find those that it has; what is still asked for when it ends is let go."""
        with AnswerCache(None if self._answers is None else self._answers / f"{name}.jsonl") as self._cache:
            try:
                yield
            finally:
                asked, self._asked = self._asked, {}
                for future in asked.values():
                    future.cancel()
        self._cache = AnswerCache(None)

    def ask(self, sample: Sample, picture: Image.Image) -> None:
        """Send the requests of an image, unless they are answered; `picture` is its image, decoded. From any thread."""
        self._futures(sample, picture)

    def prepare(self, images: Images) -> None:
        """Nothing is computed here."""

    def caption(self, images: Images, samples: Sequence[Sample]) -> list[list[Caption]]:
        """`captions` texts for each image, which were asked for ahead or are now. RunError where nothing answers."""
        futures = [self._futures(sample) for sample in samples]
        return [
            [self._caption(sample, wanted.prompt, self._wait(wanted.key, future)) for wanted, future in of_image]
            for sample, of_image in zip(samples, futures, strict=True)
        ]

    # ---- one text ----

    def _futures(self, sample: Sample, picture: Image.Image | None = None) -> list[tuple[_Wanted, Future[Answer]]]:
        """What is wanted of an image, each with its answer to be."""

        def url() -> str:
            shown = picture or decode.decode(sample.image)
            return data_url(sample.image, shown, self.config.endpoint.side, self.config.endpoint.quality)

        all_wanted = self._wanted(sample)
        is_known = all(wanted.key in self._asked or self._cache.get(wanted.key) for wanted in all_wanted)
        encoded = "" if is_known else url()  # before the lock: it takes milliseconds
        with self._lock:
            for wanted in all_wanted:
                if wanted.key not in self._asked:
                    self._asked[wanted.key] = self._future(wanted, lambda: encoded or url())
            return [(wanted, self._asked[wanted.key]) for wanted in all_wanted]

    def _future(self, wanted: _Wanted, url: Callable[[], str]) -> Future[Answer]:
        if (known := self._cache.get(wanted.key)) is not None:
            done: Future[Answer] = Future()
            done.set_result(known)
            return done
        body = request(url(), wanted.prompt.text, wanted.seed, self._fields)
        return self._client.submit(body, wanted.key, partial(self._keep, self._cache, wanted.key))

    async def _keep(self, cache: AnswerCache, key: str, answer: Answer) -> None:
        """Write an answer down before anybody sees it: with all that came during the last write, and not in the thread
        that waits for the others."""
        if not answer.is_said:
            return
        self._unwritten[key] = answer
        async with self._writing:
            if self._unwritten:
                answers, self._unwritten = self._unwritten, {}
                await asyncio.get_running_loop().run_in_executor(self._writer, cache.add, answers)

    def _wait(self, key: str, future: Future[Answer]) -> Answer:
        while True:
            try:
                answer = future.result(POLL_SECONDS)
            except TimeoutError:
                if future.done():
                    raise
                deadline.check()
                continue
            self._asked.pop(key, None)  # the same image again, as after an out of memory, finds it among the kept ones
            return answer

    def _caption(self, sample: Sample, prompt: Prompt, answer: Answer) -> Caption:
        if answer.failure:
            return Caption("", prompt.kind, f"{CAPTION_FAILED}{answer.failure}")
        kept = guard(answer.text, self.config.vlm, self._templates[prompt.kind], web_text(sample))
        return Caption(kept.text, prompt.kind, kept.remark)

    def _wanted(self, sample: Sample) -> list[_Wanted]:
        endpoint, model = self.config.endpoint, self._client.model
        prompts = prompts_of(sample, self.config.captions, self.config.vlm)
        seeds = [seed_of(self.seed, self.round, sample.uid, number) for number in range(len(prompts))]
        return [
            _Wanted(
                key_of(sample.sha256, prompt.text, model, seed, number, self._fields, endpoint.side, endpoint.quality),
                prompt,
                seed,
            )
            for number, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))
        ]
