"""The fence: one request to a public host, in bounded time and bytes; nothing else leaves a worker.

A socket's timeout holds for one read, so a server that drips a byte a second keeps urllib for ever. Here every
read asks the clock of the whole sample first, and the connection goes to the very address that was checked.
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
from http.client import HTTPMessage, HTTPResponse
from typing import Any
from urllib.parse import quote, urlsplit

from pydantic import Field, field_validator

from capfilt.config import Config
from capfilt.downloading.failures import Failure
from capfilt.downloading.http.addresses import Address, Policy, Resolver, nat64_prefixes, networks

MAX_HEAD = 256 * 2**10
"""Bytes before the body; http.client itself allows 100 headers of 64 KiB each, and any number of `100 Continue`."""
MAX_URL = 16_384
PIECE = 2**16
RATIO_FROM = 2**20
"""Bytes below which no compression is suspicious."""


class Limits(Config):
    """What one URL may cost, and where it may lead."""

    max_bytes: int = Field(default=32 * 2**20, gt=0)
    """Bytes of a body, as sent and as unpacked."""
    max_ratio: float = Field(default=100, gt=0)
    """How many times its size a compressed body may unpack to."""
    max_redirects: int = Field(default=5, ge=0)
    allow_private: tuple[str, ...] = ()
    """Blocks (CIDR) that may be talked to although they are not public."""
    deny: tuple[str, ...] = ()
    """Blocks (CIDR) that may not be talked to, whatever they are: an operator's own public addresses, say."""
    nat64: tuple[str, ...] = ()
    """Prefixes behind which IPv4 addresses lie, where the network's name server does not tell: 2001:db8:64::/96."""
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

    def policy(self) -> Policy:
        """Which addresses may be talked to."""
        return Policy(networks(self.allow_private), networks(self.deny), nat64_prefixes(self.nat64))


class Deadline:
    """The time that one sample has: `seconds` in all, `patience` for a single wait."""

    def __init__(self, seconds: float, patience: float) -> None:
        self.seconds = seconds
        self._patience = patience
        self._ends = time.monotonic() + seconds

    def left(self) -> float:
        """Seconds that are left; negative when they are over."""
        return self._ends - time.monotonic()

    def wait(self) -> float:
        """How long the next wait may take; Failure when the time is over."""
        left = self.left()
        if left <= 0:
            raise Failure("timeout", f"not done in {self.seconds:g} s")
        return min(left, self._patience)

    def forgive(self, seconds: float) -> None:
        """Do not count a wait that is ours and not the host's."""
        self._ends += seconds


@dataclass(frozen=True)
class Target:
    """An http(s) URL, taken apart and spelled in ASCII."""

    url: str
    scheme: str
    host: str
    port: int
    path: str

    @property
    def origin(self) -> str:
        """Scheme, host and port: what a robots.txt holds for."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}"

    @property
    def authority(self) -> str:
        """The Host header."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _PORTS[self.scheme] else f"{host}:{self.port}"


@dataclass(frozen=True)
class Answer:
    """A response that was read to its end, or whose body was of no interest."""

    url: str
    status: int
    headers: HTTPMessage
    body: bytes = b""


_PORTS = {"http": 80, "https": 443}


def target(url: str) -> Target:
    """Take a URL apart; Failure("bad-url") for what is not http(s) or cannot be sent."""
    if len(url) > MAX_URL:
        raise Failure("bad-url", f"{len(url)} characters")
    if any((ord(sign) < 33 and sign != " ") or ord(sign) == 127 for sign in url):
        raise Failure("bad-url", "control characters")
    try:
        parts = urlsplit(url)
        port, name = parts.port, parts.hostname or ""
        if parts.scheme not in _PORTS:
            raise Failure("bad-url", f"scheme {parts.scheme[:20]!r}; allowed are http and https")
        if parts.username is not None or parts.password is not None:
            raise Failure("bad-url", "a user name or password in it")
        host = name if ":" in name else name.encode("idna").decode().lower()
        if not host or any(sign in " /?#@\\%" for sign in host.partition("%25")[0]):
            raise Failure("bad-url", "no host")
        path = quote(parts.path or "/", safe="%/:=&?~#+!$,;'@()*[]|")
        query = quote(parts.query, safe="%/:=&?~+!$,;'@()*[]|")
    except (ValueError, UnicodeError) as error:
        raise Failure("bad-url", str(error)[:100]) from error
    full = f"{path}?{query}" if query else path
    return Target(url, parts.scheme, host, port or _PORTS[parts.scheme], full)


class SafeHttpClient:
    """Makes single requests; redirects are the caller's to follow, each through here again."""

    def __init__(
        self,
        limits: Limits,
        agent: str,
        resolver: Resolver | None = None,
        context: ssl.SSLContext | None = None,
    ) -> None:
        self.limits = limits
        self.agent = agent
        self._resolver = resolver or Resolver(limits.policy())
        self._context = context or ssl.create_default_context()
        self._proxies: Mapping[str, str] = urllib.request.getproxies() if limits.use_proxies else {}

    def request(self, goal: Target, clock: Deadline, keep: int | None = None) -> Answer:
        """GET one URL. Of an error or a redirect the body is not read; `keep` cuts a body instead of refusing it.

        Raises Failure, of any kind that a host can cause, within the clock's time.
        """
        try:
            with closing(self._connected(goal, clock)) as sock:
                return self._asked(goal, sock, clock, keep)
        except TimeoutError as error:
            raise Failure("timeout", f"{goal.host} said nothing for too long") from error
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

    # ---- the connection ----

    def _connected(self, goal: Target, clock: Deadline) -> socket.socket:
        addresses = self._resolver.addresses(goal.host, clock.wait())
        proxy = self._proxy(goal)
        sock = self._dialled([*addresses], goal.port, clock) if proxy is None else self._tunnel(proxy, goal, clock)
        if goal.scheme == "http":
            return sock
        try:
            sock.settimeout(clock.wait())
            return self._context.wrap_socket(sock, server_hostname=goal.host)
        except BaseException:
            sock.close()
            raise

    def _dialled(self, addresses: list[Address], port: int, clock: Deadline) -> socket.socket:
        """Connect to the first of the checked addresses that answers."""
        trouble: Failure | None = None
        for address in addresses:
            family = socket.AF_INET if address.version == 4 else socket.AF_INET6
            sock = socket.socket(family, socket.SOCK_STREAM)
            try:
                sock.settimeout(clock.wait())
                sock.connect((str(address), port))
                return sock
            except TimeoutError:
                trouble = trouble or Failure("timeout", f"{address} port {port} does not answer")
            except ConnectionRefusedError:
                trouble = trouble or Failure("refused", f"{address} port {port}")
            except OSError as error:
                trouble = trouble or Failure("unreachable", f"{address}: {error.strerror or error}")
            except BaseException:
                sock.close()
                raise
            sock.close()
        assert trouble is not None, "a host has at least one address"
        raise trouble

    def _proxy(self, goal: Target) -> tuple[str, int] | None:
        where = self._proxies.get(goal.scheme)
        if not where or urllib.request.proxy_bypass(goal.host):
            return None
        parts = urlsplit(where if "//" in where else f"//{where}")
        return parts.hostname or "", parts.port or 8080

    def _tunnel(self, proxy: tuple[str, int], goal: Target, clock: Deadline) -> socket.socket:
        sock = socket.create_connection(proxy, timeout=clock.wait())
        if goal.scheme == "http":
            return sock
        try:
            pinned = self._resolver.addresses(goal.host, clock.wait())[0]
            spelled = f"[{pinned}]" if pinned.version == 6 else str(pinned)
            sock.sendall(f"CONNECT {spelled}:{goal.port} HTTP/1.1\r\nHost: {spelled}:{goal.port}\r\n\r\n".encode())
            watched = _Watched(sock, clock, MAX_HEAD, buffer=1)
            answer = _FinalResponse(watched, method="CONNECT")  # type: ignore[arg-type]
            answer.begin()
            if answer.status != 200:
                raise Failure("unreachable", f"the proxy answered {answer.status}")
            return sock
        except BaseException:
            sock.close()
            raise

    # ---- question and answer ----

    def _asked(self, goal: Target, sock: socket.socket, clock: Deadline, keep: int | None) -> Answer:
        whole = goal.scheme == "http" and self._proxy(goal) is not None
        lines = (
            f"GET {f'http://{goal.authority}{goal.path}' if whole else goal.path} HTTP/1.1",
            f"Host: {goal.authority}",
            f"User-Agent: {self.agent}",
            "Accept: image/*,*/*;q=0.8",
            "Accept-Encoding: identity",
            "Connection: close",
        )
        sock.settimeout(clock.wait())
        sock.sendall("\r\n".join((*lines, "", "")).encode())
        watched = _Watched(sock, clock, MAX_HEAD)
        response = _FinalResponse(watched, method="GET")  # type: ignore[arg-type]
        with closing(response):
            response.begin()
            headers = response.headers
            if not 200 <= response.status < 300:
                return Answer(goal.url, response.status, headers)
            cap = self.limits.max_bytes if keep is None else keep
            watched.allow(2 * cap + MAX_HEAD)
            return Answer(goal.url, response.status, headers, self._body(response, cap, cut=keep is not None))

    def _body(self, response: HTTPResponse, cap: int, cut: bool) -> bytes:
        """Read a body, unpacked, of at most `cap` bytes: more is a Failure, or cut off."""
        told = response.length
        if told is not None and told > cap and not cut:
            raise Failure("too-big", f"{told} bytes, allowed are {cap}")
        unpack = _unpacker(response.headers.get("Content-Encoding", "identity"))
        pieces: list[bytes] = []
        came = made = 0
        while piece := response.read(PIECE):
            came += len(piece)
            if unpack is not None:
                piece = self._unpacked(unpack, piece, came, made, cap)
            pieces.append(piece)
            made += len(piece)
            if max(came, made) > cap:
                if cut:
                    return b"".join(pieces)[:cap]
                raise Failure("too-big", f"more than {cap} bytes")
        if told is not None and came < told:
            raise Failure("cut", f"{came} of {told} bytes came")
        if unpack is not None and not unpack.eof:
            raise Failure("cut", "the compressed body has no end")
        return b"".join(pieces)

    def _unpacked(self, unpack: Any, piece: bytes, came: int, made: int, cap: int) -> bytes:
        room = max(1, cap - made + 1)
        unpacked: bytes = unpack.decompress(piece, room)
        total = made + len(unpacked)
        if unpack.unconsumed_tail:
            raise Failure("too-big", f"{came} bytes unpack to more than {cap}")
        if total > RATIO_FROM and total > came * self.limits.max_ratio:
            raise Failure("too-big", f"{came} bytes unpack to {total}, allowed is {self.limits.max_ratio:g} times")
        return unpacked


def _unpacker(encoding: str) -> Any:
    """What undoes a content encoding; None where there is nothing to undo."""
    name = encoding.strip().lower()
    if name in ("", "identity"):
        return None
    if name in ("gzip", "x-gzip", "deflate"):
        return zlib.decompressobj(zlib.MAX_WBITS | 32)
    raise Failure("encoding", f"{name[:40]!r} was not asked for")


class _FinalResponse(HTTPResponse):
    """A response whose status is final: http.client itself passes over `100 Continue` alone."""

    def _read_status(self) -> tuple[str, int, str]:
        while True:
            version, status, reason = super()._read_status()  # type: ignore[misc]
            if not 100 <= status < 200:
                return version, status, reason
            if status == 101:
                raise Failure("bad-answer", "101: another protocol, which was not asked for")
            http.client.parse_headers(self.fp)


class _Watched(io.RawIOBase):
    """A socket as http.client wants it, whose every read asks the clock and counts its bytes."""

    def __init__(self, sock: socket.socket, clock: Deadline, budget: int, buffer: int = PIECE) -> None:
        super().__init__()
        self._sock = sock
        self._clock = clock
        self._budget = budget
        self._buffer = buffer

    def allow(self, budget: int) -> None:
        """Begin to count anew: so many bytes may come from here on."""
        self._budget = budget

    def makefile(self, mode: str) -> io.BufferedReader:
        """What HTTPResponse reads from."""
        return io.BufferedReader(self, self._buffer)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._sock.settimeout(self._clock.wait())
        count = self._sock.recv_into(buffer)
        self._budget -= count
        if self._budget < 0:
            raise Failure("bad-answer", "endless headers, or more framing than picture")
        return count
