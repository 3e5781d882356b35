"""A web server on loopback that has the pictures of a folder: `python -m ...picture_server FOLDER`.

In a process of its own and one thread, so that it takes nothing from the interpreter that is measured. It prints its
port and ends with its standard input, so that it outlives nobody; Ctrl-C, which a terminal sends to it too, is for the
process that measures.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from pathlib import Path

HEAD = "HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\nContent-Length: {}\r\nConnection: close\r\n\r\n"
MISSING = b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


async def serve(folder: Path) -> None:
    """Answer GET /NUMBER with the picture of that number, counted around, and anything else with 404."""
    answers = [HEAD.format(len(data)).encode() + data for data in (p.read_bytes() for p in sorted(folder.iterdir()))]

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            name = (await reader.readuntil(b"\r\n\r\n")).split(b" ")[1].decode().strip("/")
            writer.write(answers[int(name) % len(answers)] if name.isdecimal() else MISSING)
            await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # the other side has gone
        finally:
            writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0, backlog=4096)
    sys.stdout.write(f"{server.sockets[0].getsockname()[1]}\n")
    sys.stdout.flush()
    await asyncio.to_thread(sys.stdin.read)
    server.close()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    asyncio.run(serve(Path(sys.argv[1])))
