"""Where a URL leads: its parts, every address of its host, and whether these are on the public internet.

The lists are IANA's special-purpose registries (2026-10), written out because Python's `is_global` changed with its
patch releases, and 168.63.129.16, which looks public and is the host of every Azure machine. An IPv6 address that
embeds an IPv4 address is checked by the latter: mapped, 6to4, Teredo, ISATAP, and NAT64 with the well-known prefix,
with those that the user names, and with that of this network, which its name server gives (RFC 7050).
"""

from __future__ import annotations

import ipaddress
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from urllib.parse import quote, urlsplit

from capfilt.downloading.failures import Failure

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network
Lookup = Callable[[str], Sequence[str]]
"""From a name to its addresses as text; raises OSError where there are none."""

MAX_URL = 16_384
"""Characters of a URL."""
KEPT = 60.0
"""Seconds for which the addresses of a name are remembered."""
MAX_NAMES = 50_000

_PORTS = {"http": 80, "https": 443}
_PRIVATE_4 = tuple(
    IPv4Network(block)
    for block in (
        "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12",
        "192.0.0.0/24", "192.0.2.0/24", "192.31.196.0/24", "192.52.193.0/24", "192.88.99.0/24",
        "168.63.129.16/32", "192.168.0.0/16", "192.175.48.0/24", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24",
        "224.0.0.0/4", "240.0.0.0/4",
    )
)  # fmt: skip
_PUBLIC_6 = IPv6Network("2000::/3")
"""All that is handed out; what lies outside is loopback, link-local, unique-local, multicast or nothing."""
_PRIVATE_6 = tuple(
    IPv6Network(block)
    for block in ("2001::/23", "2001:db8::/32", "2620:4f:8000::/48", "3fff::/20")  # documentation, protocols, AS112
)
_NAT64 = IPv6Network("64:ff9b::/96")
_NAT64_LENGTHS = (96, 64, 56, 48, 40, 32)
_NAT64_NAME = "ipv4only.arpa"
_NAT64_ANSWERS = (IPv4Address("192.0.0.170"), IPv4Address("192.0.0.171"))
_ISATAP = (b"\x00\x00\x5e\xfe", b"\x02\x00\x5e\xfe", b"\x01\x00\x5e\xfe", b"\x03\x00\x5e\xfe")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_NUMBERS = re.compile(r"(0[xX][0-9a-fA-F]*|\d+)(\.(0[xX][0-9a-fA-F]*|\d+)){0,3}\.?")


# ---- URLs ----


@dataclass(frozen=True)
class Target:
    """The parts of an http(s) URL, in ASCII."""

    url: str
    scheme: str
    host: str
    port: int
    path: str
    """With the query."""

    @property
    def origin(self) -> str:
        """Scheme, host and port: what a robots.txt holds for."""
        return f"{self.scheme}://{self._bracketed_host}:{self.port}"

    @property
    def authority(self) -> str:
        host = self._bracketed_host
        return host if self.port == _PORTS[self.scheme] else f"{host}:{self.port}"

    @property
    def _bracketed_host(self) -> str:
        return f"[{self.host}]" if ":" in self.host else self.host


def parse_url(url: str) -> Target:
    """Parse a URL; Failure("bad-url") for one that is not http(s) or cannot be sent."""
    if len(url) > MAX_URL:
        raise Failure("bad-url", f"{len(url)} characters")
    if _CONTROL.search(url):
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
    return Target(url, parts.scheme, host, port or _PORTS[parts.scheme], f"{path}?{query}" if query else path)


# ---- addresses ----


def networks(blocks: Sequence[str]) -> tuple[Network, ...]:
    """Read CIDR blocks such as 10.0.0.0/8 or ::1; ValueError for a text that is none."""
    return tuple(ipaddress.ip_network(block, strict=False) for block in blocks)


def nat64_prefixes(blocks: Sequence[str]) -> tuple[IPv6Network, ...]:
    """Read NAT64 prefixes such as 2001:db8:64::/96; ValueError for a text that is none (RFC 6052 has six lengths)."""
    prefixes = tuple(IPv6Network(block, strict=False) for block in blocks)
    if wrong := next((block for block in prefixes if block.prefixlen not in _NAT64_LENGTHS), None):
        raise ValueError(f"{wrong} is no NAT64 prefix; their lengths are {', '.join(map(str, sorted(_NAT64_LENGTHS)))}")
    return prefixes


def literal_address(host: str) -> Address | None:
    """The address that a host is spelled as: dotted, decimal, octal, hexadecimal, IPv6; None for a name."""
    with suppress(ValueError):
        return ipaddress.ip_address(host)
    if not _NUMBERS.fullmatch(host):
        return None
    try:
        return IPv4Address(socket.inet_aton(host.rstrip(".")))
    except OSError:
        raise Failure("bad-url", f"{host} is no address") from None


def destinations(address: Address, nat64: Sequence[IPv6Network] = ()) -> Iterator[Address]:
    """The addresses that a packet to `address` may end at: itself, or the IPv4 addresses that it embeds."""
    if isinstance(address, IPv4Address):
        yield address
    elif address.ipv4_mapped is not None:
        yield address.ipv4_mapped
    elif prefix := next((block for block in (_NAT64, *nat64) if address in block), None):
        yield _behind_nat64(address, prefix.prefixlen)
    elif address.sixtofour is not None:
        yield address.sixtofour
    elif address.teredo is not None:
        yield from address.teredo
    else:
        yield address
        if address.packed[8:12] in _ISATAP:
            yield IPv4Address(address.packed[12:])


def _behind_nat64(address: IPv6Address, length: int) -> IPv4Address:
    """The IPv4 address behind a NAT64 prefix of this length: byte 8 is left out (RFC 6052, section 2.2)."""
    data = address.packed
    return IPv4Address(data[12:] if length == 96 else (data[length // 8 : 8] + data[9:])[:4])


@dataclass(frozen=True)
class AddressPolicy:
    """Which addresses may be connected to: public ones, but for what the user says."""

    allowed: tuple[Network, ...] = ()
    """Blocks that may be connected to although they are not public."""
    denied: tuple[Network, ...] = ()
    """Blocks that may not, whatever else holds."""
    nat64: tuple[IPv6Network, ...] = ()
    """Prefixes that lead to IPv4 addresses in this network."""

    def allows(self, address: Address) -> bool:
        """Whether this address may be connected to, and every one that it embeds."""
        ends = list(destinations(address, self.nat64))
        if any(end in block for end in (address, *ends) for block in self.denied):
            return False
        return all(_is_public(end) or any(end in block for block in self.allowed) for end in ends)


PUBLIC_ONLY = AddressPolicy()


def _is_public(address: Address) -> bool:
    if isinstance(address, IPv4Address):
        return not any(address in block for block in _PRIVATE_4)
    return address in _PUBLIC_6 and not any(address in block for block in _PRIVATE_6)


# ---- names ----


def system_lookup(name: str) -> list[str]:
    """Look a name up by the machine's resolver."""
    entries = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in entries))


class Resolver:
    """Finds and checks the addresses of hosts; safe to call from many threads."""

    def __init__(self, policy: AddressPolicy = PUBLIC_ONLY, lookup: Lookup = system_lookup) -> None:
        self._policy = policy
        self._lookup = lookup
        self._known: dict[str, tuple[float, list[Address]]] = {}
        """Of a name: until when its addresses are good, by time.monotonic, and these."""
        self._allowed: dict[Address, bool] = {}
        """What the policy says of IPv4 addresses, which depends on nothing that changes. Every connection asks."""

    def addresses(self, host: str, seconds: float) -> list[Address]:
        """The addresses of a host to connect to, at least one, looked up within `seconds`.

        Raises:
            Failure: one of them is not allowed ("private-address"): a name that has both kinds may answer with either
                next time. No address ("dns"), or no answer in time ("timeout").
        """
        literal = literal_address(host)
        addresses = [literal] if literal is not None else self._resolve(host, seconds)
        policy = self._policy
        if any(isinstance(address, IPv6Address) and address.ipv4_mapped is None for address in addresses):
            policy = replace(policy, nat64=(*policy.nat64, *self._network_nat64(seconds)))
        for address in addresses:
            if not self._allows(policy, address):
                denied = any(address in block for block in policy.denied)
                why = "in a block that --deny names" if denied else "not on the public internet"
                raise Failure("private-address", f"{host} is {address}, which is {why}")
        return addresses

    def _allows(self, policy: AddressPolicy, address: Address) -> bool:
        if isinstance(address, IPv6Address):  # what it embeds depends on the network
            return policy.allows(address)
        allowed = self._allowed.get(address)
        if allowed is None:
            allowed = policy.allows(address)
            if len(self._allowed) >= MAX_NAMES:
                self._allowed = {}  # another thread may do so at any moment
            self._allowed[address] = allowed
        return allowed

    def _network_nat64(self, seconds: float) -> tuple[IPv6Network, ...]:
        """The prefixes with which this network's name server makes IPv6 addresses of IPv4 ones (RFC 7050)."""
        try:
            answers = self._resolve(_NAT64_NAME, seconds)
        except Failure as failure:
            if failure.kind == "timeout":
                raise
            # The usual case, no such name server: asked again after KEPT, as of any name.
            self._known[_NAT64_NAME] = (time.monotonic() + KEPT, [])
            return ()
        return tuple(
            IPv6Network((address, length), strict=False)
            for address in answers
            for length in _NAT64_LENGTHS
            if isinstance(address, IPv6Address) and _behind_nat64(address, length) in _NAT64_ANSWERS
        )

    def _resolve(self, name: str, seconds: float) -> list[Address]:
        """The addresses of a name, remembered for KEPT seconds."""
        until, addresses = self._known.get(name, (0.0, []))
        if time.monotonic() < until:
            return addresses
        answer = self._lookup_within(name, seconds)
        try:
            addresses = [ipaddress.ip_address(text) for text in answer]
        except ValueError as error:
            raise Failure("dns", f"{name}: {error}") from error
        if not addresses:
            raise Failure("dns", f"{name} has no address")
        if len(self._known) >= MAX_NAMES:
            self._known = {}
        self._known[name] = (time.monotonic() + KEPT, addresses)
        return addresses

    def _lookup_within(self, name: str, seconds: float) -> Sequence[str]:
        """Look a name up in a thread of its own, since the system's resolver knows no deadline."""
        answers: list[Sequence[str]] = []
        errors: list[OSError] = []

        def work() -> None:
            try:
                answers.append(self._lookup(name))
            except (OSError, UnicodeError) as error:
                errors.append(error if isinstance(error, OSError) else OSError(str(error)))

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        thread.join(seconds)
        if errors:
            raise Failure("dns", f"{name}: {errors[0].strerror or errors[0]}")
        if not answers:
            raise Failure("timeout", f"{name}: its name server did not answer in {seconds:.1f} s")
        return answers[0]
