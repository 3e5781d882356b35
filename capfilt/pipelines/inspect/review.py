"""review: serve the report with two buttons for each text, to this machine alone."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from capfilt.reporting.review import open_server
from capfilt.storage.paths import StoragePath


def run(
    folder: StoragePath, port: int, announce: Callable[[str], object], fetch: bool = False, enough: int = 0
) -> dict[str, Any]:
    """The verb: serve until Ctrl-C, which ends a review; returns precision and recall from the labels.

    `announce` is called with the page's address, `port` 0 takes any that is free. With `enough` the review also ends
    when so many texts in random order have a label.
    """
    server = open_server(folder, port, fetch)
    server.enough = enough
    with server:
        announce(server.url)
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()
    return server.session.figures()
