"""The server of `capfilt review`: the report with two buttons for each text; every click is stored as a label.

It listens on the loopback interface only. A client also needs the token of the URL, must name this host (a rebound DNS
name does not), and may post from this page only. Without the token a client can use at most MAX_CONNECTIONS threads,
each for REQUEST_SECONDS and MAX_REQUEST bytes.
"""

from __future__ import annotations

import contextlib
import hmac
import http.client
import io
import json
import re
import secrets
import socket
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs

from capfilt.data import labels
from capfilt.data.labels import Label
from capfilt.errors import RunError, UsageError
from capfilt.printable import printable
from capfilt.reporting.collect import Report, collect_report
from capfilt.reporting.gallery import label_code
from capfilt.reporting.page import content_security_policy, render
from capfilt.storage import documents
from capfilt.storage.paths import StoragePath

HOST = "127.0.0.1"
MAX_POST = 4096  # bytes
MAX_REQUEST = 32 * 1024
"""Bytes of a request, with its first line and headers."""
MAX_CONNECTIONS = 32
"""Connections at one time, each with a thread; a browser opens six. Further ones get status 503."""
REQUEST_SECONDS = 15.0
"""For reading one request, from the beginning of the connection or the last answer; then the connection is closed."""
ANSWER_SECONDS = 300.0
"""For sending an answer: a page of 24 MB may go through a slow tunnel."""


class ReviewSession:
    """A run under review: its page, and the labels given so far."""

    def __init__(self, folder: StoragePath, report: Report):
        self.home = labels.run_folder_of(folder)
        self.report = report
        self.lock = threading.Lock()
        self.positions: dict[tuple[str, str], list[tuple[int, int]]] = {}
        """(annotated round, row) of every place at which a text of an image is in the page, by (uid, text)."""
        for number, texts in enumerate(report.texts):
            for row, (uid, _, text) in enumerate(texts):
                self.positions.setdefault((uid, text), []).append((number, row))

    def page(self) -> bytes:
        """The page with all labels given so far."""
        with self.lock:
            return render(self.report.page, review=True).encode("utf-8", "replace")

    def add_label(self, request: Any) -> list[tuple[int, int, int]]:
        """Store one label; returns (annotated round, row, code) of every text in the page that it belongs to.

        `request` is the JSON that the page posts: look (the number of the annotated round), row, verdict, at_random.
        Raises UsageError for anything that is not a label of a text in this page.
        """
        match request:
            case {"look": int(number), "row": int(row), "verdict": str(verdict), "at_random": bool(at_random)} if not (
                isinstance(number, bool) or isinstance(row, bool)
            ):
                pass
            case _:
                raise UsageError("a label has look, row, verdict and at_random.")
        texts = self.report.texts
        if verdict not in labels.VERDICTS or not 0 <= number < len(texts):
            raise UsageError(f"a verdict is one of {', '.join(labels.VERDICTS)}, and the text must be in this page.")
        if not 0 <= row < len(texts[number]) or not texts[number][row][0]:
            raise UsageError("there is no such text in this page, its picture could not be read, or it is too long.")
        uid, source, text = texts[number][row]
        label = Label(uid, text, source, verdict, at_random)
        with self.lock:
            labels.append(self.home, label)
            positions = self.positions[uid, text]
            for number, row in positions:
                self.report.page.annotated_rounds[number].texts["label"][row] = label_code(label)
        return [(number, row, label_code(label)) for number, row in positions]

    def figures(self) -> dict[str, Any]:
        """Precision and recall of the newest round's threshold, from the labels that were given at random."""
        newest = self.report.page.annotated_rounds[-1]
        labelled = [
            (score, code == 1)
            for score, code in zip(newest.texts[newest.score], newest.texts["label"], strict=True)
            if code in (0, 1) and score is not None
        ]
        return {"round": newest.round, "score": newest.score, **labels.precision_and_recall(labelled, newest.threshold)}


class ReviewServer(ThreadingHTTPServer):
    """Serves a review session on a port of the loopback interface."""

    daemon_threads = True
    request_queue_size = 64  # a person who holds down a key

    def __init__(self, session: ReviewSession, port: int):
        super().__init__((HOST, port), ReviewHandler)
        self.session = session
        self.connections: set[Any] = set()
        self.token = secrets.token_urlsafe(24)
        self.hosts = {f"{name}:{self.server_port}" for name in (HOST, "localhost")}
        self.enough = 0  # labels at random that end the review; 0: none do

    def service_actions(self) -> None:
        """Called between requests: end the review as Ctrl-C does, once there are enough labels."""
        if self.enough and self.session.figures()["labels"] >= self.enough:
            raise KeyboardInterrupt

    def process_request(self, request: Any, client_address: Any) -> None:
        """Give a connection a thread; if there are too many, refuse it with status 503 instead."""
        if len(self.connections) >= MAX_CONNECTIONS:
            with contextlib.suppress(OSError):
                request.settimeout(0)
                request.send(b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            self.shutdown_request(request)
            return
        self.connections.add(request)
        try:
            super().process_request(request, client_address)
        except BaseException:  # a signal, say: whether there is a thread that will forget the connection is not known
            self.connections.discard(request)
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Handle one connection from its beginning to its end."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.connections.discard(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore browsers that disconnect in the middle of an answer; show everything else."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)

    @property
    def url(self) -> str:
        """The address of the page, with its token."""
        return f"http://{HOST}:{self.server_port}/?token={self.token}"


class LimitedReader(io.RawIOBase):
    """Reads from a connection with one deadline and one size limit for each request as a whole: a time-out of single
    reads would let a request arrive byte by byte for ever."""

    def __init__(self, connection: socket.socket):
        self._connection = connection
        self.begin()

    def begin(self) -> None:
        """Start the deadline and the size limit of the next request."""
        self._deadline, self._bytes_left = time.monotonic() + REQUEST_SECONDS, MAX_REQUEST

    def readable(self) -> bool:
        """True: io.BufferedReader asks."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read what has arrived. TimeoutError at the deadline; LineTooLong (answered with 431) at the size limit."""
        if (seconds := self._deadline - time.monotonic()) <= 0:
            raise TimeoutError
        if self._bytes_left <= 0:
            raise http.client.LineTooLong("request")
        self._connection.settimeout(seconds)
        size = self._connection.recv_into(memoryview(buffer)[: self._bytes_left])
        self._bytes_left -= size
        return size


class ReviewHandler(BaseHTTPRequestHandler):
    """Handles the requests of one connection."""

    server: ReviewServer
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "capfilt", ""
    default_request_version = "HTTP/1.0"  # of a request without a version: its answer has a status line too

    def setup(self) -> None:
        """Limit what is read from the connection."""
        super().setup()
        self.rfile.close()
        self.reader = LimitedReader(self.connection)
        self.rfile = io.BufferedReader(self.reader)

    def handle_one_request(self) -> None:
        """Handle one request; an invalid one closes the connection."""
        self.reader.begin()
        try:
            super().handle_one_request()
        except http.client.LineTooLong:  # the first line, or what was announced as a body
            self.close_connection = True

    def do_GET(self) -> None:
        """Send the page."""
        if refusal := self._refusal():
            return self._answer(*refusal)
        if self._path() != "/":
            return self._answer(404, b"there is only one page here")
        self._answer(200, self.server.session.page(), "text/html; charset=utf-8")

    def do_POST(self) -> None:
        """Store a label."""
        refusal = self._refusal() or self._cross_origin()
        if refusal:
            return self._answer(*refusal)
        if self._path() != "/labels":
            return self._answer(404, b"labels go to /labels")
        lengths = self.headers.get_all("Content-Length", [])
        if len(lengths) != 1 or not re.fullmatch("[0-9]{1,9}", lengths[0]):
            return self._answer(400, b"a label comes with one Content-Length")
        if self.headers.get_content_type() != "application/json" or int(lengths[0]) > MAX_POST:
            return self._answer(413, f"a label is JSON of at most {MAX_POST} bytes".encode())
        try:
            stored = self.server.session.add_label(documents.parse(self.rfile.read(int(lengths[0]))))
        except (ValueError, UsageError) as error:
            return self._answer(400, printable(error).encode())
        except OSError as error:  # the disk; the page says that the label was not saved
            return self._answer(500, printable(error).encode())
        self._answer(200, json.dumps({"labels": stored}).encode(), "application/json")

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer what the standard library refuses as plain text, with the headers of every answer."""
        self._answer(code, printable(message or "this is no request").encode())

    def _refusal(self) -> tuple[int, bytes] | None:
        """Why a request is refused: another Host (a rebound DNS name), or no token."""
        if self.headers.get("Host", "") not in self.server.hosts:
            return 421, b"this is no host of that name"
        token = parse_qs(self.path.partition("?")[2]).get("token", [""])[0]
        if not hmac.compare_digest(token.encode(), self.server.token.encode()):
            return 403, b"wrong token: open the address that capfilt review printed"
        return None

    def _path(self) -> str:
        return self.path.partition("?")[0]

    def _cross_origin(self) -> tuple[int, bytes] | None:
        """Why a post is refused: it does not come from our page."""
        if self.headers.get("Origin", "").removeprefix("http://") not in self.server.hosts:
            return 403, b"only this page may post here"
        return None

    def _answer(self, code: int, body: bytes, kind: str = "text/plain; charset=utf-8") -> None:
        self.send_response(code)
        headers = {
            "Content-Type": kind,
            "Content-Length": str(len(body)),
            "Cache-Control": "no-store",
            "Content-Security-Policy": f"{content_security_policy(connects=True)}; frame-ancestors 'none'",
            "Cross-Origin-Opener-Policy": "same-origin",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
            "Connection": "close" if code != 200 else "keep-alive",
        }
        for name, value in headers.items():
            self.send_header(name, value)
        self.close_connection = code != 200  # the body of a refused request is unread, and would be the next request
        self.connection.settimeout(ANSWER_SECONDS)  # for the whole answer
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing: the terminal shows the address, and labels are in the run folder."""


def open_server(folder: StoragePath, port: int = 0, fetch: bool = False) -> ReviewServer:
    """A server for a run's page, not serving yet. RunError if there is nothing to review or the port is taken."""
    report = collect_report(folder, fetch)
    if not report.page.annotated_rounds:
        raise RunError(f"{folder} has no annotations yet, so there is no text to review.")
    try:
        return ReviewServer(ReviewSession(folder, report), port)
    except OSError as error:
        raise RunError(f"port {port} cannot be had ({error}); choose another --port, or none.") from error
