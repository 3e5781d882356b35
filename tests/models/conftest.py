"""A hub of our own: the few answers of the Hugging Face hub that its client needs, on this machine."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """Serves ROOT/OWNER/NAME as repositories of one commit."""

    def __init__(self, *args: object, root: Path, asked: list[str]):
        self.root, self.asked = root, asked
        super().__init__(*args)  # type: ignore[arg-type]

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        path = self.path.partition("?")[0].removeprefix("/")
        self.asked.append(path)
        if path.startswith("api/models/"):
            name = "/".join(path.split("/")[2:4])
            files = sorted(file for file in (self.root / name).rglob("*") if file.is_file())
            found = self.described(path, name, files) if files else None
        else:
            name, _, file = path.partition(f"/resolve/{COMMIT}/")
            target = self.root / name / file
            found = target.read_bytes() if target.is_file() else None
        self.send_response(200 if found is not None else 404)
        content = b"{}" if found is None else found
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("Content-Length", str(len(content)))
        if found is None:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.end_headers()
        if body:
            self.wfile.write(content)

    def described(self, path: str, name: str, files: list[Path]) -> bytes:
        names = [file.relative_to(self.root / name).as_posix() for file in files]
        if "/tree/" in path:
            return json.dumps(
                [
                    {
                        "type": "file",
                        "path": name,
                        "size": file.stat().st_size,
                        "oid": hashlib.sha1(file.read_bytes()).hexdigest(),
                    }
                    for name, file in zip(names, files, strict=True)
                ]
            ).encode()
        siblings = [{"rfilename": name} for name in names]
        return json.dumps({"id": name, "modelId": name, "sha": COMMIT, "siblings": siblings, "tags": []}).encode()

    def log_message(self, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, list[str]]]:
    """A hub that the client asks instead of the real one: where its repositories lie, and what it was asked for."""
    from huggingface_hub import constants

    root, asked = tmp_path / "hub", list[str]()
    root.mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, root=root, asked=asked))
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    home = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", home)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", home + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield root, asked
    server.shutdown()
    server.server_close()
    thread.join()
