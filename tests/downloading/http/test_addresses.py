"""No socket is opened here: addresses are checked, and names looked up in a table."""

from __future__ import annotations

import ipaddress
import threading
import time

import pytest

from capfilt.downloading.failures import Failure
from capfilt.downloading.http.addresses import (
    PUBLIC_ONLY,
    AddressPolicy,
    Resolver,
    literal_address,
    nat64_prefixes,
    networks,
)

PRIVATE = [
    "0.0.0.0", "10.1.2.3", "100.64.0.1", "127.0.0.1", "127.255.255.254", "169.254.169.254", "172.16.0.1", "172.31.9.9",
    "192.0.0.8", "192.0.2.1", "192.168.1.1", "198.18.0.1", "198.51.100.1", "203.0.113.1", "224.0.0.1", "240.0.0.1",
    "255.255.255.255",
    "::", "::1", "fe80::1", "fe80::1%lo", "fc00::1", "fd12:3456::1", "ff02::1", "fec0::1", "100::1", "2001:db8::1",
    "3fff::1", "5f00::1", "64:ff9b:1::1", "::7f00:1", "::ffff:0:7f00:1",
    "::ffff:127.0.0.1", "::ffff:169.254.169.254", "2002:7f00:1::", "2002:a9fe:a9fe::1", "64:ff9b::10.0.0.1",
    "2001:0:0808:0808::f5ff:fffe",  # Teredo: client 10.0.0.1, in ones' complement
    "2001:0:0a00:0001::f7f7:f7f7",  # Teredo: server 10.0.0.1
    "168.63.129.16", "::ffff:168.63.129.16", "64:ff9b::168.63.129.16", "2002:a83f:8110::",  # Azure's WireServer
    "100.100.100.200", "192.0.0.192", "169.254.170.2", "fd00:ec2::254", "fd20:ce::254",  # other clouds' metadata
    "64:ff9b:1::10.0.0.1", "64:ff9b:1:2::8.8.8.8",
    "2a00:1450::5efe:10.0.0.1", "2a00:1450::200:5efe:7f00:1", "2a00:1450:1:2:0:5efe:a9fe:a9fe", "fe80::5efe:8.8.8.8",
]  # fmt: skip
PUBLIC = [
    "1.1.1.1", "8.8.8.8", "100.63.255.255", "100.128.0.0", "172.15.0.1", "172.32.0.1", "192.0.1.1", "198.17.255.255",
    "223.255.255.255", "2606:4700::1111", "2a00:1450:4001::200e", "::ffff:8.8.8.8", "2002:808:808::1",
    "64:ff9b::8.8.8.8", "2001:0:0808:0808::f7f7:f7f7", "168.63.129.15", "168.63.129.17", "2a00:1450::5efe:8.8.8.8",
]  # fmt: skip


@pytest.mark.parametrize("text", PRIVATE)
def test_what_is_not_public_is_refused(text: str) -> None:
    assert not PUBLIC_ONLY.allows(ipaddress.ip_address(text))


@pytest.mark.parametrize("text", PUBLIC)
def test_what_is_public_is_allowed(text: str) -> None:
    assert PUBLIC_ONLY.allows(ipaddress.ip_address(text))


def test_a_block_that_is_allowed_holds_for_what_an_address_carries_too() -> None:
    policy = AddressPolicy(networks(["10.0.0.0/8", "fd00::/8"]))
    for text in ("10.9.9.9", "::ffff:10.9.9.9", "fd00::1", "64:ff9b::10.0.0.1", "8.8.8.8"):
        assert policy.allows(ipaddress.ip_address(text))
    for text in ("127.0.0.1", "fe80::1", "172.16.0.1"):
        assert not policy.allows(ipaddress.ip_address(text))


def test_a_block_that_is_denied_is_refused_whatever_else_holds() -> None:
    policy = AddressPolicy(networks(["10.0.0.0/8"]), networks(["8.8.8.0/24", "2606:4700::/32", "10.1.0.0/16"]))
    for text in (
        "8.8.8.8",
        "::ffff:8.8.8.8",
        "64:ff9b::8.8.8.8",
        "2606:4700::1111",
        "10.1.2.3",
        "2a00:1450::5efe:8.8.8.8",
    ):
        assert not policy.allows(ipaddress.ip_address(text)), text
    for text in ("8.8.4.4", "10.2.0.1", "2a00:1450:4001::200e"):
        assert policy.allows(ipaddress.ip_address(text)), text


NAT64 = [  # RFC 6052, section 2.4: 192.0.2.33 behind each length of prefix, here 10.0.2.33 and 8.8.2.33
    ("2a00:db8::/32", "2a00:db8:a00:221::", "2a00:db8:808:221::"),
    ("2a00:db8:100::/40", "2a00:db8:10a:2:21::", "2a00:db8:108:802:21::"),
    ("2a00:db8:122::/48", "2a00:db8:122:a00:2:2100::", "2a00:db8:122:808:2:2100::"),
    ("2a00:db8:122:300::/56", "2a00:db8:122:30a:0:221::", "2a00:db8:122:308:8:221::"),
    ("2a00:db8:122:344::/64", "2a00:db8:122:344:a:2:2100::", "2a00:db8:122:344:8:802:2100::"),
    ("2a00:db8:122:344::/96", "2a00:db8:122:344::a00:221", "2a00:db8:122:344::808:221"),
]


@pytest.mark.parametrize(("prefix", "inside", "outside"), NAT64)
def test_an_address_behind_nat64_is_what_it_carries(prefix: str, inside: str, outside: str) -> None:
    policy = AddressPolicy(nat64=nat64_prefixes([prefix]))
    assert PUBLIC_ONLY.allows(ipaddress.ip_address(inside)), "looks public to who does not know the prefix"
    assert not policy.allows(ipaddress.ip_address(inside))
    assert policy.allows(ipaddress.ip_address(outside))


def test_only_six_lengths_are_nat64_s() -> None:
    with pytest.raises(ValueError, match="2001:db8::/80 is no NAT64 prefix; their lengths are 32, 40, 48, 56, 64, 96"):
        nat64_prefixes(["2001:db8::/80"])


@pytest.mark.parametrize(
    ("answer", "inside", "outside"),
    [
        ("2a00:db8:122:344::c000:aa", "2a00:db8:122:344::a00:1", "2a00:db8:122:344::808:808"),
        ("fd00:64::c000:ab", "fd00:64::a00:1", "fd00:64::808:808"),
        ("2a00:db8:c000:aa::", "2a00:db8:a9fe:a9fe::", "2a00:db8:808:808::"),
    ],
)
def test_the_network_gives_its_prefix(answer: str, inside: str, outside: str) -> None:
    """RFC 7050: what a name server with DNS64 makes of the name that has IPv4 addresses only."""
    asked: list[str] = []

    def lookup(name: str) -> list[str]:
        asked.append(name)
        return {"ipv4only.arpa": ["192.0.0.170", answer], "in.test": [inside], "out.test": [outside]}[name]

    resolver = Resolver(lookup=lookup)
    assert [str(address) for address in resolver.addresses("out.test", 1)] == [str(ipaddress.ip_address(outside))]
    for host in ("in.test", inside):
        with pytest.raises(Failure, match=r"^private-address"):
            resolver.addresses(host, 1)
    assert asked.count("ipv4only.arpa") == 1


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "2130706433", "0x7f000001", "0x7f.1", "0177.0.0.1", "017700000001", "127.1", "127.0.1", "127.0.0.1."],
)
def test_every_spelling_of_loopback_is_one_address(host: str) -> None:
    assert literal_address(host) == ipaddress.ip_address("127.0.0.1")


@pytest.mark.parametrize("host", ["example.org", "127.0.0.1.example.org", "a1", "1.2.3.4.5", ""])
def test_a_name_is_no_address(host: str) -> None:
    assert literal_address(host) is None


def test_numbers_that_are_no_address_are_not_looked_up() -> None:
    with pytest.raises(Failure, match=r"^bad-url: 999\.1\.1\.1 is no address"):
        literal_address("999.1.1.1")


class TestResolver:
    def test_all_addresses_of_a_name_are_checked(self) -> None:
        names = {"good": ["8.8.8.8", "2606:4700::1111"], "mixed": ["8.8.8.8", "10.0.0.1"], "none": []}
        names["ipv4only.arpa"] = ["192.0.0.170", "192.0.0.171"]
        resolver = Resolver(lookup=lambda name: names[name])
        assert [str(address) for address in resolver.addresses("good", 1)] == names["good"]
        with pytest.raises(Failure, match=r"^private-address: mixed is 10\.0\.0\.1"):
            resolver.addresses("mixed", 1)
        with pytest.raises(Failure, match=r"^dns: none has no address"):
            resolver.addresses("none", 1)

    def test_a_name_is_resolved_once_and_its_address_checked_each_time(self) -> None:
        asked: list[str] = []

        def lookup(name: str) -> list[str]:
            asked.append(name)
            return ["8.8.8.8"] if len(asked) == 1 else ["127.0.0.1"]

        resolver = Resolver(lookup=lookup)
        assert resolver.addresses("changes.test", 1) == resolver.addresses("changes.test", 1)
        assert asked == ["changes.test"]

    def test_a_name_that_turns_to_a_private_address_is_refused_whatever_was_allowed_before(self) -> None:
        """What is remembered is of an address, never of the name that had it (DNS rebinding)."""
        answers = [["93.184.216.34"], ["10.0.0.1"], ["93.184.216.34", "10.0.0.1"]]
        resolver = Resolver(lookup=lambda name: answers.pop(0))
        assert [str(one) for one in resolver.addresses("a.example", 1)] == ["93.184.216.34"]
        for _ in range(2):
            resolver._known.clear()
            with pytest.raises(Failure, match=r"10\.0\.0\.1, which is not on the public internet"):
                resolver.addresses("a.example", 1)

    def test_what_is_remembered_may_be_forgotten_by_another_thread_at_any_moment(self) -> None:
        resolver, address = Resolver(), ipaddress.ip_address("93.184.216.34")

        class Forgotten(dict[ipaddress.IPv4Address | ipaddress.IPv6Address, bool]):
            def __contains__(self, key: object) -> bool:
                resolver._allowed = {}  # by the thread that meets one address too many
                return super().__contains__(key)

        resolver._allowed = Forgotten({address: True})
        assert resolver.addresses(str(address), 1) == [address]

    def test_literals_are_never_looked_up(self) -> None:
        def lookup(name: str) -> list[str]:
            raise AssertionError(name)

        resolver = Resolver(lookup=lookup)
        assert str(resolver.addresses("0x08080808", 1)[0]) == "8.8.8.8"
        with pytest.raises(Failure, match=r"^private-address"):
            resolver.addresses("2130706433", 1)

    def test_a_name_server_s_silence_ends_in_time(self) -> None:
        silence = threading.Event()

        def lookup(name: str) -> list[str]:
            silence.wait(60)
            return []

        begun = time.monotonic()
        with pytest.raises(Failure, match=r"^timeout: slow\.test: its name server did not answer"):
            Resolver(lookup=lookup).addresses("slow.test", 0.05)
        assert time.monotonic() - begun < 20
        silence.set()

    def test_a_name_that_is_not_there_says_so(self) -> None:
        def lookup(name: str) -> list[str]:
            raise OSError(-2, "Name or service not known")

        with pytest.raises(Failure, match=r"^dns: gone\.test: Name or service not known"):
            Resolver(lookup=lookup).addresses("gone.test", 1)
