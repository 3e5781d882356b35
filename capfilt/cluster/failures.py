"""Failures of worker processes as text that can cross a process border: an exception object might not survive that."""

from __future__ import annotations

import traceback
from dataclasses import dataclass

from capfilt.errors import CapfiltError, ClusterError

# What Ray says of a worker whose node died, and of one that was asked to end.
_MACHINE_FAULTS = ("its node has died", "node was terminated", "The process receives a SIGTERM")


@dataclass(frozen=True)
class Failure:
    """An exception of a worker process, or its death."""

    message: str
    """One line for a person."""
    traceback: str = ""
    user_error: type[CapfiltError] | None = None
    """The class of a CapfiltError, whose message is meant for a person; None for any other exception."""
    died: bool = False
    """Whether the process is gone."""
    machine_fault: bool = False
    """Whether it is gone because a node was lost or preempted, and not because of its work."""

    @classmethod
    def of_exception(cls, error: Exception) -> Failure:
        """Describe an exception that is being handled."""
        trace = "".join(traceback.format_exception(error))
        if isinstance(error, CapfiltError):
            return cls(str(error), trace, type(error))
        return cls(one_line("".join(traceback.format_exception_only(error))), trace)

    @classmethod
    def of_death(cls, error: Exception) -> Failure:
        """Describe the end of a process by Ray's error for it."""
        text = " ".join(str(error).split())
        machine_fault = getattr(error, "preempted", False) or any(words in text for words in _MACHINE_FAULTS)
        return cls(one_line(text), died=True, machine_fault=machine_fault)

    def to_exception(self, what: str) -> CapfiltError:
        """The exception to raise in the driver: a CapfiltError as it was, anything else of `what` as a ClusterError.

        The remote traceback is added as a note, which `--debug` shows and the one-line message does not.
        """
        error = self.user_error(self.message) if self.user_error else ClusterError(f"{what}: {self.message}")
        if self.traceback:
            error.add_note(self.traceback)
        return error


def one_line(text: str) -> str:
    """The text of another program on one line of at most 400 characters."""
    return " ".join(text.split())[:400]
