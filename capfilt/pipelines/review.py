"""review: the report with two buttons a text, served to this machine alone; every click is a label in the run folder.

Whoever can reach the port still needs the token of the URL, must name this host (a rebound DNS name does not), and may
post from this page only.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import secrets
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from capfilt.errors import RunError, UsageError
from capfilt.pipelines.gallery import label_code
from capfilt.pipelines.report import Gathered, gather
from capfilt.reports import labels
from capfilt.reports.labels import Label
from capfilt.reports.page import policy, render
from capfilt.reports.places import Place

HOST = "127.0.0.1"
MAX_POST = 4096  # bytes
IDLE = 15.0  # seconds after which a silent connection is closed


class Desk:
    """The run under review: what is in its page, and the labels given so far."""

    def __init__(self, folder: Place, gathered: Gathered):
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
            raise UsageError("there is no such text in this page, or its picture could not be read.")
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
        self.token = secrets.token_urlsafe(24)
        self.hosts = {f"{name}:{self.server_port}" for name in (HOST, "localhost")}

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that goes away in the middle of an answer is no error; anything else is shown."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)

    @property
    def url(self) -> str:
        """Where the page is."""
        return f"http://{HOST}:{self.server_port}/?token={self.token}"


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    server: Server
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "capfilt", ""
    timeout = IDLE

    def do_GET(self) -> None:
        """The page."""
        if refusal := self._refusal():
            return self._answer(*refusal)
        if urlsplit(self.path).path != "/":
            return self._answer(404, b"there is only one page here")
        self._answer(200, self.server.desk.page(), "text/html; charset=utf-8")

    def do_POST(self) -> None:
        """A label."""
        refusal = self._refusal() or self._cross_origin()
        if refusal:
            return self._answer(*refusal)
        length = self.headers.get("Content-Length", "")
        if urlsplit(self.path).path != "/labels":
            return self._answer(404, b"labels go to /labels")
        if self.headers.get_content_type() != "application/json" or not length.isdecimal() or int(length) > MAX_POST:
            return self._answer(413, f"a label is JSON of at most {MAX_POST} bytes".encode())
        try:
            given = self.server.desk.give(json.loads(self.rfile.read(int(length))))
        except (ValueError, UsageError) as error:
            return self._answer(400, str(error).encode())
        except OSError as error:  # the disk; the person is told, and nothing is taken for saved
            return self._answer(500, str(error).encode())
        self._answer(200, json.dumps({"labels": given}).encode(), "application/json")

    def _refusal(self) -> tuple[int, bytes] | None:
        """Why a request is not for us: another Host (a rebound name), or no token."""
        if self.headers.get("Host", "") not in self.server.hosts:
            return 421, b"this is no host of that name"
        token = parse_qs(urlsplit(self.path).query).get("token", [""])[0]
        if not hmac.compare_digest(token.encode(), self.server.token.encode()):
            return 403, b"wrong token: open the address that capfilt review printed"
        return None

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
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: the terminal shows the address, and labels are in the run folder."""


def open_server(folder: Place, port: int = 0) -> Server:
    """A server for a run's page, not serving yet. RunError where there is nothing to review or the port is taken."""
    gathered = gather(folder)
    if not gathered.facts.looks:
        raise RunError(f"{folder} has no annotations yet, so there is no text to review.")
    try:
        return Server(Desk(folder, gathered), port)
    except OSError as error:
        raise RunError(f"port {port} cannot be had ({error}); choose another --port, or none.") from error


def run(folder: Place, port: int, announce: Callable[[str], None]) -> dict[str, Any]:
    """The verb: serve until Ctrl-C, which is how a review ends; then say what the labels say."""
    server = open_server(folder, port)
    with server:
        announce(server.url)
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()
    return server.desk.figures()
