"""A safe HTTP client: one request to a public host, in bounded time and bytes.

A socket's timeout holds for one read, so a server that drips a byte a second keeps urllib for ever. Here every read
checks the deadline of the whole sample first, and the connection goes to the very address that was checked.
"""

from __future__ import annotations

import http.client
import io
import socket
import ssl
import time
import urllib.request
import zlib
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from http.client import HTTPMessage, HTTPResponse
from typing import Any
from urllib.parse import urljoin, urlsplit

from pydantic import Field, field_validator

from capfilt.config import Config
from capfilt.downloading.failures import Failure
from capfilt.downloading.http.addresses import Address, AddressPolicy, Resolver, Target, nat64_prefixes, networks

MAX_HEAD = 256 * 2**10
"""Bytes before the body; http.client itself allows 100 headers of 64 KiB each, and any number of `100 Continue`."""
READ_BYTES = 2**16
RATIO_FROM = 2**20
"""Decompressed bytes below which no compression ratio is suspicious."""
_REDIRECTS = (301, 302, 303, 307, 308)


class Limits(Config):
    """What one URL may cost, and where it may lead."""

    max_bytes: int = Field(default=32 * 2**20, gt=0)
    """Bytes of a body, as sent and as decompressed."""
    max_ratio: float = Field(default=100, gt=0)
    """Decompressed bytes of a body for each byte sent."""
    max_redirects: int = Field(default=5, ge=0)
    """Redirects that one URL may lead through."""
    allow_private: tuple[str, ...] = ()
    """Blocks (CIDR) that may be connected to although they are not public."""
    deny: tuple[str, ...] = ()
    """Blocks (CIDR) that may not be connected to, whatever they are: an operator's own public addresses, say."""
    nat64: tuple[str, ...] = ()
    """Prefixes behind which IPv4 addresses lie, where the network's name server gives none: 2001:db8:64::/96."""
    use_proxies: bool = False
    """Go through the proxies of the environment. Of plain http a proxy resolves the name once more, by itself."""

    @field_validator("allow_private", "deny")
    @classmethod
    def _blocks(cls, blocks: tuple[str, ...]) -> tuple[str, ...]:
        networks(blocks)
        return blocks

    @field_validator("nat64")
    @classmethod
    def _prefixes(cls, blocks: tuple[str, ...]) -> tuple[str, ...]:
        nat64_prefixes(blocks)
        return blocks

    def address_policy(self) -> AddressPolicy:
        """Which addresses may be connected to."""
        return AddressPolicy(networks(self.allow_private), networks(self.deny), nat64_prefixes(self.nat64))


class Deadline:
    """The time that one sample has: `seconds` in all, `timeout` seconds for a single wait."""

    def __init__(self, seconds: float, timeout: float) -> None:
        self._seconds = seconds
        self._timeout = timeout
        self._end = time.monotonic() + seconds

    def remaining(self) -> float:
        """Seconds that are left; negative once they are over."""
        return self._end - time.monotonic()

    def wait(self) -> float:
        """Seconds that the next wait may take; Failure("timeout") once the time is over."""
        remaining = self.remaining()
        if remaining <= 0:
            raise Failure("timeout", f"not done in {self._seconds:g} s")
        return min(remaining, self._timeout)

    def extend(self, seconds: float) -> None:
        """Add a wait that is ours and not the host's."""
        self._end += seconds


@dataclass(frozen=True)
class Response:
    """A response that was read to its end; of an error or a redirect without its body."""

    url: str
    status: int
    headers: HTTPMessage
    body: bytes = b""

    def redirect_url(self) -> str:
        """Where a response that is no success leads; Failure where it leads nowhere."""
        if self.status not in _REDIRECTS:
            raise Failure(f"http-{self.status}")
        location = self.headers.get("Location")
        if not location:
            raise Failure("redirects", f"{self.status} without a Location")
        try:
            return urljoin(self.url, location.encode("latin-1", "replace").decode("utf-8", "replace").strip())
        except ValueError as error:
            raise Failure("bad-url", str(error)[:100]) from error


class SafeHttpClient:
    """Makes single requests; redirects are the caller's to follow, each by a request of its own."""

    def __init__(self, limits: Limits, user_agent: str, resolver: Resolver | None = None) -> None:
        self.limits = limits
        self.user_agent = user_agent
        self._resolver = resolver or Resolver(limits.address_policy())
        self._proxies: Mapping[str, str] = urllib.request.getproxies() if limits.use_proxies else {}

    @cached_property
    def _context(self) -> ssl.SSLContext:
        """The certificates that this machine trusts; to read them takes 50 ms."""
        return ssl.create_default_context()

    def request(self, target: Target, deadline: Deadline, truncate_at: int | None = None) -> Response:
        """GET one URL. Of an error or a redirect the body is not read.

        `truncate_at`: bytes to which a body is cut; None: one of more than `limits.max_bytes` is a Failure.

        Raises Failure, of any kind that a host can cause, within the deadline.
        """
        try:
            with closing(self._connect(target, deadline)) as sock:
                return self._exchange(target, sock, deadline, truncate_at)
        except TimeoutError as error:
            raise Failure("timeout", f"{target.host} said nothing for too long") from error
        except ssl.SSLError as error:
            raise Failure("tls", str(error)[:200]) from error
        except (ConnectionError, http.client.IncompleteRead) as error:
            raise Failure("cut", str(error)[:200]) from error
        except http.client.HTTPException as error:
            raise Failure("bad-answer", f"{type(error).__name__}: {str(error)[:100]}") from error
        except zlib.error as error:
            raise Failure("encoding", f"it does not unpack: {error}") from error
        except OSError as error:
            raise Failure("unreachable", str(error)[:200]) from error

    # ---- connecting ----

    def _connect(self, target: Target, deadline: Deadline) -> socket.socket:
        addresses = self._resolver.addresses(target.host, deadline.wait())
        proxy = self._proxy(target)
        if proxy is None:
            sock = _connect_to_first(addresses, target.port, deadline)
        else:
            sock = self._connect_by_proxy(proxy, target, deadline)
        if target.scheme == "http":
            return sock
        try:
            sock.settimeout(deadline.wait())
            return self._context.wrap_socket(sock, server_hostname=target.host)
        except BaseException:
            sock.close()
            raise

    def _proxy(self, target: Target) -> tuple[str, int] | None:
        """Host and port of the proxy for a target; None for none."""
        url = self._proxies.get(target.scheme)
        if not url or urllib.request.proxy_bypass(target.host):
            return None
        parts = urlsplit(url if "//" in url else f"//{url}")
        return parts.hostname or "", parts.port or 8080

    def _connect_by_proxy(self, proxy: tuple[str, int], target: Target, deadline: Deadline) -> socket.socket:
        """Connect to a proxy; of https through it to the first address of the target."""
        sock = socket.create_connection(proxy, timeout=deadline.wait())
        if target.scheme == "http":
            return sock
        try:
            address = self._resolver.addresses(target.host, deadline.wait())[0]
            host = f"[{address}]" if address.version == 6 else str(address)
            sock.sendall(f"CONNECT {host}:{target.port} HTTP/1.1\r\nHost: {host}:{target.port}\r\n\r\n".encode())
            bounded = _BoundedSocket(sock, deadline, MAX_HEAD, buffer=1)
            response = _FinalResponse(bounded, method="CONNECT")  # type: ignore[arg-type]
            response.begin()
            if response.status != 200:
                raise Failure("unreachable", f"the proxy answered {response.status}")
            return sock
        except BaseException:
            sock.close()
            raise

    # ---- request and response ----

    def _exchange(self, target: Target, sock: socket.socket, deadline: Deadline, truncate_at: int | None) -> Response:
        to_proxy = target.scheme == "http" and self._proxy(target) is not None
        lines = (
            f"GET {f'http://{target.authority}{target.path}' if to_proxy else target.path} HTTP/1.1",
            f"Host: {target.authority}",
            f"User-Agent: {self.user_agent}",
            "Accept: image/*,*/*;q=0.8",
            "Accept-Encoding: identity",
            "Connection: close",
        )
        sock.settimeout(deadline.wait())
        sock.sendall("\r\n".join((*lines, "", "")).encode())
        bounded = _BoundedSocket(sock, deadline, MAX_HEAD)
        response = _FinalResponse(bounded, method="GET")  # type: ignore[arg-type]
        with closing(response):
            response.begin()
            headers = response.headers
            if not 200 <= response.status < 300:
                return Response(target.url, response.status, headers)
            cap = self.limits.max_bytes if truncate_at is None else truncate_at
            bounded.allow(2 * cap + MAX_HEAD)
            body = self._read_body(response, cap, truncate=truncate_at is not None)
            return Response(target.url, response.status, headers, body)

    def _read_body(self, response: HTTPResponse, cap: int, truncate: bool) -> bytes:
        """Read a body, decompressed, of at most `cap` bytes; a longer one is truncated, or a Failure."""
        length = response.length
        if length is not None and length > cap and not truncate:
            raise Failure("too-big", f"{length} bytes, allowed are {cap}")
        decompressor = _decompressor(response.headers.get("Content-Encoding", "identity"))
        chunks: list[bytes] = []
        received = decompressed = 0
        while chunk := response.read(READ_BYTES):
            received += len(chunk)
            if decompressor is not None:
                chunk = self._decompress(decompressor, chunk, received, decompressed, cap)
            chunks.append(chunk)
            decompressed += len(chunk)
            if max(received, decompressed) > cap:
                if truncate:
                    return b"".join(chunks)[:cap]
                raise Failure("too-big", f"more than {cap} bytes")
        if length is not None and received < length:
            raise Failure("cut", f"{received} of {length} bytes came")
        if decompressor is not None and not decompressor.eof:
            raise Failure("cut", "the compressed body has no end")
        return b"".join(chunks)

    def _decompress(self, decompressor: Any, chunk: bytes, received: int, before: int, cap: int) -> bytes:
        """Decompress a chunk; `received` and `before` count bytes sent, with it, and decompressed, without it."""
        data: bytes = decompressor.decompress(chunk, max(1, cap - before + 1))
        total = before + len(data)
        if decompressor.unconsumed_tail:
            raise Failure("too-big", f"{received} bytes unpack to more than {cap}")
        if total > RATIO_FROM and total > received * self.limits.max_ratio:
            raise Failure("too-big", f"{received} bytes unpack to {total}, allowed is {self.limits.max_ratio:g} times")
        return data


def _connect_to_first(addresses: list[Address], port: int, deadline: Deadline) -> socket.socket:
    """Connect to the first of the checked addresses that answers; the Failure of the first where none does."""
    failures: list[Failure] = []
    for address in addresses:
        family = socket.AF_INET if address.version == 4 else socket.AF_INET6
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.settimeout(deadline.wait())
            sock.connect((str(address), port))
            return sock
        except TimeoutError:
            failures.append(Failure("timeout", f"{address} port {port} does not answer"))
        except ConnectionRefusedError:
            failures.append(Failure("refused", f"{address} port {port}"))
        except OSError as error:
            failures.append(Failure("unreachable", f"{address}: {error.strerror or error}"))
        except BaseException:
            sock.close()
            raise
        sock.close()
    raise failures[0]


def _decompressor(encoding: str) -> Any:
    """A zlib object that undoes a content encoding; None for identity."""
    name = encoding.strip().lower()
    if name in ("", "identity"):
        return None
    if name in ("gzip", "x-gzip", "deflate"):
        return zlib.decompressobj(zlib.MAX_WBITS | 32)
    raise Failure("encoding", f"{name[:40]!r} was not asked for")


class _FinalResponse(HTTPResponse):
    """A response whose status is final: http.client itself skips `100 Continue` alone."""

    def _read_status(self) -> tuple[str, int, str]:
        while True:
            version, status, reason = super()._read_status()  # type: ignore[misc]
            if not 100 <= status < 200:
                return version, status, reason
            if status == 101:
                raise Failure("bad-answer", "101: another protocol, which was not asked for")
            http.client.parse_headers(self.fp)


class _BoundedSocket(io.RawIOBase):
    """A socket as http.client reads from one, whose every read checks the deadline and counts its bytes."""

    def __init__(self, sock: socket.socket, deadline: Deadline, budget: int, buffer: int = READ_BYTES) -> None:
        super().__init__()
        self._sock = sock
        self._deadline = deadline
        self._budget = budget
        self._buffer = buffer

    def allow(self, budget: int) -> None:
        """Count anew: so many bytes may come from here on."""
        self._budget = budget

    def makefile(self, mode: str) -> io.BufferedReader:
        """The file that HTTPResponse reads from."""
        return io.BufferedReader(self, self._buffer)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._sock.settimeout(self._deadline.wait())
        count = self._sock.recv_into(buffer)
        self._budget -= count
        if self._budget < 0:
            raise Failure("bad-answer", "endless headers, or more framing than picture")
        return count
