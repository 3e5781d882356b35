"""A web server on loopback that does everything a web server should not; the fixture `hostile` starts one."""

from __future__ import annotations

import io
import itertools
import select
import socket
import ssl
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np
from PIL import Image

STEP = 0.05
"""Seconds between the bytes of a drip."""


def jpeg(seed: int = 0, size: int = 64) -> bytes:
    """A small photograph-like picture, another one for every seed."""
    buffer = io.BytesIO()
    noise = np.random.default_rng(seed).integers(0, 255, (size, size + size // 4, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def png_of(width: int, height: int) -> bytes:
    """A PNG that says so of itself and has next to no pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(b"\0" * 1000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def animation() -> bytes:
    """A GIF of three frames, red first."""
    frames = [Image.new("RGB", (40, 30), colour) for colour in ("red", "green", "blue")]
    buffer = io.BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    return buffer.getvalue()


def bomb(megabytes: int = 64) -> bytes:
    """Nothing, gzipped: a thousandth of its size."""
    packer = zlib.compressobj(9, zlib.DEFLATED, zlib.MAX_WBITS | 16)
    return b"".join([*(packer.compress(bytes(2**20)) for _ in range(megabytes)), packer.flush()])


class Hostile:
    """The server. `robots` is its robots.txt (None: 404, an int: that status); `seen` is every request it got.

    What is under /later fails until the server is `healed`.
    """

    def __init__(self, certificate: tuple[Path, Path] | None = None) -> None:
        self.robots: str | int | None = None
        self.healed = False
        self.seen: list[tuple[float, str, dict[str, str]]] = []
        self._stopped = threading.Event()
        self._context: ssl.SSLContext | None = None
        if certificate is not None:
            self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self._context.load_cert_chain(*certificate)
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=256)
        self.port = self._listener.getsockname()[1]
        self.root = f"http{'s' if certificate else ''}://127.0.0.1:{self.port}"
        self._threads: list[threading.Thread] = []
        self._accepting = threading.Thread(target=self._accept, daemon=True)
        self._accepting.start()

    def url(self, path: str) -> str:
        return f"{self.root}{path}"

    def paths(self) -> list[str]:
        """What was asked for, in order, without robots.txt."""
        return [path for _, path, _ in self.seen if path != "/robots.txt"]

    def close(self) -> None:
        self._stopped.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._accepting.join()
        for thread in self._threads:
            thread.join(5)

    # ---- serving ----

    def _accept(self) -> None:
        while not self._stopped.is_set():
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            thread = threading.Thread(target=self._serve, args=(connection,), daemon=True)
            thread.start()
            self._threads = [old for old in self._threads if old.is_alive()] + [thread]

    def _serve(self, connection: socket.socket) -> None:
        with connection:
            connection.settimeout(3)
            try:
                if self._context is not None:
                    connection = self._context.wrap_socket(connection, server_side=True)
                with connection:
                    method, path = self._request(connection)
                    if method == "CONNECT":
                        self._relay(connection, path)
                    else:
                        self._answer(connection, path)
            except (OSError, ValueError):
                return  # the visitor has hung up

    def _request(self, connection: socket.socket) -> tuple[str, str]:
        data = b""
        while b"\r\n\r\n" not in data:
            piece = connection.recv(65536)
            if not piece:
                raise OSError("no request")
            data += piece
        line, *headers = data.decode("latin-1").split("\r\n\r\n")[0].split("\r\n")
        method, path, _ = line.split(" ")
        told = dict(header.split(": ", 1) for header in headers)
        self.seen.append((time.monotonic(), path, {name.lower(): value for name, value in told.items()}))
        return method, path

    def _relay(self, connection: socket.socket, place: str) -> None:
        """Be a proxy."""
        host, _, port = place.rpartition(":")
        with socket.create_connection((host, int(port)), 3) as other:
            connection.sendall(b"HTTP/1.1 200 Connected\r\nVia: us\r\n\r\n")
            while not self._stopped.is_set():
                for one in select.select([connection, other], [], [], 0.1)[0]:
                    if not (data := one.recv(65536)):
                        return
                    (other if one is connection else connection).sendall(data)

    def _answer(self, connection: socket.socket, path: str) -> None:
        parts = urlsplit(path)
        asked = {name: values[0] for name, values in parse_qs(parts.query, keep_blank_values=True).items()}
        name, *rest = parts.path.strip("/").split("/")
        method = getattr(self, f"_{name.split('.')[0].replace('-', '_')}", None)
        for piece in method(rest, asked) if method else answer(404):
            connection.sendall(piece)

    # ---- what it does: each yields the bytes of an answer ----

    def _robots(self, rest: list[str], asked: dict[str, str]) -> Iterator[bytes]:
        if isinstance(self.robots, str):
            return answer(200, self.robots.encode(), "text/plain")
        return answer(self.robots or 404)

    def _ok(self, rest: list[str], asked: dict[str, str]) -> Iterator[bytes]:
        tags = [f"X-Robots-Tag: {tag}" for tag in asked.get("tag", "").split("|") if tag]
        return answer(200, jpeg(int(asked.get("seed", 0))), extra=tags)

    def _status(self, rest: list[str], asked: dict[str, str]) -> Iterator[bytes]:
        return answer(int(rest[0]), b"sorry", extra=[unquote(line) for line in asked.values()])

    def _later(self, rest: list[str], asked: dict[str, str]) -> Iterator[bytes]:
        return self._ok(rest, asked) if self.healed else answer(int(rest[0]))

    def _slow(self, rest: list[str], asked: dict[str, str]) -> Iterator[bytes]:
        self._stopped.wait(float(asked["s"]))
        return answer(200, jpeg())

    def _drip(self, rest: list[str], asked: dict[str, str]) -> Iterator[bytes]:
        yield b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n"
        yield from self._slowly(itertools.repeat(b"\xff"))

    def _drip_head(self, rest: list[str], asked: dict[str, str]) -> Iterator[bytes]:
        yield from self._slowly(bytes([byte]) for byte in b"HTTP/1.1 200 OK\r\nX: " + b"y" * 1000)

    def _hang(self, rest: list[str], asked: dict[str, str]) -> Iterator[bytes]:
        yield from self._slowly(itertools.repeat(b""))

    def _continue(self, rest: list[str], asked: dict[str, str]) -> Iterator[bytes]:
        every = b"HTTP/1.1 100 Continue\r\n\r\n"
        yield from self._slowly(itertools.repeat(every)) if "slowly" in asked else self._endlessly(every * 100)

    def _hints(self, rest: list[str], asked: dict[str, str]) -> Iterator[bytes]:
        """What comes before the answer, with headers of its own."""
        yield b"HTTP/1.1 103 Early Hints\r\nLink: </x.css>; rel=preload\r\n\r\nHTTP/1.1 102 Processing\r\n\r\n"
        yield from answer(200, jpeg(7))

    def _endless(self, rest: list[str], asked: dict[str, str]) -> Iterator[bytes]:
        yield b"HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\n\r\n\xff\xd8\xff"
        yield from self._endlessly(bytes(65536))

    def _chunks(self, rest: list[str], asked: dict[str, str]) -> Iterator[bytes]:
        yield b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
        yield from self._endlessly(b"1;" + b"x" * 5000 + b"\r\na\r\n")

    def _wrong(self, rest: list[str], asked: dict[str, str]) -> Iterator[bytes]:
        body = jpeg()
        yield f"HTTP/1.1 200 OK\r\nContent-Length: {len(body) + int(asked['by'])}\r\n\r\n".encode() + body

    def _cut(self, rest: list[str], asked: dict[str, str]) -> Iterator[bytes]:
        """The connection ends after so many bytes, of the whole answer or, where no length is told, of the body."""
        body = jpeg(size=100)
        head = b"HTTP/1.1 200 OK\r\n\r\n" if "untold" in asked else next(answer(200, b"", length=len(body)))
        yield (head + body)[: int(rest[0])] if "untold" not in asked else head + body[: int(rest[0])]

    def _bomb(self, rest: list[str], asked: dict[str, str]) -> Iterator[bytes]:
        return answer(200, bomb(int(asked.get("mb", 64))), extra=["Content-Encoding: gzip"])

    def _gzip(self, rest: list[str], asked: dict[str, str]) -> Iterator[bytes]:
        packer = zlib.compressobj(9, zlib.DEFLATED, zlib.MAX_WBITS | 16)
        whole = packer.compress(jpeg()) + packer.flush()
        return answer(200, whole[: len(whole) - int(asked.get("less", 0))], extra=["Content-Encoding: gzip"])

    def _brotli(self, rest: list[str], asked: dict[str, str]) -> Iterator[bytes]:
        return answer(200, b"\x0b\x02\x80", extra=["Content-Encoding: br"])

    def _wide(self, rest: list[str], asked: dict[str, str]) -> Iterator[bytes]:
        return answer(200, png_of(50_000, 50_000), "image/png")

    def _loop(self, rest: list[str], asked: dict[str, str]) -> Iterator[bytes]:
        return answer(302, extra=[f"Location: /loop/{int(rest[0]) + 1 if rest else 1}"])

    def _hops(self, rest: list[str], asked: dict[str, str]) -> Iterator[bytes]:
        left = int(rest[0])
        return answer(307, extra=[f"Location: {f'/hops/{left - 1}' if left > 1 else '/ok'}"])

    def _to(self, rest: list[str], asked: dict[str, str]) -> Iterator[bytes]:
        yield next(answer(301, extra=[f"Location: {asked['u']}"], length=10**9))
        yield from self._endlessly(bytes(65536))

    def _busy(self, rest: list[str], asked: dict[str, str]) -> Iterator[bytes]:
        """429 for the first `n` times, then a picture."""
        told = sum(path.startswith("/busy") for path in self.paths())
        if told > int(asked.get("n", 10**6)):
            return answer(200, jpeg())
        return answer(429, extra=[f"Retry-After: {asked['after']}"] if "after" in asked else [])

    def _html(self, rest: list[str], asked: dict[str, str]) -> Iterator[bytes]:
        return answer(200, b"<!DOCTYPE html><html><body>no such picture</body></html>")

    def _svg(self, rest: list[str], asked: dict[str, str]) -> Iterator[bytes]:
        return answer(200, b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>', "image/svg+xml")

    def _animated(self, rest: list[str], asked: dict[str, str]) -> Iterator[bytes]:
        return answer(200, animation(), "image/gif")

    def _nothing(self, rest: list[str], asked: dict[str, str]) -> Iterator[bytes]:
        return answer(200, b"")

    def _headers(self, rest: list[str], asked: dict[str, str]) -> Iterator[bytes]:
        return answer(200, jpeg(), extra=[f"X-{i}: {i}" for i in range(10_000)])

    def _header(self, rest: list[str], asked: dict[str, str]) -> Iterator[bytes]:
        yield b"HTTP/1.1 200 OK\r\nX-Long: "
        yield from self._endlessly(b"y" * 65536)

    def _garbage(self, rest: list[str], asked: dict[str, str]) -> Iterator[bytes]:
        yield b"220 mail.example.org ESMTP\r\n"

    def _slowly(self, pieces: Iterator[bytes]) -> Iterator[bytes]:
        for piece in pieces:
            yield piece
            if self._stopped.wait(STEP):
                return

    def _endlessly(self, piece: bytes) -> Iterator[bytes]:
        while not self._stopped.is_set():
            yield piece


def answer(
    status: int, body: bytes = b"", kind: str = "image/jpeg", extra: list[str] | None = None, length: int | None = None
) -> Iterator[bytes]:
    """An answer as it should be: the head, then the body."""
    told = len(body) if length is None else length
    lines = [f"HTTP/1.1 {status} Because", f"Content-Length: {told}", f"Content-Type: {kind}", *(extra or [])]
    yield "\r\n".join([*lines, "", ""]).encode("utf-8")
    yield body
