"""Stops the main thread from another one, whatever signals this process was started to ignore or to block.

cron, CI runners and a shell's `&` start processes that ignore SIGINT, and Ray starts jobs that block it. So the signal
is one of our own choice, with a handler of our own; and a main thread that it does not reach is not waited for long.
"""

from __future__ import annotations

import os
import signal
import threading

SIGNAL = signal.SIGURG
"""By default ignored, so that it harms nobody who gets it by mistake."""
GRACE = 30.0
"""Seconds in which the main thread may end its workers and leave, before the process is ended."""


class Stopped(KeyboardInterrupt):
    """Raised in the main thread; the message says why. A KeyboardInterrupt because whoever waits makes way for that."""


_reasons: list[str] = []
_armed = False


def arm() -> None:
    """Let `stop` reach the main thread, which alone can call this with effect; a signal because it wakes what waits."""
    global _armed
    if threading.current_thread() is threading.main_thread():
        signal.signal(SIGNAL, _deliver)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {SIGNAL})
        _armed = True


def stop(why: str, over: threading.Event) -> None:
    """Raise Stopped in the main thread; end the process where `over` is not set within `GRACE` seconds.

    In a process that did not `arm`, since its lock is held in some other thread, the fence alone protects the run.
    """
    if not _armed:
        return
    _reasons.append(why)
    signal.pthread_kill(threading.main_thread().ident or 0, SIGNAL)
    if not over.wait(GRACE):
        os.write(2, f"error: {why}; this command did not leave within {GRACE:.0f} s and is ended\n".encode())
        os._exit(1)


def _deliver(_signal: int, _frame: object) -> None:
    if _reasons:
        raise Stopped(_reasons.pop())
