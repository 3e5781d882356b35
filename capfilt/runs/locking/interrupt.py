"""Interrupts the main thread from another one, even in a process that was started to ignore or to block signals.

cron, CI runners and a shell's `&` start processes that ignore SIGINT, and Ray starts jobs that block it. So another
signal is used, with its own handler; and a main thread that does not react to it is given a limited time.
"""

from __future__ import annotations

import os
import signal
import threading

SIGNAL = signal.SIGURG
"""Ignored by default, so a process that gets it by mistake is not harmed."""
GRACE_SECONDS = 30.0
"""Time for the main thread to end its workers and leave, before the process is ended."""


class Interrupted(KeyboardInterrupt):
    """Raised in the main thread; the message says why. A KeyboardInterrupt, because waiting code lets that through."""


_reasons: list[str] = []
_installed = False


def install_handler() -> None:
    """Let `interrupt_main_thread` reach the main thread, which has to call this. A signal also ends blocking calls."""
    global _installed
    if threading.current_thread() is threading.main_thread():
        signal.signal(SIGNAL, _handle)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {SIGNAL})
        _installed = True


def interrupt_main_thread(reason: str, left: threading.Event) -> None:
    """Raise Interrupted in the main thread, and end the process unless `left` is set within `GRACE_SECONDS`.

    It does nothing where the handler is not installed, as where a lock is held in another thread: there the write guard
    alone protects the run.
    """
    if not _installed:
        return
    _reasons.append(reason)
    signal.pthread_kill(threading.main_thread().ident or 0, SIGNAL)
    if not left.wait(GRACE_SECONDS):
        line = f"error: {reason}; this command did not leave within {GRACE_SECONDS:.0f} s and is ended\n"
        os.write(2, line.encode())
        os._exit(1)


def _handle(_signal: int, _frame: object) -> None:
    if _reasons:
        raise Interrupted(_reasons.pop())
