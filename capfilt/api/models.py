"""Loaded models: `load_model` returns one that captions and scores images of any origin.

Texts and scores are those of `annotate`: the same image, settings and seed give the same texts, in a batch of any size.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import torch
from PIL import Image

from capfilt import config as configs
from capfilt.api.arguments import Location, Settings, assignments, location
from capfilt.api.results import Caption, PretrainResult, Scores
from capfilt.cluster.session import connect
from capfilt.data.images import decode
from capfilt.data.images.preprocess import ImageFormat
from capfilt.data.sample import Sample
from capfilt.errors import DataError, ImageError, UsageError
from capfilt.inference.annotator import score_texts
from capfilt.inference.batches import Images, Pictures
from capfilt.inference.captioners.local import LocalCaptioner, Written
from capfilt.inference.config import AnnotateConfig, Precision
from capfilt.inference.device import Compute, ability, autocast, choose, local_device
from capfilt.inference.filters import local_filter
from capfilt.inference.heatmap import check_heatmap, heatmaps
from capfilt.inference.local_model import LocalModel
from capfilt.inference.oom_backoff import OomBackoff
from capfilt.inference.roles import check_capabilities
from capfilt.models.checkpoints import store
from capfilt.storage.paths import StoragePath
from capfilt.storage.remote_path import RemotePath

ImageInput: TypeAlias = Image.Image | bytes | str | os.PathLike[str] | RemotePath
"""A PIL image; the bytes of a JPEG, PNG, WebP, GIF or BMP; or the path or URL of such a file."""


class LoadedModel:
    """A model on one device, as `load_model` makes it."""

    def __init__(self, path: StoragePath, compute: Compute, device: torch.device) -> None:
        self.path = path
        self.device = device
        self._dtype = compute.dtype
        self._local = LocalModel.load(path, device, compute.dtype)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.family} from {self.path} on {self.device} in {self.precision}>"

    @property
    def family(self) -> str:
        """The family of its architecture, such as "blip"."""
        return str(self._local.model.config.family)

    @property
    def capabilities(self) -> frozenset[str]:
        """What it can do: encode_image, encode_text, fuse, decode."""
        return self._local.model.config.capabilities

    @property
    def precision(self) -> str:
        """The format of its matrix products: fp32 or bf16."""
        return "bf16" if self._dtype == torch.bfloat16 else "fp32"

    def caption(self, images: Sequence[ImageInput], *, seed: int = 0, settings: Settings = ()) -> list[str]:
        """Write one text for each image; `caption_many` says what is what."""
        return [texts[0] for texts in self.caption_many(images, 1, seed=seed, settings=settings)]

    def caption_many(
        self, images: Sequence[ImageInput], captions: int, *, seed: int = 0, settings: Settings = ()
    ) -> list[list[str]]:
        """Write several texts for each image.

        Args:
            images: PIL images, bytes, paths or URLs of files, one or more.
            captions: texts for each image.
            seed: of sampled texts: another one gives others.
            settings: as in `annotate`: `{"decode.method": "beam", "decode.max_length": 20, "batch_size": 16}`; by
                default texts are sampled as CapFilt does it (nucleus, p = 0.9).

        Raises:
            CapfiltError: RecipeError for a model that cannot write, or settings that cannot be; ImageError or DataError
                for an image that cannot be read; RunError where a single image does not fit into memory.
        """
        written = self._write(images, _config(settings, captions=captions), seed)
        return [[text for text, _ in of_image] for of_image in written]

    def caption_scored(
        self, images: Sequence[ImageInput], captions: int = 1, *, settings: Settings = ()
    ) -> list[list[Caption]]:
        """Write the `captions` best texts that beam search finds for each image, best first, with their scores.

        Args:
            images: PIL images, bytes, paths or URLs of files, one or more.
            captions: texts for each image, as many as `decode.beams` at most.
            settings: as in `caption_many`; `decode.method` is beam and cannot be another.

        Raises:
            CapfiltError: UsageError for another method, whose texts have no score; else as `caption_many`.
        """
        config = _config(("decode.method=beam", *assignments(settings)), captions=captions)
        if config.decode.method != "beam":
            raise UsageError(f"decode.method is {config.decode.method}; scores are of beam search: leave it out.")
        written = self._write(images, config, 0)
        return [[Caption(text, float(score or 0.0)) for text, score in of_image] for of_image in written]

    def score(self, images: Sequence[ImageInput], texts: Sequence[str], *, settings: Settings = ()) -> list[Scores]:
        """Score each text against the image at the same place; `score_many` says what is what."""
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            raise UsageError("texts is to be a list with one text for each image; for several take score_many.")
        return [scores[0] for scores in self.score_many(images, [[text] for text in texts], settings=settings)]

    def score_many(
        self, images: Sequence[ImageInput], texts: Sequence[Sequence[str]], *, settings: Settings = ()
    ) -> list[list[Scores]]:
        """Score several texts against each image, which is encoded once.

        Args:
            images: PIL images, bytes, paths or URLs of files, one or more.
            texts: the texts of each image.
            settings: as in `annotate`: `{"batch_size": 16, "max_length": 35}`, in images and tokens.

        Raises:
            CapfiltError: RecipeError for a model that cannot score, UsageError for lists of different lengths,
                ImageError or DataError for an image that cannot be read, RunError where a single image does not fit
                into memory.
        """
        check_capabilities("filter", self.path, self.capabilities)
        config, given = _config(settings), _images(images)
        if len(texts) != len(given) or any(isinstance(each, str) for each in texts):
            raise UsageError(f"there are {len(given)} images and {len(texts)} lists of texts; give one for each image.")
        filter_ = local_filter(self._local, config.max_length)

        def part(start: int, stop: int) -> list[list[Scores]]:
            batch, _ = self._batch(given[start:stop], start)
            pairs = score_texts(lambda real: filter_.score(batch, real), texts[start:stop])
            return [[Scores(*pair) for pair in of_image] for of_image in pairs]

        with torch.inference_mode(), autocast(self.device, self._dtype):
            return OomBackoff(config.batch_size).run(part, len(given))

    def heatmap(self, image: ImageInput, text: str, *, layer: int | None = None, settings: Settings = ()) -> np.ndarray:
        """Which patches of an image ITM's answer for a text rests on (Grad-CAM, arXiv 1610.02391): float32 [grid, grid]
        in [0, 1], the top row of the image first.

        Args:
            image: a PIL image, bytes, a path or a URL of a file.
            text: a text, cleaned and cut as `score` does it.
            layer: the layer whose attention it is; by default the middle of those that attend to images, and of ALBEF
                the third above the text encoder, as in its paper.
            settings: as in `score`: `{"max_length": 35}`.

        Raises:
            CapfiltError: UsageError for a model that has no heatmap (clip, vilt, vlmo, blip2, a captioner) or a layer
                that does not attend to images, ImageError or DataError for an image that cannot be read.
        """
        check_heatmap(self.path, self._local.model.config, layer)
        config, wanted = _config(settings), self._local.image_format
        batch, _ = self._batch(_images([image]), 0)
        with autocast(self.device, self._dtype):
            (heat,) = heatmaps(self._local, batch.pixels(wanted), [text], config.max_length, layer)
        return np.asarray(heat)

    def _write(self, images: Sequence[ImageInput], config: AnnotateConfig, seed: int) -> list[list[Written]]:
        """The texts of each image with their scores."""
        check_capabilities("captioner", self.path, self.capabilities)
        given = _images(images)
        captioner = LocalCaptioner(self._local, config.decode, config.captions, seed)

        def part(start: int, stop: int) -> list[list[Written]]:
            return captioner.caption_scored(*self._batch(given[start:stop], start))

        with torch.inference_mode(), autocast(self.device, self._dtype):
            return OomBackoff(config.batch_size).run(part, len(given))

    def _batch(self, images: Sequence[ImageInput], first: int) -> tuple[Images, list[Sample]]:
        """Images on the device, and the sample that stands for each; `first` is the caller's number of the first."""
        wanted = self._local.image_format
        read = [_read(image, first + i, wanted) for i, image in enumerate(images)]
        samples, pixels = [sample for sample, _ in read], wanted.preprocess.stack([pixels for _, pixels in read])
        batch = Pictures(samples, {wanted.resizing: pixels}, [])
        return batch.on(self.device, (wanted,)), samples


def load_model(
    name: Location | PretrainResult, *, device: str | torch.device | None = None, precision: Precision = "auto"
) -> LoadedModel:
    """Load a model, to caption images or score texts with it.

    Args:
        name: a folder, a .pth of BLIP or LAVIS, a URL of a store, a name on the Hugging Face hub, or what `pretrain`
            returned.
        device: "cpu", "cuda", "cuda:1"; by default a GPU where there is one.
        precision: "fp32", "bf16", or "auto": bf16 on a GPU that multiplies it in hardware, else fp32.

    Raises:
        CapfiltError: ModelError for what is no model or does not fit, ClusterError for a device that is not there.

    Example: `capfilt.load_model("runs/demo/round-2/captioner").caption(["cat.jpg"])`
    """
    connect("local").close()  # sets what makes results the same as those of `annotate`
    chosen = torch.device(device if device is not None else local_device())
    if chosen.type not in ("cpu", "cuda"):
        raise UsageError(f"device {str(device)!r}: allowed are cpu, cuda and cuda:N.")
    kind = "cuda" if chosen.type == "cuda" else "cpu"
    compute, _ = choose(precision, kind, [ability()])  # type: ignore[arg-type]
    opened = compute.open()
    path = store.find(str(name.model if isinstance(name, PretrainResult) else name))
    return LoadedModel(path, compute, chosen if chosen.index is not None else opened)


def _config(settings: Settings, **given: object) -> AnnotateConfig:
    config = configs.build(AnnotateConfig, assignments(settings, **given))
    if config.precision != "auto":
        raise UsageError("precision is chosen when the model is loaded: load_model(..., precision=...).")
    return config


def _images(images: Sequence[ImageInput]) -> list[ImageInput]:
    if isinstance(images, Image.Image | bytes | str | os.PathLike | RemotePath):
        raise UsageError("images is one image; give a list of them.")
    return list(images)


def _read(image: ImageInput, number: int, wanted: ImageFormat) -> tuple[Sample, np.ndarray]:
    """The sample that stands for an image, with the uid that its bytes would have in a shard, and its pixels."""
    where = f"image {number}" if isinstance(image, Image.Image | bytes) else f"image {number} ({image})"
    try:
        if isinstance(image, Image.Image):
            picture = decode.convert(image)
            uid = hashlib.sha256(f"{picture.size}".encode() + picture.tobytes()).hexdigest()[:32]
            return Sample(where, b"", "", "", {"uid": uid}), wanted.to_pixels(picture)
        data = image if isinstance(image, bytes) else location(image).read_bytes()
        return Sample(where, data, "", ""), wanted.to_pixels(decode.decode(data))
    except ImageError as error:
        raise ImageError(f"{where}: {error}; leave it out, or give another.") from error
    except OSError as error:
        raise DataError(f"{where} cannot be read: {error}; check the path.") from error
