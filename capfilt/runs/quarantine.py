"""Samples that kill the worker that processes them, by their position in a shard: found once and skipped from then on.

They are listed in `poison/STAGE/SHARD.json`, for one version of the shard and of the job. A worker reads it when it
begins the shard and records the samples as failed, with the reason; nothing else of the shard changes.
"""

from __future__ import annotations

from capfilt.errors import RunError
from capfilt.runs.ledger import Ledger
from capfilt.storage import documents
from capfilt.storage.atomic import write_json
from capfilt.storage.paths import StoragePath, remove_file

REASON = "killed its worker"
"""The beginning of the reason of such a failure."""


def read(ledger: Ledger, shard: str, fingerprint: str) -> dict[int, str]:
    """The positions of a shard's quarantined samples, each with the reason."""
    path = _file(ledger, shard)
    try:
        tree = documents.parse(documents.read_bytes(path))
        if tree["fingerprint"] != fingerprint:
            return {}
        return {int(position): str(reason) for position, reason in tree["samples"].items()}
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(
            f"{path} cannot be read ({error!r}); delete it: the next run finds such samples again."
        ) from error


def add(ledger: Ledger, shard: str, fingerprint: str, position: int, why: str) -> None:
    """Skip a sample from now on; `why` its worker died."""
    samples = {**read(ledger, shard, fingerprint), position: f"{REASON}: {why}"}
    tree = {"fingerprint": fingerprint, "samples": {str(index): samples[index] for index in sorted(samples)}}
    write_json(_file(ledger, shard), tree)


def clear(ledger: Ledger, shard: str) -> None:
    """Process all samples of a shard again."""
    remove_file(_file(ledger, shard))


def _file(ledger: Ledger, shard: str) -> StoragePath:
    return ledger.folder / "poison" / ledger.stage / f"{shard}.json"
