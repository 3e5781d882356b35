"""Readers: annotations as rows or Arrow tables, shards as samples, one shard in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from capfilt.api.arguments import Location, Specs, location, names_of
from capfilt.errors import DataError, ShardError

if TYPE_CHECKING:
    import pyarrow as pa

    from capfilt.data.annotations import Annotation
    from capfilt.data.sample import FailedSample, Sample
    from capfilt.storage.paths import StoragePath

OnFailed = Callable[["FailedSample"], object]
"""Called with each input of a shard that cannot be read: its key and the reason."""


@dataclass(frozen=True)
class Verdict:
    """An annotation with the verdict of a policy."""

    annotation: Annotation
    verdict: str
    """kept | dropped | failed"""
    why: str
    """The reason; "" for a kept text."""


@dataclass(frozen=True)
class Annotations:
    """Annotations of one or more shards, to be walked more than once; a table is read when its turn comes."""

    files: tuple[StoragePath, ...]
    """One Parquet a shard, sorted by name."""

    def __iter__(self) -> Iterator[Annotation]:
        """Every annotation: sorted by key, source and candidate within a shard."""
        from capfilt.data import annotations

        for table in self.tables():
            yield from annotations.rows(table)

    def verdicts(self) -> Iterator[Verdict]:
        """Every annotation with its verdict.

        Raises:
            DataError: these are annotations without verdicts, as `annotate` writes them.
        """
        from capfilt.data import annotations

        for path, table in zip(self.files, self.tables(), strict=True):
            if "verdict" not in table.column_names:
                raise DataError(f"{path} has no verdicts: it is what `annotate` wrote; read what `select` wrote.")
            verdicts = zip(table["verdict"].to_pylist(), table["why"].to_pylist(), strict=True)
            for row, (verdict, why) in zip(annotations.rows(table), verdicts, strict=True):
                yield Verdict(row, verdict, why)

    def tables(self) -> Iterator[pa.Table]:
        """Each shard's annotations as an Arrow table, with a column `prompt` where the captioner names its prompts, one
        for each further score that there is (of what `select` wrote, those that its policy read), and `verdict` and
        `why` where `select` wrote it.

        Raises:
            DataError: a file that is no table of annotations, or too large; a further score of other annotations.
        """
        from capfilt.data import annotations, parquet, scores
        from capfilt.stages.select import read_verdicts

        for path in self.files:
            if "verdict" in parquet.schema(path).names:
                yield read_verdicts(path)
                continue
            table, is_run = annotations.read(path), path.parent.name == "annotations"
            yield scores.join_all(table, path.parent.parent, path.stem) if is_run else table

    def to_arrow(self) -> pa.Table:
        """All of it as one Arrow table, in memory; `.to_pandas()` goes on from there."""
        import pyarrow as pa

        return pa.concat_tables(self.tables())


def read_annotations(source: Location) -> Annotations:
    """Read annotations: every text of every image, with its scores; those beside itm and itc are in `row.scores`.

    Args:
        source: a Parquet file; a folder of them (`annotations/` or `dataset/`); or the folder of an `annotate` or
            `select` run, or of a bootstrap's round, whose verdicts are read where there are any.

    Raises:
        DataError: nothing of the kind is there. While iterating: a file that is no table of annotations.

    Example: `texts = [row.text for row in capfilt.read_annotations("runs/a") if row.itm and row.itm > 0.9]`
    """
    from capfilt.storage.paths import listing

    where = location(source)
    if where.is_file():
        return Annotations((where,))
    for folder in (where / "dataset", where / "annotations", where):
        names = sorted(name for name in listing(folder) if name.endswith(".parquet")) if folder.is_dir() else []
        if names:
            return Annotations(tuple(folder / name for name in names))
    raise DataError(
        f"{where} holds no annotations. Give a Parquet, a folder of them, or the --out of `capfilt annotate` or"
        " `capfilt select`."
    )


def read_shards(spec: Specs, *, on_failed: OnFailed | None = None) -> Iterator[Sample]:
    """Stream the samples of shards, in the order of their tars: key, image bytes, text, captions, json, uid.

    Args:
        spec: tars, or other data (docs/shards.md), by folders, globs, braces, fsspec URLs; one or several.
        on_failed: called with each input that cannot be read, which is then skipped; by default it is raised.

    Raises:
        ShardError: `spec` names nothing; while iterating, a shard or sample that cannot be read.

    Example: `sizes = {sample.key: len(sample.image) for sample in capfilt.read_shards("shards/{000..009}.tar")}`
    """
    from capfilt.data import shards

    return _samples(shards.expand(names_of(spec)), on_failed)


def _samples(urls: list[str], on_failed: OnFailed | None) -> Iterator[Sample]:
    from capfilt.data import shards
    from capfilt.data.sample import FailedSample

    for url in urls:
        for item in shards.read(url):
            if not isinstance(item, FailedSample):
                yield item
            elif on_failed is None:
                raise ShardError(f"{url}: {item.key}: {item.reason}; give on_failed to go on without it.")
            else:
                on_failed(item)


def read_log(path: StoragePath) -> Iterator[dict[str, Any]]:
    """The lines of a log of JSON lines."""
    from capfilt.storage import documents

    return documents.read_json_lines(path)
