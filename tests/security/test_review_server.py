"""Everybody on the machine can reach the port of a review: what they can take from it and make it say."""

from __future__ import annotations

import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from capfilt.data import labels
from capfilt.reporting import review
from capfilt.reporting.collect import Report
from capfilt.reporting.page_data import COLUMNS, AnnotatedRound, PageData

Ask = Callable[..., bytes]


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[review.ReviewServer]:
    """A review of one text, in a hurry; an exception in a connection fails the test."""
    monkeypatch.setattr(review, "MAX_CONNECTIONS", 8)
    monkeypatch.setattr(review, "REQUEST_SECONDS", 1.0)
    monkeypatch.setattr(review, "ANSWER_SECONDS", 1.0)
    texts = {name: [0] for name in COLUMNS} | {"text": ["a dog"], "itm": [0.5], "itc": [None], "label": [-1]}
    annotated = AnnotatedRound(0, "itm", 0.5, "capfilt select", "out", {"web": 1}, {}, {}, {}, texts)
    data = PageData("run", "annotate", annotated_rounds=[annotated], images=[("k", None)])
    made = review.ReviewServer(review.ReviewSession(tmp_path, Report(data, [[("a" * 32, "web", "a dog")]])), 0)
    errors: list[Any] = []

    def handle_error(*_: object) -> None:
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):  # clients that went away
            errors.append(sys.exception())

    monkeypatch.setattr(made, "handle_error", handle_error)
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    with made:
        yield made
        made.shutdown()
    thread.join()
    assert errors == []


@pytest.fixture
def ask(server: review.ReviewServer) -> Ask:
    """What the server answers to bytes, until it closes the connection or the request is answered."""

    def send(head: str, body: bytes = b"", token: str | None = None) -> bytes:
        head = head.replace("TOKEN", token or server.token).replace("HOST", f"127.0.0.1:{server.server_port}")
        with connect(server) as connection:
            connection.sendall(head.encode("latin-1") + b"\r\n\r\n" + body)
            return received(connection)

    return send


def connect(server: review.ReviewServer) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.server_port), timeout=60)


def received(connection: socket.socket) -> bytes:
    """What came until the end, or until nothing more comes to a whole answer."""
    result = b""
    try:
        while b"\r\n\r\n" not in result and (piece := connection.recv(65536)):
            result += piece
    except ConnectionResetError:  # it was closed while we were sending
        pass
    return result


def status(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


POST = "POST /labels?token=TOKEN HTTP/1.1\r\nHost: HOST\r\nOrigin: http://HOST\r\nContent-Type: application/json"
GET = "GET /?token=TOKEN HTTP/1.1\r\nHost: HOST"
CLICK = b'{"look": 0, "row": 0, "verdict": "right", "at_random": true}'


def test_a_click_is_answered(ask: Ask, tmp_path: Path) -> None:
    assert status(ask(f"{POST}\r\nContent-Length: {len(CLICK)}", CLICK)) == 200
    assert len(labels.read(tmp_path)) == 1


# ---- floods ----


def own_threads() -> int:
    return sum("process_request_thread" in thread.name for thread in threading.enumerate())


def test_dripping_connections_end_and_have_few_threads(server: review.ReviewServer, ask: Ask) -> None:
    open_ones = [connect(server) for _ in range(100)]
    most, end = 0, time.monotonic() + 60
    while time.monotonic() < end and (most == 0 or own_threads()):
        for connection in open_ones:  # each drips, so that no single read takes long
            try:
                connection.send(b"G")
            except OSError:
                continue
        most = max(most, own_threads())
        time.sleep(0.05)
    assert 0 < most <= 8
    assert own_threads() == 0, "a request has one deadline, however it drips"
    for connection in open_ones:
        connection.close()
    assert status(ask(GET)) == 200


def test_one_connection_too_many_is_refused_with_a_reason(server: review.ReviewServer) -> None:
    waiting = [connect(server) for _ in range(8)]
    while own_threads() < 8:
        time.sleep(0.01)
    with connect(server) as ninth:
        assert status(received(ninth)) == 503
    for connection in waiting:
        connection.close()


def test_a_body_that_drips_is_not_waited_for(server: review.ReviewServer, tmp_path: Path) -> None:
    head = POST.replace("TOKEN", server.token).replace("HOST", f"127.0.0.1:{server.server_port}")
    with connect(server) as connection:
        connection.sendall(f"{head}\r\nContent-Length: {len(CLICK)}\r\n\r\n".encode())
        begun, closed = time.monotonic(), False
        for byte in CLICK * 100:
            try:
                connection.send(bytes([byte]))
            except OSError:
                closed = True
                break
            time.sleep(0.1)
        assert closed
        assert time.monotonic() - begun < 60
    assert not (tmp_path / labels.FILE).exists()


def test_an_answer_that_nobody_reads_is_given_up(server: review.ReviewServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.session, "page", lambda: b"x" * 50_000_000)
    with connect(server) as connection:
        connection.sendall(
            GET.replace("TOKEN", server.token).replace("HOST", f"127.0.0.1:{server.server_port}").encode()
        )
        connection.sendall(b"\r\n\r\n")
        end = time.monotonic() + 60
        while own_threads() and time.monotonic() < end:
            time.sleep(0.05)
        assert own_threads() == 0


@pytest.mark.parametrize(
    "head",
    [
        "GET /" + "x" * 100_000 + " HTTP/1.1",
        f"{GET}\r\nX: {'x' * 40_000}",
        GET + "".join(f"\r\nX{n}: {'x' * 600}" for n in range(90)),
        f"{GET}\r\n" + "\r\n".join(["X: y"] * 200),
        "x" * 200_000,
    ],
)
def test_a_large_head_is_refused(ask: Ask, head: str) -> None:
    answer = ask(head)
    assert not answer or status(answer) in (414, 431)
    assert status(ask(GET)) == 200


# ---- what is no request, and what is no label ----


@pytest.mark.parametrize(
    ("length", "code"),
    [
        ("9" * 5000, 400),
        ("-1", 400),
        ("+5", 400),
        ("5_0", 400),
        ("0x10", 400),
        ("²", 400),
        ("5, 5", 400),
        ("", 400),
        ("5\r\nContent-Length: 60", 400),
        ("999999999", 413),
        (None, 400),
    ],
)
def test_a_length_is_a_number(ask: Ask, tmp_path: Path, length: str | None, code: int) -> None:
    announced = "" if length is None else f"\r\nContent-Length: {length}"
    answer = ask(f"{POST}{announced}", CLICK)
    assert status(answer) == code
    assert b"Connection: close" in answer, "what was not read must not be the next request"
    assert not (tmp_path / labels.FILE).exists()


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 4000,
        b'{"a":' * 800,
        b"9" * 4000,
        b'{"look": NaN, "row": 0, "verdict": "right", "at_random": true}',
        CLICK.replace(b'"row": 0', b'"row": ' + b"9" * 4000),
        CLICK.replace(b"right", b"\\ud800\\u001b[2J"),
        CLICK.replace(b"right", b"\xff"),
        b"\x00" * 100,
    ],
)
def test_what_is_no_label_is_one_line(ask: Ask, tmp_path: Path, body: bytes) -> None:
    answer = ask(f"{POST}\r\nContent-Length: {len(body)}", body)
    assert status(answer) == 400
    assert not (tmp_path / labels.FILE).exists()


@pytest.mark.parametrize(
    ("head", "code"),
    [
        ("GET http://[ HTTP/1.1\r\nHost: HOST", 403),
        ("GET http://[?token=TOKEN HTTP/1.1\r\nHost: HOST", 404),
        ("GET /?token=%ff%00 HTTP/1.1\r\nHost: HOST", 403),
        ("GET /?token=\xff HTTP/1.1\r\nHost: HOST", 403),
        ("GET /?token= HTTP/1.1\r\nHost: HOST", 403),
        ("GET /?token=TOKEN HTTP/1.1\r\nHost: evil.example", 421),
        ("GET /?token=TOKEN HTTP/1.1", 421),
        ("GET /../../etc/passwd?token=TOKEN HTTP/1.1\r\nHost: HOST", 404),
        ("GET //[?token=TOKEN HTTP/1.1\r\nHost: HOST", 404),
        ("GET / HTTP/9.9\r\nHost: HOST", 505),
        ("GET / HTTP/1.x\r\nHost: HOST", 400),
        ("\x16\x03\x01\x00 HTTP/1.1 x", 400),
        ("TRACE /?token=TOKEN HTTP/1.1\r\nHost: HOST", 501),
        (POST.replace("Origin: http://HOST", "Origin: http://evil.example"), 403),
        (f"{POST}\r\nTransfer-Encoding: chunked", 400),
    ],
)
def test_what_is_no_request_has_an_answer(ask: Ask, head: str, code: int) -> None:
    assert status(ask(head)) == code
