"""explain: what happened to one image, round by round: every text, its scores, its models and its verdict.

It reads every Parquet that the ledgers of a run name, whichever stage made it, if it has a column `key` or `uid`; of a
run of many shards those alone that the index of images names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import reduce
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

import capfilt.data.annotations as tables
from capfilt.data import parquet, scores
from capfilt.errors import DataError, RunError
from capfilt.models.checkpoints import store
from capfilt.runs import stage_status
from capfilt.runs.ledger import Completion, Ledger
from capfilt.runs.run import Run
from capfilt.stages import image_index, inputs
from capfilt.stages.image_index import NAMES
from capfilt.stages.inputs import verb_of
from capfilt.storage import documents
from capfilt.storage.paths import StoragePath, map_concurrent, relative_to
from capfilt.storage.remote_path import RemotePath
from capfilt.yaml_loader import load_yaml

MAX_SHOWN = 1000
"""Characters of a text in the lines for a person; --json has all of them."""
MAX_TEXTS = 10_000
"""Rows of one image that are read from each table."""

_IMAGE_COLUMNS = {"jpg", "jpeg", "png", "webp"}  # bytes of pictures, which are not printed


def run(folder: StoragePath, name: str) -> dict[str, Any]:
    """The verb: everything that the tables of a run say of one image, by its key, uid or sha256."""
    plan, models = Run.load(folder).plan, dict[str, str]()
    pretrained = pretrained_roles(folder, plan)
    by_shard: dict[tuple[StoragePath, str], dict[str, Any]] = {}
    num_tables = 0
    for ledger in stage_status.find_ledgers(folder):
        for done in _candidates(folder, plan, ledger, name):
            models |= _models(ledger, done, folder)
            for output in dict.fromkeys(done.outputs):  # a forged record may name one a million times
                if not output.path.endswith(".parquet"):
                    continue
                num_tables += 1
                if rows := read(ledger.folder / output.path, name):
                    # The table of a later stage has all columns of the earlier one's, and the verdict: it replaces it.
                    shard = (ledger.folder, done.shard if are_texts(rows) else f"{ledger.stage} {done.shard}")
                    within = str(relative_to(ledger.folder, folder))
                    where = {"folder": within, "stage": ledger.stage, "shard": done.shard, "table": output.path}
                    by_shard[shard] = {**where, "rows": rows}
    if not num_tables:
        raise RunError(
            f"{folder} has no table of images, or none yet: runs of bootstrap, annotate, select, download,"
            " convert and pack have."
        )
    if not by_shard:
        raise RunError(
            f"no image is called {name!r} in {folder}: {num_tables} tables were read. Give a key, a uid or a sha256"
            " of it; `capfilt status` tells whether its shard is done."
        )
    records = list(by_shard.values())
    for (home, name_of_shard), record in by_shard.items():
        if are_texts(record["rows"]):
            _add_scores(home, name_of_shard, record["rows"])
    used = {row[role] for r in records for row in r["rows"] for role in ("captioner", "filter") if row.get(role)}
    folders = {model: models[digest] for model in sorted(used) if (digest := model.rpartition("-")[2]) in models}
    named = {model: pretrained[model] for model in sorted(used) if model in pretrained}
    return {"asked": name, "found": records, "models": folders | named}


def _candidates(folder: StoragePath, plan: Mapping[str, Any], ledger: Ledger, name: str) -> Iterator[Completion]:
    """The completions of a stage whose tables may have the image, sorted by shard: where there is an index, those that
    it gives, and the shards that it does not have."""
    if ledger.stage == "rows" or ledger.stage.startswith("score-"):  # they have no table of images
        return
    indexed = ledger
    if ledger.stage == "select":  # decides on what `annotate` listed, shard by shard
        home = inputs.annotations_source(folder, plan) if verb_of(plan) == "select" else ledger.folder
        indexed = Ledger(home if isinstance(home, Path) == isinstance(folder, Path) else ledger.folder, "annotate")
    looked = image_index.shards_with(indexed, name)
    if looked is None:
        yield from ledger.readable_completions()
        return
    hits, indexed_shards = looked
    shards = sorted(hits | (ledger.recorded_shards() - indexed_shards))
    paths = (ledger.path / f"{shard}.json" for shard in shards)
    yield from filter(None, map_concurrent(ledger.read, paths, isinstance(ledger.path, RemotePath)))


def _models(ledger: Ledger, done: Completion, folder: StoragePath) -> dict[str, str]:
    """The folders of the models that a completion names, by the digests in their fingerprints: a family that reads
    pictures or cuts texts by files of its own has these in it."""
    by_home: dict[str, dict[str, str]] = {}
    for output in done.outputs:
        home, _, name = output.path.rpartition("/")
        by_home.setdefault(home, {})[name] = output.sha256
    return {
        store.digest_of_files([files[store.WEIGHTS]], files): str(relative_to(ledger.folder / home, folder))
        for home, files in by_home.items()
        if store.WEIGHTS in files
    }


def pretrained_roles(folder: StoragePath, plan: Mapping[str, Any]) -> dict[str, str]:
    """The pretrained models of a bootstrap's roles, by their fingerprints, as its recipe names them."""
    recipe, names = folder / "recipe.yaml", dict[str, str]()
    for role in ("captioner", "filter"):
        planned = plan.get(role)
        if isinstance(planned, dict) and isinstance(fingerprint := planned.get("pretrained"), str) and recipe.is_file():
            section = load_yaml(documents.check_record(recipe)).get(role)
            model = section.get("pretrained") if isinstance(section, dict) else None
            if isinstance(model, str):
                names[fingerprint] = model
    return names


def read(path: StoragePath, name: str) -> list[dict[str, Any]]:
    """The rows of one table that are about an image, given by its key, uid or sha256.

    DataError for a table that cannot be read or is too large.
    """
    try:
        columns = [c.name for c in parquet.schema(path) if parquet.is_bounded(c.type) and not _is_bytes(c)]
        by = [column for column in NAMES if column in columns]
        if not by:
            return []
        wanted = {column: pa.scalar(name if column == "key" else name.lower(), pa.string()) for column in by}
        table = parquet.read(
            path, columns, lambda batch: reduce(pc.or_kleene, (pc.equal(batch[c], wanted[c]) for c in by))
        )
    except DataError as error:
        raise DataError(f"{error}; `capfilt verify` tells what else does not hold.") from error
    return [{name: _plain(value) for name, value in row.items()} for row in table.slice(0, MAX_TEXTS).to_pylist()]


def _plain(value: Any) -> Any:
    """A value as JSON can hold it: times, decimals and bytes become text."""
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    return value if value is None or isinstance(value, str | int | float) else str(value)


def _is_bytes(column: pa.Field) -> bool:
    return column.name in _IMAGE_COLUMNS or pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type)


def _add_scores(home: StoragePath, shard: str, rows: list[dict[str, Any]]) -> None:
    """Put the further scores of an image's texts, which lie in tables of their own, into its rows."""
    if not scores.names(home):
        return
    table = scores.join_all(tables.read(home / "annotations" / f"{shard}.parquet"), home, shard)
    names = ("source", "candidate", *scores.further(table.column_names))
    texts = table.filter(pc.equal(table["key"], rows[0]["key"])).select(names).to_pylist()
    by_text = {(text.pop("source"), text.pop("candidate")): text for text in texts}
    for row in rows:
        row.update(by_text.get((row["source"], row["candidate"]), {}))


def lines(result: dict[str, Any]) -> Iterator[str]:
    """The result of `run` as lines for a person."""
    for record in result["found"]:
        yield f"{record['folder']}  shard {record['shard']}  ({record['stage']}: {record['table']})"
        if not are_texts(record["rows"]):
            yield from (
                f"  {name}: {value}" for row in record["rows"] for name, value in row.items() if value not in (None, "")
            )
            continue
        first = record["rows"][0]
        yield "  " + "  ".join(f"{name} {first[name] or '-'}" for name in (*NAMES, "round"))
        for row in record["rows"]:
            yield from _text_lines(row, result["models"])
    if "heatmap" in result:
        yield f"heatmap: {result['heatmap']}"


def _text_lines(row: dict[str, Any], models: dict[str, str]) -> Iterator[str]:
    """One text of the image: its source, verdict, scores and models."""
    if row["status"] == "failed":
        yield f"  failed: {row['reason']}"
        return
    given = [score for score in ("itm", "itc", *scores.further(row)) if row[score] is not None]
    shown = "  ".join(f"{score} {row[score]:.4f}" for score in given)
    verdict = row.get("verdict", "no verdict yet")
    yield f"  {row['source']} {row['candidate']}  {verdict}{': ' + row['why'] if row.get('why') else ''}  {shown}"
    more = f"… ({len(row['text'])} characters)" if len(row["text"]) > MAX_SHOWN else ""
    yield f"      {row['text'][:MAX_SHOWN]!r}{more}"
    if row["reason"]:
        yield f"      {row['reason']}"
    for role, verb in (("captioner", "written"), ("filter", "scored")):
        if model := row[role]:
            by = models.get(model) or f"a model of {model.rpartition('-')[0][:20] or 'a family'} from elsewhere"
            prompt = f", prompt {row['prompt']}" if role == "captioner" and row.get("prompt") else ""
            yield f"      {verb} by {by} ({model[:20]}…), seed {row['seed']}{prompt}"


def are_texts(rows: list[dict[str, Any]]) -> bool:
    """Whether the rows of a table are texts of an image, with scores and models."""
    return {"source", "candidate", "text", "itm", "itc", "captioner", "filter", "status"} <= rows[0].keys()
