"""Where a name leads: every address of a host, and whether it is on the public internet.

The lists are IANA's special-purpose registries (2026-10), written out because Python's `is_global` changed with its
patch releases. An IPv6 address that carries an IPv4 address is judged by what it carries.
"""

from __future__ import annotations

import ipaddress
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

from capfilt.data.failures import Failure

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network
Lookup = Callable[[str], Sequence[str]]
"""A name to its addresses as text; raises OSError where there are none."""

KEPT = 60.0
"""Seconds for which the addresses of a name are remembered."""
MAX_NAMES = 50_000

_PRIVATE_4 = tuple(
    IPv4Network(block)
    for block in (
        "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12",
        "192.0.0.0/24", "192.0.2.0/24", "192.31.196.0/24", "192.52.193.0/24", "192.88.99.0/24",
        "192.168.0.0/16", "192.175.48.0/24", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24",
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
_NUMBERS = re.compile(r"(0[xX][0-9a-fA-F]*|\d+)(\.(0[xX][0-9a-fA-F]*|\d+)){0,3}\.?")


def networks(blocks: Sequence[str]) -> tuple[Network, ...]:
    """Read CIDR blocks such as 10.0.0.0/8 or ::1; ValueError for what is none."""
    return tuple(ipaddress.ip_network(block, strict=False) for block in blocks)


def literal(host: str) -> Address | None:
    """The address that a host spells itself: dotted, decimal, octal, hexadecimal, IPv6; None for a name."""
    with suppress(ValueError):
        return ipaddress.ip_address(host)
    if not _NUMBERS.fullmatch(host):
        return None
    try:
        return IPv4Address(socket.inet_aton(host.rstrip(".")))
    except OSError:
        raise Failure("bad-url", f"{host} is no address") from None


def carried(address: Address) -> Iterator[Address]:
    """The addresses that a packet to this one may end at: itself, or those that it carries."""
    if isinstance(address, IPv4Address):
        yield address
    elif address.ipv4_mapped is not None:
        yield address.ipv4_mapped
    elif address in _NAT64:
        yield IPv4Address(int(address) & 0xFFFFFFFF)
    elif address.sixtofour is not None:
        yield address.sixtofour
    elif address.teredo is not None:
        yield from address.teredo
    else:
        yield address


def is_allowed(address: Address, allowed: Sequence[Network] = ()) -> bool:
    """Whether this address may be talked to: public, or in a block that the user allows."""
    return all(_is_public(end) or any(end in block for block in allowed) for end in carried(address))


def _is_public(address: Address) -> bool:
    if isinstance(address, IPv4Address):
        return not any(address in block for block in _PRIVATE_4)
    return address in _PUBLIC_6 and not any(address in block for block in _PRIVATE_6)


def system_lookup(name: str) -> list[str]:
    """Ask the machine's resolver."""
    found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


class Resolver:
    """Addresses of hosts, all of them checked; safe to call from many threads."""

    def __init__(self, allowed: Sequence[Network] = (), lookup: Lookup = system_lookup) -> None:
        self._allowed = tuple(allowed)
        self._lookup = lookup
        self._known: dict[str, tuple[float, list[Address]]] = {}

    def addresses(self, host: str, seconds: float) -> list[Address]:
        """The addresses to connect to, at least one, found within `seconds`.

        One that is not public refuses the host, for a name that has both may answer with either next time.
        """
        own = literal(host)
        found = [own] if own is not None else self._named(host, seconds)
        for address in found:
            if not is_allowed(address, self._allowed):
                raise Failure("private-address", f"{host} is {address}, which is not on the public internet")
        return found

    def _named(self, name: str, seconds: float) -> list[Address]:
        until, found = self._known.get(name, (0.0, []))
        if time.monotonic() < until:
            return found
        answer = self._asked(name, seconds)
        try:
            found = [ipaddress.ip_address(text) for text in answer]
        except ValueError as error:
            raise Failure("dns", f"{name}: {error}") from error
        if not found:
            raise Failure("dns", f"{name} has no address")
        if len(self._known) >= MAX_NAMES:
            self._known = {}
        self._known[name] = (time.monotonic() + KEPT, found)
        return found

    def _asked(self, name: str, seconds: float) -> Sequence[str]:
        """Ask in a thread of its own, since the system's resolver knows no deadline."""
        answers: list[Sequence[str]] = []
        errors: list[OSError] = []

        def ask() -> None:
            try:
                answers.append(self._lookup(name))
            except (OSError, UnicodeError) as error:
                errors.append(error if isinstance(error, OSError) else OSError(str(error)))

        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        thread.join(seconds)
        if errors:
            raise Failure("dns", f"{name}: {errors[0].strerror or errors[0]}")
        if not answers:
            raise Failure("timeout", f"{name}: its name server did not answer in {seconds:.1f} s")
        return answers[0]
