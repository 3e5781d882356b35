"""An S3 server on loopback (moto's), which may fail every n-th request as S3 does when it is busy.

    python s3_server.py EVERY [WAIT]

Prints its port. EVERY 0: it never fails. WAIT: seconds that every answer comes late, as that of a store far away.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

BUSY = b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"


def failing(app: Callable[..., Iterable[bytes]], every: int, wait: float) -> Callable[..., Iterable[bytes]]:
    """The application, but for every n-th request, and slower."""
    count = itertools.count(1)

    def answer(environ: dict[str, Any], start: Any) -> Iterable[bytes]:
        time.sleep(wait)
        if every and environ["PATH_INFO"] != "/moto-api/reset" and next(count) % every == 0:
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            start("503 Slow Down", [("Content-Type", "application/xml"), ("Content-Length", str(len(BUSY)))])
            return [BUSY]
        return app(environ, start)

    return answer


def main() -> None:
    app = failing(
        DomainDispatcherApplication(create_backend_app), int(sys.argv[1]), float(sys.argv[2]) if sys.argv[2:] else 0
    )
    server = make_server("127.0.0.1", 0, app, threaded=True)
    sys.stdout.write(f"{server.port}\n")
    sys.stdout.flush()
    server.serve_forever()


if __name__ == "__main__":
    main()
