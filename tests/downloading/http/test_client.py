"""The client before a hostile server on loopback. What names forbidden addresses is in forbidden_addresses.py."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from capfilt.downloading.failures import Failure
from capfilt.downloading.http.addresses import AddressPolicy, Resolver, networks, parse_url
from capfilt.downloading.http.client import Deadline, Limits, Response, SafeHttpClient

LOOPBACK = ("127.0.0.0/8",)
MEGABYTE = 10**6


def ask(url: str, seconds: float = 60.0, truncate_at: int | None = None, **limits: Any) -> Response:
    client = SafeHttpClient(Limits(allow_private=LOOPBACK, **{"max_bytes": MEGABYTE, **limits}), "tester/1")
    return client.request(parse_url(url), Deadline(seconds, 30), truncate_at)


def kind(url: str, seconds: float = 60.0, **limits: Any) -> str:
    """The kind with which a URL ends, in its time."""
    begun = time.monotonic()
    with pytest.raises(Failure) as caught:
        ask(url, seconds, **limits)
    assert time.monotonic() - begun < seconds + 20  # a busy machine's; without a deadline, hours
    return caught.value.kind


def test_a_picture_comes_as_it_was_served(hostile: Any, hostile_kind: Any) -> None:
    answer = ask(hostile.url("/ok?seed=3"))
    assert (answer.status, answer.body) == (200, hostile_kind.jpeg(3))
    [(_, path, headers)] = hostile.seen
    assert path == "/ok?seed=3"
    assert headers["user-agent"] == "tester/1"
    assert headers["host"] == f"127.0.0.1:{hostile.port}"
    assert headers["accept-encoding"] == "identity"


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/drip", "timeout"),
        ("/drip-head", "timeout"),
        ("/hang", "timeout"),
        ("/slow?s=2", "timeout"),
        ("/continue?slowly", "timeout"),
        ("/continue", "bad-answer"),
        ("/status/101", "bad-answer"),
        ("/header", "bad-answer"),
        ("/headers", "bad-answer"),
        ("/garbage", "bad-answer"),
        ("/endless", "too-big"),
        ("/chunks", "bad-answer"),
        ("/wrong?by=50", "cut"),
        ("/bomb", "too-big"),
        ("/gzip?less=9", "cut"),
        ("/brotli", "encoding"),
    ],
)
def test_a_hostile_answer_ends_with_its_kind_and_in_time(hostile: Any, path: str, expected: str) -> None:
    assert kind(hostile.url(path), 0.5 if expected == "timeout" else 60.0) == expected


def test_an_interim_status_is_no_answer(hostile: Any, hostile_kind: Any) -> None:
    answer = ask(hostile.url("/hints"))
    assert (answer.status, answer.body) == (200, hostile_kind.jpeg(7))
    assert "Link" not in answer.headers


def test_the_deadline_is_of_the_whole_and_not_of_a_read(hostile: Any) -> None:
    """A byte every 50 ms is well within a timeout of 30 s for each."""
    assert kind(hostile.url("/drip"), 0.4) == "timeout"


def test_what_is_too_big_is_not_even_begun_where_it_says_so(hostile: Any, hostile_kind: Any) -> None:
    size = len(hostile_kind.jpeg())
    assert len(ask(hostile.url("/ok"), max_bytes=size).body) == size
    assert kind(hostile.url("/ok"), max_bytes=size - 1) == "too-big"


def test_a_little_compression_is_no_bomb(hostile: Any, hostile_kind: Any) -> None:
    assert ask(hostile.url("/gzip")).body == hostile_kind.jpeg()
    # 2 MB of nothing in 2 kB: within the bytes, beyond the ratio.
    assert kind(hostile.url("/bomb?mb=2"), max_bytes=10 * MEGABYTE) == "too-big"
    assert len(ask(hostile.url("/bomb?mb=2"), max_bytes=10 * MEGABYTE, max_ratio=2000).body) == 2 * 2**20


def test_a_body_may_be_cut_where_a_part_is_enough(hostile: Any) -> None:
    assert len(ask(hostile.url("/endless"), 5, truncate_at=1000).body) == 1000


def test_a_connection_that_is_cut_anywhere_is_a_failure(hostile: Any, hostile_kind: Any) -> None:
    whole = len(next(hostile_kind.answer(200, length=10_000))) + len(hostile_kind.jpeg(size=100))
    kinds = {at: kind(hostile.url(f"/cut/{at}")) for at in range(0, whole - 1, 1000)}
    assert len(kinds) > 5
    assert kinds.pop(0) in ("cut", "bad-answer")  # not even a status line
    assert set(kinds.values()) == {"cut"}
    assert ask(hostile.url(f"/cut/{whole}")).body == hostile_kind.jpeg(size=100)


def test_the_body_of_a_redirect_or_an_error_is_not_read(hostile: Any) -> None:
    answer = ask(hostile.url("/to?u=/ok"))
    assert (answer.status, answer.headers["Location"], answer.body) == (301, "/ok", b"")
    assert ask(hostile.url("/status/404")).status == 404


def test_nobody_listening_and_a_name_that_is_not_there() -> None:
    assert kind("http://127.0.0.1:9/") == "refused"


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd", "FILE:///etc/passwd", "ftp://127.0.0.1/x", "data:image/png;base64,AA", "gopher://x/1",
        "//127.0.0.1/x", "nonsense", "", "http://", "http:///x", "http://user:word@127.0.0.1/x", "http://a@b/",
        "http://127.0.0.1:99999/", "http://127.0.0.1:x/", "http://127.0.0.1/\r\nHost: x", "http://127.0.0.1/\x00",
        "http://[::1/", "http://a b/", "http://" + "a" * 64 + ".org/", "http://127.0.0.1/" + "x" * 20_000,
        "http://exa%6dple.org/", "http://127.0.0.1\\@example.org/",
    ],
)  # fmt: skip
def test_what_is_no_http_url_is_never_asked(url: str) -> None:
    assert kind(url) == "bad-url"


def test_urls_are_spelled_in_ascii(hostile: Any) -> None:
    ask(hostile.url("/ok/ein Bild é%20.jpg?q=ü x#part"))
    assert hostile.seen[0][1] == "/ok/ein%20Bild%20%C3%A9%20.jpg?q=%C3%BC%20x"
    assert parse_url("http://BÜCHER.example/").host == "xn--bcher-kva.example"
    assert parse_url("http://①②⑦.⓪.⓪.①/").host == "127.0.0.1"
    assert parse_url("https://[2606:4700::1111]:444/x").authority == "[2606:4700::1111]:444"


def test_the_connection_goes_to_the_address_that_was_checked(hostile: Any) -> None:
    """A name whose answer changes: what was checked is what is connected to, and the second answer never is."""
    answers = iter([["127.0.0.1"], ["127.0.0.2"]])
    asked: list[str] = []

    def lookup(name: str) -> list[str]:
        asked.append(name)
        return next(answers)

    resolver = Resolver(AddressPolicy(networks(["127.0.0.1/32"])), lookup)
    client = SafeHttpClient(Limits(), "tester/1", resolver)
    target = parse_url(f"http://changes.test:{hostile.port}/ok")
    assert client.request(target, Deadline(1, 1)).status == 200
    assert client.request(target, Deadline(1, 1)).status == 200
    assert asked == ["changes.test"]
    assert hostile.seen[0][2]["host"] == f"changes.test:{hostile.port}"
    # Asked again, as after a minute, it would lead elsewhere, and is refused.
    resolver._known.clear()
    with pytest.raises(Failure, match=r"^private-address: changes\.test is 127\.0\.0\.2"):
        client.request(target, Deadline(1, 1))


def test_proxies_of_the_environment_are_not_used_unless_asked_for(
    hostile: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{hostile.port}")
    monkeypatch.delenv("no_proxy", raising=False)
    assert kind("http://127.0.0.2:9/ok") == "refused"
    assert hostile.seen == []
    assert ask("http://127.0.0.2:9/ok?seed=1", use_proxies=True).status == 200
    assert hostile.seen[0][1] == "http://127.0.0.2:9/ok?seed=1"


def test_a_block_that_is_none_is_refused() -> None:
    with pytest.raises(ValidationError, match="allow_private"):
        Limits(allow_private=("loopback",))


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    if shutil.which("openssl") is None:
        pytest.skip("no openssl to make a certificate with")
    folder = tmp_path_factory.mktemp("tls")
    files = folder / "certificate.pem", folder / "key.pem"
    words = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 1 -subj /CN=localhost"
    subprocess.run(
        ["openssl", *words.split(), "-addext", "subjectAltName=IP:127.0.0.1", "-out", files[0], "-keyout", files[1]],
        check=True,
        capture_output=True,
    )
    return files


def test_a_certificate_that_nobody_vouches_for_is_refused(
    certificate: tuple[Path, Path], hostile_kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = hostile_kind.Hostile(certificate)
    try:
        assert kind(server.url("/ok")) == "tls"
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
        assert ask(server.url("/ok")).status == 200
        assert kind(server.url("/drip"), 0.4) == "timeout"
        # Vouched for, but for another host.
        client = SafeHttpClient(
            Limits(), "tester/1", Resolver(AddressPolicy(networks(LOOPBACK)), lambda _: ["127.0.0.1"])
        )
        with pytest.raises(Failure, match=r"^tls: "):
            client.request(parse_url(f"https://other.test:{server.port}/ok"), Deadline(1, 1))
    finally:
        server.close()


def test_a_proxy_is_given_the_address_that_was_checked(
    certificate: tuple[Path, Path], hostile: Any, hostile_kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = hostile_kind.Hostile(certificate)
    monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{hostile.port}")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
    try:
        assert ask(server.url("/ok?seed=4"), 3, use_proxies=True).body == hostile_kind.jpeg(4)
        assert hostile.paths() == [f"127.0.0.1:{server.port}"]
        limits = Limits(allow_private=LOOPBACK, use_proxies=True)
        client = SafeHttpClient(
            limits, "tester/1", Resolver(AddressPolicy(networks(LOOPBACK)), lambda _: ["127.0.0.1"])
        )
        with pytest.raises(Failure, match=r"^tls: "):  # the certificate is another host's; the address was ours
            client.request(parse_url(f"https://other.test:{server.port}/ok"), Deadline(3, 3))
        assert hostile.paths()[1:] == [f"127.0.0.1:{server.port}"]
        client = SafeHttpClient(limits, "tester/1", Resolver(AddressPolicy(networks(LOOPBACK)), lambda _: ["10.0.0.1"]))
        with pytest.raises(Failure, match=r"^private-address: "):
            client.request(parse_url(f"https://inside.test:{server.port}/ok"), Deadline(3, 3))
        assert len(hostile.paths()) == 2
    finally:
        server.close()


def test_forbidden_addresses_in_a_network_of_their_own(pytestconfig: pytest.Config) -> None:
    """Runs forbidden_addresses.py where there is nothing but loopback, so that a hole in the client reaches nothing."""
    alone = ["unshare", "-rn", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
    try:
        able = subprocess.run([*alone, "true"], capture_output=True, timeout=100).returncode == 0
    except FileNotFoundError:
        able = False
    if not able:
        pytest.skip("no network namespaces here (unshare -rn)")
    tests = str(Path(__file__).with_name("forbidden_addresses.py"))
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", tests]
    done = subprocess.run([*alone, *words], capture_output=True, text=True, timeout=100, cwd=pytestconfig.rootpath)
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout
