"""Where a name leads: every address of a host, and whether it is on the public internet.

The lists are IANA's special-purpose registries (2026-10), written out because Python's `is_global` changed with its
patch releases, and 168.63.129.16, which looks public and is the host of every Azure machine. An IPv6 address that
carries an IPv4 address is judged by what it carries: mapped, 6to4, Teredo, ISATAP, and NAT64 with the well-known
prefix, with those that the user names, and with that of this network, which its name server tells (RFC 7050).
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

from capfilt.downloading.failures import Failure

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


def nat64_prefixes(blocks: Sequence[str]) -> tuple[IPv6Network, ...]:
    """Read NAT64 prefixes such as 2001:db8:64::/96; ValueError for what is none (RFC 6052 has six lengths)."""
    found = tuple(IPv6Network(block, strict=False) for block in blocks)
    if odd := next((block for block in found if block.prefixlen not in _NAT64_LENGTHS), None):
        raise ValueError(f"{odd} is no NAT64 prefix; their lengths are {', '.join(map(str, sorted(_NAT64_LENGTHS)))}")
    return found


def carried(address: Address, nat64: Sequence[IPv6Network] = ()) -> Iterator[Address]:
    """The addresses that a packet to this one may end at: itself, or those that it carries."""
    if isinstance(address, IPv4Address):
        yield address
    elif address.ipv4_mapped is not None:
        yield address.ipv4_mapped
    elif prefix := next((block for block in (_NAT64, *nat64) if address in block), None):
        yield _embedded(address, prefix.prefixlen)
    elif address.sixtofour is not None:
        yield address.sixtofour
    elif address.teredo is not None:
        yield from address.teredo
    else:
        yield address
        if address.packed[8:12] in _ISATAP:
            yield IPv4Address(address.packed[12:])


def _embedded(address: IPv6Address, length: int) -> IPv4Address:
    """The IPv4 address behind a NAT64 prefix of this length: byte 8 is left out (RFC 6052, section 2.2)."""
    data = address.packed
    return IPv4Address(data[12:] if length == 96 else (data[length // 8 : 8] + data[9:])[:4])


@dataclass(frozen=True)
class Policy:
    """Which addresses may be talked to: public ones, and what the user says otherwise."""

    allowed: tuple[Network, ...] = ()
    """Blocks that may be talked to although they are not public."""
    denied: tuple[Network, ...] = ()
    """Blocks that may not, whatever else is said of them."""
    nat64: tuple[IPv6Network, ...] = ()
    """Prefixes that lead to IPv4 addresses in this network."""

    def allows(self, address: Address) -> bool:
        """Whether this address may be talked to, and every one that it carries."""
        ends = list(carried(address, self.nat64))
        if any(end in block for end in (address, *ends) for block in self.denied):
            return False
        return all(_is_public(end) or any(end in block for block in self.allowed) for end in ends)


PUBLIC = Policy()


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

    def __init__(self, policy: Policy = PUBLIC, lookup: Lookup = system_lookup) -> None:
        self._policy = policy
        self._lookup = lookup
        self._known: dict[str, tuple[float, list[Address]]] = {}

    def addresses(self, host: str, seconds: float) -> list[Address]:
        """The addresses to connect to, at least one, found within `seconds`.

        One that is not public refuses the host, for a name that has both may answer with either next time.
        """
        own = literal(host)
        found = [own] if own is not None else self._named(host, seconds)
        policy = self._policy
        if any(isinstance(address, IPv6Address) and address.ipv4_mapped is None for address in found):
            policy = replace(policy, nat64=(*policy.nat64, *self._network_nat64(seconds)))
        for address in found:
            if not policy.allows(address):
                denied = any(address in block for block in policy.denied)
                why = "in a block that --deny names" if denied else "not on the public internet"
                raise Failure("private-address", f"{host} is {address}, which is {why}")
        return found

    def _network_nat64(self, seconds: float) -> tuple[IPv6Network, ...]:
        """The prefixes with which this network's name server makes IPv6 addresses of IPv4 ones (RFC 7050)."""
        try:
            answers = self._named(_NAT64_NAME, seconds)
        except Failure as failure:
            if failure.kind == "timeout":
                raise
            # No such name server, the usual case: it is asked again when what is known of the name is old.
            self._known[_NAT64_NAME] = (time.monotonic() + KEPT, [])
            return ()
        return tuple(
            IPv6Network((address, length), strict=False)
            for address in answers
            for length in _NAT64_LENGTHS
            if isinstance(address, IPv6Address) and _embedded(address, length) in _NAT64_ANSWERS
        )

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
