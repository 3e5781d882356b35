"""review: the report with two buttons a text, served to this machine alone."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from capfilt.reporting.review import open_server
from capfilt.storage.paths import StoragePath


def run(folder: StoragePath, port: int, announce: Callable[[str], None], fetch: bool = False) -> dict[str, Any]:
    """The verb: serve until Ctrl-C, which is how a review ends; then say what the labels say."""
    server = open_server(folder, port, fetch)
    with server:
        announce(server.url)
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()
    return server.desk.figures()
