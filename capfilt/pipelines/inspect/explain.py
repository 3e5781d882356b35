"""explain: what happened to one image, round by round: every text, its scores, who wrote and judged it, the verdict.

It reads the tables that the ledgers of a run name, whichever stages made them: any Parquet with a `key` or a `uid`.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from capfilt.data import parquet
from capfilt.errors import DataError, RunError
from capfilt.runs import stage_status
from capfilt.runs.ledger import Ledger
from capfilt.runs.run import Run
from capfilt.storage.paths import StoragePath, relative_to

NAMES = ("key", "uid", "sha256")
"""The columns by which an image may be asked for."""
MAX_SHOWN = 1000
"""Characters of a text that a person is shown; --json has it whole."""

MAX_TEXTS = 10_000
"""Rows of one image that are looked at, of each table."""

_IMAGE = {"jpg", "jpeg", "png", "webp"}  # columns with the bytes of pictures, which nobody wants to read


def run(folder: StoragePath, name: str) -> dict[str, Any]:
    """The verb: everything that the tables of a run say of one image, by its key, uid or sha256."""
    Run.load(folder)
    models: dict[str, str] = {}
    found: dict[tuple[StoragePath, str], dict[str, Any]] = {}
    looked = 0
    for ledger in stage_status.find(folder):
        for done in stage_status.readable(ledger):
            for output in dict.fromkeys(done.outputs):  # a forged record may name one a million times
                if output.path.endswith((".safetensors", ".bin", ".pth")):
                    models[output.sha256] = str(relative_to((ledger.folder / output.path).parent, folder))
                if not output.path.endswith(".parquet"):
                    continue
                looked += 1
                if rows := read(ledger.folder / output.path, name):
                    # A later stage of the same shard says all that the earlier one said, and the verdict.
                    place = (ledger.folder, done.shard if _texts(rows) else f"{ledger.stage} {done.shard}")
                    found[place] = _chapter(folder, ledger, done.shard, output.path, rows)
    if not found:
        raise RunError(
            f"no image is called {name!r} in {folder}: {looked} tables were looked at. Give a key, a uid or a sha256"
            " of it; `capfilt status` tells whether its shard is done."
        )
    chapters = list(found.values())
    used = {row[role] for c in chapters for row in c["rows"] for role in ("captioner", "filter") if row.get(role)}
    places = {model: models[digest] for model in sorted(used) if (digest := model.rpartition("-")[2]) in models}
    return {"asked": name, "found": chapters, "models": places}


def read(path: StoragePath, name: str) -> list[dict[str, Any]]:
    """The rows of one table that are about an image. DataError for a table that cannot be read, or is too large."""
    try:
        columns = [c.name for c in parquet.schema(path) if parquet.is_bounded(c.type) and not _is_bytes(c)]
        by = [column for column in NAMES if column in columns]
        if not by:
            return []
        asked = {column: pa.scalar(name if column == "key" else name.lower(), pa.string()) for column in by}
        found = parquet.read(path, columns, lambda batch: _any(pc.equal(batch[c], asked[c]) for c in by))
    except DataError as error:
        raise DataError(f"{error}; `capfilt verify` tells what else does not hold.") from error
    return [{name: _plain(value) for name, value in row.items()} for row in found.slice(0, MAX_TEXTS).to_pylist()]


def _plain(value: Any) -> Any:
    """What JSON can hold: times, decimals and bytes as text."""
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    return value if value is None or isinstance(value, str | int | float) else str(value)


def _is_bytes(column: pa.Field) -> bool:
    return column.name in _IMAGE or pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type)


def _any(masks: Iterator[pa.Array]) -> pa.Array:
    return reduce(pc.or_kleene, masks)


def story(told: dict[str, Any]) -> Iterator[str]:
    """What was found, as lines for a person."""
    for chapter in told["found"]:
        yield f"{chapter['folder']}  shard {chapter['shard']}  ({chapter['stage']}: {chapter['table']})"
        if not _texts(chapter["rows"]):
            yield from (f"  {name}: {value}" for row in chapter["rows"] for name, value in row.items())
            continue
        first = chapter["rows"][0]
        yield "  " + "  ".join(f"{name} {first[name] or '-'}" for name in (*NAMES, "round"))
        for row in chapter["rows"]:
            yield from _text(row, told["models"])


def _text(row: dict[str, Any], models: dict[str, str]) -> Iterator[str]:
    """One text of the image: what it is, what came of it, who wrote and judged it."""
    if row["status"] == "failed":
        yield f"  failed: {row['reason']}"
        return
    scores = "  ".join(f"{score} {row[score]:.4f}" for score in ("itm", "itc") if row[score] is not None)
    verdict = row.get("verdict", "no verdict yet")
    yield f"  {row['source']} {row['candidate']}  {verdict}{': ' + row['why'] if row.get('why') else ''}  {scores}"
    more = f"… ({len(row['text'])} characters)" if len(row["text"]) > MAX_SHOWN else ""
    yield f"      {row['text'][:MAX_SHOWN]!r}{more}"
    for role, verb in (("captioner", "written"), ("filter", "judged")):
        if model := row[role]:
            yield f"      {verb} by {models.get(model, 'a model from elsewhere')} ({model[:20]}…), seed {row['seed']}"


def _texts(rows: list[dict[str, Any]]) -> bool:
    return {"source", "candidate", "text", "itm", "itc", "captioner", "filter", "status"} <= rows[0].keys()


def _chapter(folder: StoragePath, ledger: Ledger, shard: str, path: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    place = str(relative_to(ledger.folder, folder))
    return {"folder": place, "stage": ledger.stage, "shard": shard, "table": path, "rows": rows}
