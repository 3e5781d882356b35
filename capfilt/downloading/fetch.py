"""img2dataset inside the fence: its Downloader, Resizer and WebDatasetSampleWriter, one shard at a time.

img2dataset fetches through `urllib.request.urlopen`, which asks whatever opener is installed: ours asks the visitor.
What it decodes has been looked at before, by the header alone. img2dataset is imported where a shard is fetched: it
takes seconds, and must not be asked whether it is out of date.
"""

from __future__ import annotations

import io
import os
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPMessage
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
from pydantic import Field

from capfilt.config import Config
from capfilt.data.images import decode
from capfilt.downloading.failures import Failure
from capfilt.downloading.finalize import Spool, Written
from capfilt.downloading.http.politeness import Visitor
from capfilt.errors import ImageError

HASH = "sha256"
Mode = Literal["no", "border", "keep_ratio", "keep_ratio_largest", "center_crop"]
Interpolation = Literal["nearest", "linear", "bilinear", "cubic", "bicubic", "area", "lanczos", "lanczos4"]
Resized = tuple[bytes | None, int | None, int | None, int | None, int | None, str | None]
"""img2dataset's answer of a resizer: bytes, width, height, original width and height, error."""


class PictureConfig(Config):
    """What is written of a picture; the names and the meanings are img2dataset's, but for `resize_mode: no`."""

    resize_mode: Mode = "no"
    """no: the bytes as they were served, whatever their format; img2dataset would encode them anew."""
    image_size: int = Field(default=256, gt=0)
    resize_only_if_bigger: bool = False
    upscale_interpolation: Interpolation = "lanczos"
    downscale_interpolation: Interpolation = "area"
    encode_format: Literal["jpg", "png", "webp"] = "jpg"
    encode_quality: int = Field(default=95, ge=0, le=100)
    skip_reencode: bool = False
    min_image_size: int = Field(default=0, ge=0)
    max_aspect_ratio: float | None = Field(default=None, ge=1)
    max_pixels: int = Field(default=decode.MAX_PIXELS, gt=0)
    """img2dataset's max_image_area, asked of the header before a pixel is decoded."""
    extract_exif: bool = True

    def resized(self, width: int, height: int) -> tuple[int, int] | None:
        """The largest picture that resizing makes of one of this size; None where it stays as it is."""
        shorter, longer = sorted((width, height))
        by_shorter = self.resize_mode in ("keep_ratio", "center_crop")
        side = shorter if by_shorter else longer
        if self.resize_mode == "no" or (self.resize_only_if_bigger and side <= self.image_size):
            return None
        if self.resize_mode == "border":
            return self.image_size, self.image_size
        scale = self.image_size / side
        return max(1, round(width * scale)), max(1, round(height * scale))


_MAX_SIDE = {"jpg": 65_500, "webp": 16_383, "png": 1_000_000}
"""Pixels that an encoder takes, at most."""


class ImageCheck:
    """Looks at a picture before img2dataset's resizer may decode it."""

    def __init__(self, config: PictureConfig, resizer: Any = None) -> None:
        self._config = config
        self._resizer = resizer

    def __call__(self, stream: io.BytesIO, boxes: Any = None) -> Resized:
        data = stream.getvalue()
        try:
            header = self._looked(data)
            if self._config.resize_mode == "no":
                return data, header.width, header.height, header.width, header.height, None
            self._check_resized(header)
            if not header.plain:
                stream = self._mended(data)
        except Failure as failure:
            return None, None, None, None, None, str(failure)
        answer: Resized = self._resizer(stream, boxes)
        return answer

    def _looked(self, data: bytes) -> decode.Header:
        try:
            header = decode.inspect(data, self._config.max_pixels)
        except ImageError as error:
            told = str(error)
            kind = {"not": "not-an-image", "too": "too-many-pixels"}.get(told.partition(" ")[0], "broken-image")
            raise Failure(
                kind, told if kind == "too-many-pixels" else f"{len(data)} bytes: {data[:12]!r}..."
            ) from error
        shown = f"{header.width} x {header.height}"
        shorter, longer = sorted((header.width, header.height))
        if shorter < 1:
            raise Failure("broken-image", shown)
        if shorter < self._config.min_image_size:
            raise Failure("too-small", shown)
        if self._config.max_aspect_ratio is not None and longer / shorter > self._config.max_aspect_ratio:
            raise Failure("too-narrow", shown)
        if not decode.has_end(data):
            raise Failure("truncated", f"{len(data)} bytes of a {header.form}")
        return header

    def _check_resized(self, header: decode.Header) -> None:
        """Refuse what resizing would blow up: a picture of 1 x 50,000 pixels, whose shorter side becomes 256, say."""
        config = self._config
        made = config.resized(header.width, header.height)
        if made is None and config.skip_reencode:
            return
        width, height = made or (header.width, header.height)
        told = f"{header.width} x {header.height} would become {width} x {height}"
        # A limit that was set low is about what comes; images of a small area may be asked for at a larger size.
        allowed = max(config.max_pixels, decode.MAX_PIXELS)
        if width * height > allowed:
            raise Failure("too-many-pixels", f"{told}, limit {allowed}")
        side = _MAX_SIDE[config.encode_format]
        if config.resize_mode != "center_crop" and max(width, height) > side:
            raise Failure("too-many-pixels", f"{told}, a {config.encode_format} has {side} a side at most")

    def _mended(self, data: bytes) -> io.BytesIO:
        """The picture upright and with 8 bits, without loss: OpenCV would leave it on its side, or clip it to white."""
        try:
            picture = decode.decode(data, self._config.max_pixels)
        except ImageError as error:
            raise Failure("broken-image", str(error)) from error
        stream = io.BytesIO()
        picture.save(stream, "PNG", compress_level=1)
        stream.seek(0)
        return stream


class Opener:
    """What `urllib.request.urlopen` finds."""

    def __init__(self, visitor: Visitor) -> None:
        self._visitor = visitor

    def open(self, request: urllib.request.Request | str, data: object = None, timeout: object = None) -> Response:
        """Visit the request's URL; of the request nothing else is used."""
        try:
            answer = self._visitor.get(request if isinstance(request, str) else request.full_url)
        except Failure:
            raise
        except Exception as error:  # img2dataset hands on the text alone: one without a kind is its own
            raise Failure("lost", f"{type(error).__name__}: {error}") from error
        return Response(answer.headers, answer.body)


class Response:
    """A body that was read already, as img2dataset reads one."""

    def __init__(self, headers: HTTPMessage, body: bytes) -> None:
        self.headers = headers
        self._body = body

    def read(self) -> bytes:
        return self._body

    def __enter__(self) -> Response:
        return self

    def __exit__(self, *_: object) -> None:
        self._body = b""


@contextmanager
def installed(visitor: Visitor) -> Iterator[None]:
    """Let every `urlopen` of this process go through the visitor for a while."""
    before = urllib.request._opener  # type: ignore[attr-defined]
    urllib.request.install_opener(Opener(visitor))  # type: ignore[arg-type]
    try:
        yield
    finally:
        urllib.request.install_opener(before)


def load_img2dataset() -> None:
    """Import what is slow to import, and keep it from phoning home."""
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
    os.environ.setdefault("WANDB_MODE", "disabled")
    import img2dataset.downloader
    import img2dataset.resizer
    import img2dataset.writer

    assert img2dataset.downloader.urllib.request is urllib.request, "img2dataset fetches some other way"


def fetch(
    rows: pa.Table, shard: int, folder: Path, config: PictureConfig, visitor: Visitor, threads: int, layout: Layout
) -> Written:
    """Fetch the rows of one shard into `folder`: what img2dataset would write, its members not yet in order.

    Every row ends: in the Parquet with its status, a success also in the spool.
    """
    from img2dataset.downloader import Downloader
    from img2dataset.writer import WebDatasetSampleWriter

    written = Written(folder, f"{shard:0{layout.digits}d}")

    class Writer(WebDatasetSampleWriter):
        """img2dataset's writer; only that its members go to a spool, since they come in no order."""

        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            self.tarwriter = written.spool = Spool(self.tar_fd)

    feather = folder / "rows.feather"
    with pa.OSFile(str(feather), "wb") as file, pa.ipc.new_file(file, rows.schema) as ipc:
        ipc.write_table(rows)
    downloader = Downloader(
        sample_writer_class=Writer,
        resizer=ImageCheck(config, _resizer(config)),
        thread_count=threads,
        save_caption="caption" in rows.column_names,
        extract_exif=config.extract_exif,
        output_folder=str(folder),
        column_list=rows.column_names,
        timeout=None,  # the visitor has its own, and the retries, the agent and the directives too
        number_sample_per_shard=layout.size,
        oom_shard_count=layout.digits,
        compute_hash=HASH,
        verify_hash_type=None,
        encode_format=config.encode_format,
        retries=0,
        user_agent_token=None,
        disallowed_header_directives=None,
    )
    with installed(visitor):
        downloader.download_shard((shard, str(feather)))
    return written


class Layout(Config):
    """How shards are cut and named."""

    size: int = Field(default=10_000, gt=0)
    """Rows of a shard."""
    digits: int = Field(default=5, ge=1, le=12)
    """Digits of a shard's name."""


def _resizer(config: PictureConfig) -> Any:
    from img2dataset.resizer import Resizer

    return Resizer(
        image_size=config.image_size,
        resize_mode=config.resize_mode,
        resize_only_if_bigger=config.resize_only_if_bigger,
        upscale_interpolation=config.upscale_interpolation,
        downscale_interpolation=config.downscale_interpolation,
        encode_quality=config.encode_quality,
        encode_format=config.encode_format,
        skip_reencode=config.skip_reencode,
    )
