"""The samples that kill whoever touches them, by their place in a shard: found once, left out from then on.

`poison/STAGE/SHARD.json`, for one version of the shard and of the job. A worker reads it when it begins the shard; the
samples named there are recorded as failed, with the reason, and nothing else of the shard changes.
"""

from __future__ import annotations

from capfilt.errors import RunError
from capfilt.runs.ledger import Ledger
from capfilt.storage import documents
from capfilt.storage.atomic import write_json
from capfilt.storage.paths import StoragePath, remove_file

REASON = "killed its worker"
"""How the reason of such a failure begins."""


def read(ledger: Ledger, shard: str, fingerprint: str) -> dict[int, str]:
    """The places of a shard's samples that are left out, and why."""
    path = _file(ledger, shard)
    try:
        found = documents.parse(documents.read_bytes(path))
        if found["fingerprint"] != fingerprint:
            return {}
        return {int(place): str(why) for place, why in found["samples"].items()}
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{path} cannot be read ({error!r}); delete it, its samples are found anew.") from error


def mark(ledger: Ledger, shard: str, fingerprint: str, place: int, why: str) -> None:
    """Leave a sample out from now on."""
    samples = {**read(ledger, shard, fingerprint), place: f"{REASON}: {why}"}
    tree = {"fingerprint": fingerprint, "samples": {str(place): samples[place] for place in sorted(samples)}}
    write_json(_file(ledger, shard), tree)


def forget(ledger: Ledger, shard: str) -> None:
    """Give the samples of a shard another chance."""
    remove_file(_file(ledger, shard))


def _file(ledger: Ledger, shard: str) -> StoragePath:
    return ledger.folder / "poison" / ledger.stage / f"{shard}.json"
