from __future__ import annotations

import http.client
import json
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from capfilt.data import labels
from capfilt.data.labels import Label
from capfilt.reporting import review
from capfilt.storage.atomic import sha256_file


@pytest.fixture
def server(run_copy: Path) -> Iterator[review.ReviewServer]:
    """A review of a finished run, served."""
    server = review.open_server(run_copy)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    with server:
        yield server
        server.shutdown()
    thread.join()


def ask(
    server: review.ReviewServer, method: str = "POST", path: str | None = None, body: Any = None, **headers: str
) -> Any:
    """(status, headers, body) of one request; without `headers` it is what the page would send."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    own = {"Origin": f"http://127.0.0.1:{server.server_port}", "Content-Type": "application/json"}
    sent = {name.replace("_", "-"): value for name, value in {**own, **headers}.items()}
    target = path if path is not None else f"/labels?token={server.token}"
    data = body if isinstance(body, bytes) else json.dumps(body).encode() if body is not None else None
    connection.request(method, target, data, sent)
    answer = connection.getresponse()
    found = (answer.status, answer.headers, answer.read())
    connection.close()
    return found


CLICK = {"look": 0, "row": 0, "verdict": "right", "at_random": True}


def test_the_page_is_the_report_with_buttons(server: review.ReviewServer) -> None:
    status, headers, body = ask(server, "GET", f"/?token={server.token}")
    assert status == 200
    assert b'"review":true' in body
    assert headers["Cache-Control"] == "no-store"
    assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]
    assert "connect-src 'self'" in headers["Content-Security-Policy"]
    assert server.server_address[0] == "127.0.0.1"


def test_a_click_is_a_label_in_the_run_folder(server: review.ReviewServer, run_copy: Path) -> None:
    status, _, body = ask(server, body=CLICK)
    assert (status, json.loads(body)) == (200, {"labels": [[0, 0, 1]]})
    uid, source, text = server.session.report.texts[0][0]
    assert labels.read(run_copy) == {(uid, text): Label(uid, text, source, "right", True)}
    assert b'"label":[1,' in ask(server, "GET", f"/?token={server.token}")[2], "a page opened anew shows it"
    ask(server, body={**CLICK, "verdict": "none"})
    assert labels.read(run_copy) == {}


@pytest.mark.parametrize(
    ("headers", "path", "status"),
    [
        ({"Host": "evil.example"}, None, 421),  # a name that was made to point here
        ({"Host": "127.0.0.1:1"}, None, 421),
        ({}, "/labels?token=wrong", 403),
        ({}, "/labels", 403),
        ({"Origin": "http://evil.example"}, None, 403),
        ({"Origin": "null"}, None, 403),
        ({"Origin": ""}, None, 403),
        ({"Content_Type": "text/plain"}, None, 413),  # what a form of another page can send unasked
    ],
)
def test_others_are_refused(
    server: review.ReviewServer, run_copy: Path, headers: dict[str, str], path: str | None, status: int
) -> None:
    assert ask(server, "POST", path, CLICK, **headers)[0] == status
    assert not (run_copy / labels.FILE).exists()


@pytest.mark.parametrize(("host", "path"), [("evil.example", None), (None, "/?token=x"), (None, "/")])
def test_nobody_else_reads_the_page(server: review.ReviewServer, host: str | None, path: str | None) -> None:
    headers = {"Host": host} if host else {}
    status, _, body = ask(server, "GET", path or f"/?token={server.token}", **headers)
    assert status in (403, 421)
    assert b"<html" not in body


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"{", 400),
        (b"\xff\xfe", 400),
        ([CLICK], 400),
        ({**CLICK, "look": 7}, 400),
        ({**CLICK, "row": -1}, 400),
        ({**CLICK, "row": 10**9}, 400),
        ({**CLICK, "row": True}, 400),
        ({**CLICK, "verdict": "maybe"}, 400),
        ({**CLICK, "at_random": "yes"}, 400),
        (b"x" * 5000, 413),
    ],
)
def test_what_is_no_label_is_refused(server: review.ReviewServer, run_copy: Path, body: Any, status: int) -> None:
    assert ask(server, body=body)[0] == status
    assert not (run_copy / labels.FILE).exists()
    assert ask(server, body=CLICK)[0] == 200, "and the server lives"


def test_there_is_only_one_page(server: review.ReviewServer) -> None:
    assert ask(server, "GET", f"/labels.jsonl?token={server.token}")[0] == 404
    assert ask(server, "POST", f"/?token={server.token}", CLICK)[0] == 404


def test_many_clicks_at_once_are_all_kept(server: review.ReviewServer, run_copy: Path) -> None:
    threads = [threading.Thread(target=ask, args=(server,), kwargs={"body": {**CLICK, "row": i}}) for i in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len((run_copy / labels.FILE).read_bytes().splitlines()) == 20


def test_a_run_without_annotations_has_nothing_to_review(run_copy: Path, capfilt: Any) -> None:
    import shutil

    shutil.rmtree(run_copy / "round-1")
    done = capfilt("review", run_copy, address=None)
    assert done.code == 1
    assert "has no annotations yet" in done.line


@pytest.mark.parametrize("sent", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_signal_ends_a_review_and_says_what_the_labels_say(
    run_copy: Path, ignore_signals: Any, sent: signal.Signals
) -> None:
    words = (sys.executable, "-m", "capfilt", "review", str(run_copy), "--json")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(words, preexec_fn=ignore_signals, **pipes) as running:  # type: ignore[call-overload]
        assert running.stdout is not None
        url = urlsplit(json.loads(running.stdout.readline())["url"])
        connection = http.client.HTTPConnection(url.netloc, timeout=60)
        body, headers = json.dumps(CLICK), {"Origin": f"http://{url.netloc}", "Content-Type": "application/json"}
        connection.request("POST", f"/labels?{url.query}", body, headers)
        assert connection.getresponse().status == 200
        connection.close()
        running.send_signal(sent)
        out, err = running.communicate(timeout=100)
    assert (running.returncode, err) == (0, "")
    assert json.loads(out)["labels"] == 1


def test_a_signal_ends_the_server_also_when_a_connection_s_thread_has_just_ended(
    run_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is raised in the main thread, here after the thread and before `process_request` returns."""
    start = threading.Thread.start

    def interrupted(self: threading.Thread) -> None:
        start(self)
        self.join(60)
        raise KeyboardInterrupt

    with review.open_server(run_copy) as server, socket.create_connection((review.HOST, server.server_port)):
        monkeypatch.setattr(threading.Thread, "start", interrupted)
        monkeypatch.setattr(server.RequestHandlerClass, "handle", lambda self: None)
        with pytest.raises(KeyboardInterrupt):
            server.handle_request()
        assert not server.connections


def test_a_person_reviews(server: review.ReviewServer, run_copy: Path, browser: Any) -> None:
    opened = browser.open(server.url)
    opened.wait_for_selector(".card")
    assert opened.locator("#sort").input_value() == "random"
    first = opened.locator(".card .text").first
    assert not re.search("kept|dropped|itm", first.inner_text()), "the verdict would lead the person"
    right = opened.locator(".card .text").first.get_by_role("button", name="right")
    right.click()
    opened.locator("#saved").filter(has_text="Saved: right").wait_for()
    assert opened.locator(".card .text").first.locator("[aria-pressed=true]").inner_text() == "right"
    opened.locator("#live").filter(has_text="1 random labels").wait_for()
    assert re.search("kept|dropped", first.inner_text()), "now it may be seen"
    # By keyboard: next text, wrong, then on; and back, and taken back.
    for key in ("j", "j", "w"):
        opened.keyboard.press(key)
    opened.locator("#saved").filter(has_text="Saved: wrong").wait_for()
    opened.locator("#live").filter(has_text="2 random labels").wait_for()
    opened.locator("#sort").select_option("close")
    opened.locator(".card .text").last.get_by_role("button", name="wrong").click()
    opened.locator("#live").filter(has_text="1 labels given otherwise").wait_for()
    given = [label.at_random for label in labels.read(run_copy).values()]
    assert sorted(given) == [False, True, True]
    assert {urlsplit(request).hostname for request in browser.requests if request.startswith("http")} == {"127.0.0.1"}
    opened.reload()
    opened.locator("#live").filter(has_text="2 random labels").wait_for()


def test_a_click_that_cannot_be_kept_is_said_to_be_lost(
    server: review.ReviewServer, run_copy: Path, chromium: Any
) -> None:
    page = chromium.new_context().new_page()
    page.goto(server.url)
    (run_copy / labels.FILE).mkdir()
    page.locator(".card .text").first.get_by_role("button", name="right").click()
    page.locator("#saved").filter(has_text="Not saved").wait_for()
    assert page.locator("[aria-pressed=true]").count() == 0
    page.context.close()


class TestCalibrateOnLabels:
    """`select --calibrate labels`, on pictures of four colours, whose truth we know."""

    @pytest.fixture
    def reviewed(self, colours: Path, tmp_path: Path) -> Path:
        import shutil

        run = Path(shutil.copytree(colours, tmp_path / "run"))
        server = review.open_server(run)
        with server:
            newest = server.session.report.page.annotated_rounds[0]
            for row, truth in enumerate(newest.texts["truth"]):
                if truth >= 0:
                    verdict = "right" if truth else "wrong"
                    server.session.add_label({"look": 0, "row": row, "verdict": verdict, "at_random": True})
            assert server.session.figures()["labels"] == 64
        return run

    def words(self, run: Path, colours: Path, out: Path, *more: str) -> list[object]:
        web = colours.parent / "web"
        return ["select", web, "--annotations", run / "round-1", "--out", out, "--calibrate", "labels", *more]

    def test_the_threshold_keeps_the_share_of_right_texts_asked_for(
        self, reviewed: Path, colours: Path, tmp_path: Path, capfilt: Any
    ) -> None:
        done = capfilt(*self.words(reviewed, colours, tmp_path / "clean", "--set", "recall=0.9", "--json"))
        assert done.code == 0, done.err
        told = json.loads(done.out)
        said = told["labels"]
        assert said["labels"] == 64
        assert said["recall"] >= 0.9
        low, high = said["precision_interval"]
        assert low < said["precision"] <= high
        made = json.loads((tmp_path / "clean/calibration.json").read_text())
        assert made["threshold"] == told["threshold"]
        assert capfilt("report", tmp_path / "clean", "--json", address=None).code == 0
        before = sha256_file(tmp_path / "clean/dataset/00000.tar")
        again = capfilt(*self.words(reviewed, colours, tmp_path / "clean", "--set", "recall=0.9", "--json"))
        assert (again.code, sha256_file(tmp_path / "clean/dataset/00000.tar")) == (0, before)

    def test_other_labels_are_another_plan(self, reviewed: Path, colours: Path, tmp_path: Path, capfilt: Any) -> None:
        words = self.words(reviewed, colours, tmp_path / "clean")
        assert capfilt(*words).code == 0
        ((uid, text), label) = next(iter(labels.read(reviewed).items()))
        labels.append(reviewed, Label(uid, text, label.source, "none", True))
        done = capfilt(*words)
        assert done.code == 1
        assert "was planned otherwise: calibration." in done.line

    def test_close_calls_alone_set_nothing(self, colours: Path, tmp_path: Path, capfilt: Any) -> None:
        done = capfilt(*self.words(colours, colours, tmp_path / "clean"))
        assert done.code == 1
        assert "0 texts of these shards are labelled right and 0 wrong" in done.line
        assert f"capfilt review {colours}" in done.line
        assert not (tmp_path / "clean").exists()

    @pytest.mark.parametrize("more", [("--set", "threshold=0.4"), ("--val", "x"), ("--filter", "x")])
    def test_two_thresholds_are_one_too_many(
        self, colours: Path, tmp_path: Path, capfilt: Any, more: tuple[str, str]
    ) -> None:
        done = capfilt(*self.words(colours, colours, tmp_path / "clean", *more))
        assert done.code == 2
        assert "leave out --threshold, --keep-rate, --val and --filter" in done.line
