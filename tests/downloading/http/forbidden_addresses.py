"""URLs that lead to forbidden addresses, in every spelling; run by test_client.py in a network that has loopback only.

Not called test_...: nothing here may run where there is a network.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from capfilt.downloading.failures import Failure
from capfilt.downloading.http.addresses import Resolver, parse_url
from capfilt.downloading.http.client import Deadline, Limits, SafeHttpClient
from capfilt.downloading.http.politeness import PoliteClient, Politeness


@pytest.fixture(autouse=True)
def alone() -> None:
    names = {line.split(":")[0].strip() for line in Path("/proc/net/dev").read_text().splitlines()[2:]}
    assert names == {"lo"}, "run by test_client.py only"


class NoRateLimit:
    """Lets every host be asked at once."""

    def acquire(self, name: str) -> tuple[float, float]:
        return 0.0, 0.0

    def pause(self, name: str, seconds: float) -> None:
        raise AssertionError(name)


def polite_client(client: SafeHttpClient) -> PoliteClient:
    return PoliteClient(client, NoRateLimit(), Politeness(deadline=2, timeout=2), False, frozenset(), "capfilt")


def kind_of(client: SafeHttpClient, url: str) -> str:
    with pytest.raises(Failure) as caught:
        polite_client(client).get(url)
    return caught.value.kind


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1", "2130706433", "0x7f000001", "0x7F.1", "0177.0.0.1", "017700000001", "127.1", "0", "0.0.0.0",
        "①②⑦.⓪.⓪.①", "[::1]", "[::]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[::127.0.0.1]", "[2002:7f00:1::]",
        "[64:ff9b::127.0.0.1]", "[fe80::1]", "[fe80::1%25lo]", "[fc00::1]", "[ff02::1]",
        "169.254.169.254", "2852039166", "0xA9FEA9FE", "[::ffff:169.254.169.254]", "[fd00:ec2::254]",
        "168.63.129.16", "0xa83f8110", "[::ffff:168.63.129.16]", "[64:ff9b::a83f:8110]", "100.100.100.200",
        "192.0.0.192",
        "[2a00:1450::5efe:169.254.169.254]", "[2a00:1450::200:5efe:a83f:8110]", "[64:ff9b:1::10.0.0.1]",
        "10.0.0.1", "172.16.0.1", "192.168.0.1", "100.64.0.1", "192.0.2.1", "198.18.0.1", "224.0.0.1",
        "255.255.255.255",
    ],
)  # fmt: skip
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_no_spelling_leads_inside(hostile: Any, host: str, scheme: str) -> None:
    assert kind_of(SafeHttpClient(Limits(), "t"), f"{scheme}://{host}:{hostile.port}/ok") in (
        "private-address",
        "bad-url",
    )
    assert hostile.seen == []


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        ("http://169.254.169.254/latest/meta-data/", "private-address"),
        ("//169.254.169.254/latest", "private-address"),
        ("http://2852039166/", "private-address"),
        ("http://[::ffff:a9fe:a9fe]/", "private-address"),
        ("http://inside.test/", "private-address"),
        ("http://127.0.0.2/ok", "private-address"),
        ("https://10.0.0.1/", "private-address"),
        ("file:///etc/passwd", "bad-url"),
        ("ftp://127.0.0.1/", "bad-url"),
        ("http://[::1", "bad-url"),
    ],
)
def test_no_redirect_leads_inside(hostile: Any, place: str, expected: str) -> None:
    """The server's own name is allowed by its block; where it sends one is judged anew."""
    names = {"server.test": ["127.0.0.1"], "inside.test": ["10.0.0.7"]}
    limits = Limits(allow_private=("127.0.0.1/32",))
    client = SafeHttpClient(limits, "t", Resolver(limits.address_policy(), names.__getitem__))
    assert kind_of(client, f"http://server.test:{hostile.port}/to?u={place}") == expected
    assert len(hostile.seen) == 1


def test_a_name_with_one_private_address_among_its_own_is_refused(hostile: Any) -> None:
    client = SafeHttpClient(Limits(), "t", Resolver(lookup=lambda name: ["93.184.216.34", "127.0.0.1"]))
    assert kind_of(client, f"http://mixed.test:{hostile.port}/ok") == "private-address"


def test_a_name_is_not_resolved_again_between_check_and_use(hostile: Any) -> None:
    """First public, then loopback: the connection goes to the public one, which this network does not have."""
    answers = iter([["93.184.216.34"], ["127.0.0.1"]])
    client = SafeHttpClient(Limits(), "t", Resolver(lookup=lambda name: next(answers)))
    assert kind_of(client, f"http://rebinds.test:{hostile.port}/ok") == "unreachable"
    assert hostile.seen == []


def test_a_public_address_would_be_tried(hostile: Any) -> None:
    with pytest.raises(Failure) as caught:
        SafeHttpClient(Limits(), "t").request(parse_url("http://8.8.8.8/"), Deadline(2, 2))
    assert caught.value.kind == "unreachable"
