"""review: the report with two buttons a text, served to this machine alone; every click is a label in the run folder.

Whoever can reach the port still needs the token of the URL, must name this host (a rebound DNS name does not), and may
post from this page only. Without the token nobody can take more of this process than MAX_CONNECTIONS threads, each for
REQUEST_SECONDS and MAX_REQUEST bytes.
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
from capfilt.reporting.collect import Gathered, gather
from capfilt.reporting.gallery import label_code
from capfilt.reporting.page import policy, render
from capfilt.storage.paths import StoragePath

HOST = "127.0.0.1"
MAX_POST = 4096  # bytes
MAX_REQUEST = 32 * 1024
"""Bytes of a request, its line and headers too."""
MAX_CONNECTIONS = 32
"""At one time, each with a thread; a browser opens six. One more is told that it is one too many."""
REQUEST_SECONDS = 15.0
"""From a connection's first moment, or its last answer, until a request is read whole; then it is closed."""
ANSWER_SECONDS = 300.0
"""For sending an answer; a page of 24 MB may go through a slow tunnel."""


class Desk:
    """The run under review: what is in its page, and the labels given so far."""

    def __init__(self, folder: StoragePath, gathered: Gathered):
        self.home = labels.home(folder)
        self.gathered = gathered
        self.lock = threading.Lock()
        self.places: dict[tuple[str, str], list[tuple[int, int]]] = {}
        for number, rows in enumerate(gathered.rows):
            for row, (uid, _, text) in enumerate(rows):
                self.places.setdefault((uid, text), []).append((number, row))

    def page(self) -> bytes:
        """The page with the labels of this moment."""
        with self.lock:
            return render(self.gathered.facts, review=True).encode("utf-8", "replace")

    def give(self, asked: Any) -> list[tuple[int, int, int]]:
        """Keep one label; returns [look, row, code] of every text in the page that it belongs to.

        Raises UsageError for what is no label of a text in this page.
        """
        match asked:
            case {"look": int(number), "row": int(row), "verdict": str(verdict), "at_random": bool(at_random)} if not (
                isinstance(number, bool) or isinstance(row, bool)
            ):
                pass
            case _:
                raise UsageError("a label has look, row, verdict and at_random.")
        if verdict not in labels.VERDICTS or not 0 <= number < len(self.gathered.rows):
            raise UsageError(f"a verdict is one of {', '.join(labels.VERDICTS)}, and the text must be in this page.")
        if not 0 <= row < len(self.gathered.rows[number]) or not self.gathered.rows[number][row][0]:
            raise UsageError("there is no such text in this page, its picture could not be read, or it is too long.")
        uid, source, text = self.gathered.rows[number][row]
        label = Label(uid, text, source, verdict, at_random)
        with self.lock:
            labels.append(self.home, label)
            places = self.places[uid, text]
            for look, place in places:
                self.gathered.facts.looks[look].texts["label"][place] = label_code(label)
        return [(look, place, label_code(label)) for look, place in places]

    def figures(self) -> dict[str, Any]:
        """What the labels given at random say of the newest round's threshold."""
        look = self.gathered.facts.looks[-1]
        judged = [
            (score, code == 1)
            for score, code in zip(look.texts[look.score], look.texts["label"], strict=True)
            if code in (0, 1) and score is not None
        ]
        return {"round": look.round, "score": look.score, **labels.figures(judged, look.threshold)}


class Server(ThreadingHTTPServer):
    """A desk on a port of the loopback interface."""

    daemon_threads = True
    request_queue_size = 64  # a person who holds down a key

    def __init__(self, desk: Desk, port: int):
        super().__init__((HOST, port), Handler)
        self.desk = desk
        self.slots = threading.BoundedSemaphore(MAX_CONNECTIONS)
        self.token = secrets.token_urlsafe(24)
        self.hosts = {f"{name}:{self.server_port}" for name in (HOST, "localhost")}

    def process_request(self, request: Any, client_address: Any) -> None:
        """Give a connection its thread, or where there are too many a refusal and none."""
        if not self.slots.acquire(blocking=False):
            with contextlib.suppress(OSError):
                request.settimeout(0)
                request.send(b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:  # there is no thread that would give it back
            self.slots.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """A connection from its beginning to its end."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.slots.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that goes away in the middle of an answer is no error; anything else is shown."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)

    @property
    def url(self) -> str:
        """Where the page is."""
        return f"http://{HOST}:{self.server_port}/?token={self.token}"


class Metered(io.RawIOBase):
    """What a connection sends, with one deadline and one size for the whole of a request: time-outs of single reads
    would let a request drip for ever."""

    def __init__(self, connection: socket.socket):
        self._connection = connection
        self.begin()

    def begin(self) -> None:
        """A request may begin."""
        self._end, self._left = time.monotonic() + REQUEST_SECONDS, MAX_REQUEST

    def readable(self) -> bool:
        """For io.BufferedReader."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read what is there. TimeoutError at the deadline, LineTooLong, which is answered 431, at the size."""
        if (seconds := self._end - time.monotonic()) <= 0:
            raise TimeoutError
        if self._left <= 0:
            raise http.client.LineTooLong("request")
        self._connection.settimeout(seconds)
        size = self._connection.recv_into(memoryview(buffer)[: self._left])
        self._left -= size
        return size


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    server: Server
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "capfilt", ""
    default_request_version = "HTTP/1.0"  # of a request that does not say: its answer has a status line too

    def setup(self) -> None:
        """Read through a meter."""
        super().setup()
        self.rfile.close()
        self.meter = Metered(self.connection)
        self.rfile = io.BufferedReader(self.meter)

    def handle_one_request(self) -> None:
        """One request; one that is none closes the connection."""
        self.meter.begin()
        try:
            super().handle_one_request()
        except http.client.LineTooLong:  # the first line, or what was announced as a body
            self.close_connection = True

    def do_GET(self) -> None:
        """The page."""
        if refusal := self._refusal():
            return self._answer(*refusal)
        if self._path() != "/":
            return self._answer(404, b"there is only one page here")
        self._answer(200, self.server.desk.page(), "text/html; charset=utf-8")

    def do_POST(self) -> None:
        """A label."""
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
            given = self.server.desk.give(json.loads(self.rfile.read(int(lengths[0]))))
        except RecursionError:
            return self._answer(400, b"a label is JSON without depth")
        except (ValueError, UsageError) as error:
            return self._answer(400, printable(error).encode())
        except OSError as error:  # the disk; the person is told, and nothing is taken for saved
            return self._answer(500, printable(error).encode())
        self._answer(200, json.dumps({"labels": given}).encode(), "application/json")

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the standard library refuses: plain text, with the headers of every answer."""
        self._answer(code, printable(message or "this is no request").encode())

    def _refusal(self) -> tuple[int, bytes] | None:
        """Why a request is not for us: another Host (a rebound name), or no token."""
        if self.headers.get("Host", "") not in self.server.hosts:
            return 421, b"this is no host of that name"
        token = parse_qs(self.path.partition("?")[2]).get("token", [""])[0]
        if not hmac.compare_digest(token.encode(), self.server.token.encode()):
            return 403, b"wrong token: open the address that capfilt review printed"
        return None

    def _path(self) -> str:
        return self.path.partition("?")[0]

    def _cross_origin(self) -> tuple[int, bytes] | None:
        """Why a post is not from our page."""
        if self.headers.get("Origin", "").removeprefix("http://") not in self.server.hosts:
            return 403, b"only this page may post here"
        return None

    def _answer(self, code: int, body: bytes, kind: str = "text/plain; charset=utf-8") -> None:
        self.send_response(code)
        headers = {
            "Content-Type": kind,
            "Content-Length": str(len(body)),
            "Cache-Control": "no-store",
            "Content-Security-Policy": f"{policy(review=True)}; frame-ancestors 'none'",
            "Cross-Origin-Opener-Policy": "same-origin",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
            "Connection": "close" if code != 200 else "keep-alive",
        }
        for name, value in headers.items():
            self.send_header(name, value)
        self.close_connection = code != 200  # a refused body was not read: the next request would begin inside it
        self.connection.settimeout(ANSWER_SECONDS)  # for all of it
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: the terminal shows the address, and labels are in the run folder."""


def open_server(folder: StoragePath, port: int = 0, fetch: bool = False) -> Server:
    """A server for a run's page, not serving yet. RunError where there is nothing to review or the port is taken."""
    gathered = gather(folder, fetch)
    if not gathered.facts.looks:
        raise RunError(f"{folder} has no annotations yet, so there is no text to review.")
    try:
        return Server(Desk(folder, gathered), port)
    except OSError as error:
        raise RunError(f"port {port} cannot be had ({error}); choose another --port, or none.") from error
