"""Fetching the rows of one shard by img2dataset: its Downloader, Resizer and WebDatasetSampleWriter.

img2dataset fetches through `urllib.request.urlopen`, which uses whatever opener is installed: ours asks the polite
client. A picture's header is checked before img2dataset decodes it. img2dataset is imported late, by `fetch`: it
takes seconds, and must not ask the network whether it is out of date.
"""

from __future__ import annotations

import io
import json
import os
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPMessage
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from capfilt.config import Config
from capfilt.data.images import decode
from capfilt.downloading.failures import Failure
from capfilt.downloading.finalize import MemberSpool, RawShard
from capfilt.downloading.http.politeness import PoliteClient
from capfilt.downloading.plans import ShardLayout
from capfilt.errors import ImageError

HASH = "sha256"
Mode = Literal["no", "border", "keep_ratio", "keep_ratio_largest", "center_crop"]
Interpolation = Literal["nearest", "linear", "bilinear", "cubic", "bicubic", "area", "lanczos", "lanczos4"]
Resized = tuple[bytes | None, int | None, int | None, int | None, int | None, str | None]
"""What img2dataset takes from a resizer: bytes, width, height, original width and height, error."""

_MAX_SIDE = {"jpg": 65_500, "webp": 16_383, "png": 1_000_000}
"""Pixels of a side that an encoder takes, at most."""


class PictureConfig(Config):
    """What is written of a picture; the names and the meanings are img2dataset's, but for `resize_mode: no`."""

    resize_mode: Mode = "no"
    """no: the bytes as they were served, whatever their format; img2dataset would encode them anew."""
    image_size: int = Field(default=256, gt=0)
    """Pixels of the side that the mode fixes."""
    resize_only_if_bigger: bool = False
    """Leave a picture alone that is not larger than `image_size`."""
    upscale_interpolation: Interpolation = "lanczos"
    """The filter for pictures that grow."""
    downscale_interpolation: Interpolation = "area"
    """The filter for pictures that shrink."""
    encode_format: Literal["jpg", "png", "webp"] = "jpg"
    """The format in which a resized picture is written."""
    encode_quality: int = Field(default=95, ge=0, le=100)
    """The quality of jpg and webp; of png the compression, 0 to 9."""
    skip_reencode: bool = False
    """Keep the bytes as they were served where a picture was not resized."""
    min_image_size: int = Field(default=0, ge=0)
    """Pixels of the shorter side, at least."""
    max_aspect_ratio: float | None = Field(default=None, ge=1)
    """The longer side over the shorter one, at most."""
    max_pixels: int = Field(default=decode.MAX_PIXELS, gt=0)
    """img2dataset's max_image_area, checked by the header before a pixel is decoded."""
    extract_exif: bool = True
    """Write the picture's EXIF into its json."""

    def resized_size(self, width: int, height: int) -> tuple[int, int] | None:
        """Width and height in pixels that resizing gives, at most; None where a picture keeps its size."""
        shorter, longer = sorted((width, height))
        by_shorter = self.resize_mode in ("keep_ratio", "center_crop")
        side = shorter if by_shorter else longer
        if self.resize_mode == "no" or (self.resize_only_if_bigger and side <= self.image_size):
            return None
        if self.resize_mode == "border":
            return self.image_size, self.image_size
        scale = self.image_size / side
        return max(1, round(width * scale)), max(1, round(height * scale))


# ---- what img2dataset calls as its resizer ----


class ImageCheck:
    """Checks a picture by its header before img2dataset's `resizer` may decode it."""

    def __init__(self, config: PictureConfig, resizer: Any = None) -> None:
        self._config = config
        self._resizer = resizer

    def __call__(self, stream: io.BytesIO, boxes: Any = None) -> Resized:
        data = stream.getvalue()
        try:
            header = self._check_header(data)
            if self._config.resize_mode == "no":
                return data, header.width, header.height, header.width, header.height, None
            self._check_resized_size(header)
            if not header.is_plain:
                stream = self._as_plain_png(data)
        except Failure as failure:
            return None, None, None, None, None, str(failure)
        resized: Resized = self._resizer(stream, boxes)
        return resized

    def _check_header(self, data: bytes) -> decode.Header:
        header = self._read_header(data)
        size = f"{header.width} x {header.height}"
        shorter, longer = sorted((header.width, header.height))
        if shorter < 1:
            raise Failure("broken-image", size)
        if shorter < self._config.min_image_size:
            raise Failure("too-small", size)
        if self._config.max_aspect_ratio is not None and longer / shorter > self._config.max_aspect_ratio:
            raise Failure("too-narrow", size)
        if not decode.has_end(data):
            raise Failure("truncated", f"{len(data)} bytes of a {header.format}")
        return header

    def _read_header(self, data: bytes) -> decode.Header:
        try:
            return decode.inspect(data, self._config.max_pixels)
        except ImageError as error:
            message = str(error)
            if message.startswith("too "):
                raise Failure("too-many-pixels", message) from error
            kind = "not-an-image" if message.startswith("not ") else "broken-image"
            raise Failure(kind, f"{len(data)} bytes: {data[:12]!r}...") from error

    def _check_resized_size(self, header: decode.Header) -> None:
        """Refuse a picture that resizing would blow up: of 1 x 50,000 pixels, say, whose shorter side becomes 256."""
        config = self._config
        resized = config.resized_size(header.width, header.height)
        if resized is None and config.skip_reencode:
            return
        width, height = resized or (header.width, header.height)
        change = f"{header.width} x {header.height} would become {width} x {height}"
        # max_pixels may be set low for what is downloaded, and image_size still ask for a larger picture.
        limit = max(config.max_pixels, decode.MAX_PIXELS)
        if width * height > limit:
            raise Failure("too-many-pixels", f"{change}, limit {limit}")
        side = _MAX_SIDE[config.encode_format]
        if config.resize_mode != "center_crop" and max(width, height) > side:
            raise Failure("too-many-pixels", f"{change}, a {config.encode_format} has {side} a side at most")

    def _as_plain_png(self, data: bytes) -> io.BytesIO:
        """The picture upright and with 8 bits, lossless: OpenCV would leave it on its side, or clip it to white."""
        try:
            picture = decode.decode(data, self._config.max_pixels)
        except ImageError as error:
            raise Failure("broken-image", str(error)) from error
        stream = io.BytesIO()
        picture.save(stream, "PNG", compress_level=1)
        stream.seek(0)
        return stream


# ---- what img2dataset calls as urllib.request.urlopen ----


class PoliteOpener:
    """An opener for `urllib.request.install_opener` that fetches by a polite client."""

    def __init__(self, client: PoliteClient) -> None:
        self._client = client

    def open(
        self, request: urllib.request.Request | str, data: object = None, timeout: object = None
    ) -> UrlopenResponse:
        """Fetch the request's URL; nothing else of the request is used."""
        try:
            response = self._client.get(request if isinstance(request, str) else request.full_url)
        except Failure:
            raise
        except Exception as error:  # img2dataset keeps the text alone, which must begin with a kind
            raise Failure("lost", f"{type(error).__name__}: {error}") from error
        return UrlopenResponse(response.headers, response.body)


class UrlopenResponse:
    """A body that was read already, as img2dataset reads one."""

    def __init__(self, headers: HTTPMessage, body: bytes) -> None:
        self.headers = headers
        self._body = body

    def read(self) -> bytes:
        return self._body

    def __enter__(self) -> UrlopenResponse:
        return self

    def __exit__(self, *_: object) -> None:
        self._body = b""


@contextmanager
def urlopen_by(client: PoliteClient) -> Iterator[None]:
    """Let every `urlopen` of this process go through the polite client inside the block."""
    before = urllib.request._opener  # type: ignore[attr-defined]
    urllib.request.install_opener(PoliteOpener(client))  # type: ignore[arg-type]
    try:
        yield
    finally:
        urllib.request.install_opener(before)


# ---- img2dataset ----


def import_img2dataset() -> None:
    """Import img2dataset, which takes seconds, with its requests to the network turned off."""
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
    os.environ.setdefault("WANDB_MODE", "disabled")
    import img2dataset.downloader
    import img2dataset.resizer
    import img2dataset.writer

    # It makes its transforms anew for every picture, which takes longer than to resize one.
    if not isinstance(img2dataset.resizer.A, _KeptTransforms):
        img2dataset.resizer.A = _KeptTransforms(img2dataset.resizer.A)
    assert img2dataset.downloader.urllib.request is urllib.request, "img2dataset fetches some other way"


class _KeptTransforms:
    """albumentations, whose transforms of the same arguments are made once. None of them draws at random."""

    def __init__(self, package: Any) -> None:
        self._package = package
        self._made: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def make(**arguments: Any) -> Any:
            key = f"{name} {arguments}"
            if key not in self._made:
                self._made[key] = getattr(self._package, name)(**arguments)
            return self._made[key]

        return make


def fetch(
    rows: pa.Table,
    shard: int,
    folder: Path,
    config: PictureConfig,
    client: PoliteClient,
    num_threads: int,
    layout: ShardLayout,
) -> RawShard:
    """Fetch the rows of one shard into `folder` as img2dataset writes them, but for the tar's members.

    Every row ends in the Parquet with its status, a success also in the spool, in any order; `finalize` sorts them.
    """
    from img2dataset.downloader import Downloader
    from img2dataset.writer import WebDatasetSampleWriter

    raw = RawShard(folder, layout.name(shard))

    class Writer(WebDatasetSampleWriter):
        """img2dataset's writer, whose members go to a spool: they come in no order."""

        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            self.tarwriter = raw.spool = MemberSpool(self.tar_fd)

        def write(self, img_str: bytes | None, key: str, caption: Any, meta: dict[str, Any]) -> None:
            """As the original, but for how the json is written, whose bytes are the same."""
            if img_str is not None:
                texts = {"txt": "" if caption is None else str(caption)} if self.save_caption else {}
                self.tarwriter.write({"__key__": key, self.encode_format: img_str, **texts, "json": indented(meta)})
            self.buffered_parquet_writer.write(meta)

    feather = folder / "rows.feather"
    with pa.OSFile(str(feather), "wb") as file, pa.ipc.new_file(file, rows.schema) as ipc:
        ipc.write_table(rows)
    downloader = Downloader(
        sample_writer_class=Writer,
        resizer=ImageCheck(config, make_resizer(config)),
        thread_count=num_threads,
        save_caption="caption" in rows.column_names,
        extract_exif=config.extract_exif,
        output_folder=str(folder),
        column_list=rows.column_names,
        timeout=None,  # the polite client has this one, and retries, user agent and directives
        number_sample_per_shard=layout.size,
        oom_shard_count=layout.digits,
        compute_hash=HASH,
        verify_hash_type=None,
        encode_format=config.encode_format,
        retries=0,
        user_agent_token=None,
        disallowed_header_directives=None,
    )
    with urlopen_by(client):
        downloader.download_shard((shard, str(feather)))
    return raw


def indented(meta: dict[str, Any]) -> str:
    """`json.dumps(meta, indent=4)`. With an indent json has a slow encoder; of a flat object the fast one can do it."""
    meta.update({name: value.tolist() for name, value in meta.items() if isinstance(value, np.ndarray)})
    if any(isinstance(value, list | tuple | dict) for value in meta.values()):
        return json.dumps(meta, indent=4)
    return "{\n    " + json.dumps(meta, separators=(",\n    ", ": "))[1:-1] + "\n}"


def make_resizer(config: PictureConfig) -> Any:
    """img2dataset's resizer."""
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
