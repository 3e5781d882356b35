"""export of data: a run of `select` or `annotate`, a round of a bootstrap, or shards, as other tools read them.

What data are is seen by what the folder holds: `dataset/` is a selection, whose kept texts leave; `annotations/` alone
are all texts with their scores, whose pictures lie in the shards that the run's plan names.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from capfilt import config as configs
from capfilt.cluster.session import Session
from capfilt.data import labels, shards
from capfilt.data.exports.forms import FORMS
from capfilt.errors import FolderError, NoShardError, ShortfallError, UsageError, did_you_mean
from capfilt.pipelines.select import check_annotations
from capfilt.runs.ledger import Ledger
from capfilt.runs.progress import Progress
from capfilt.runs.run import Run, verb_of
from capfilt.runs.tally import Tally
from capfilt.stages import export as stage
from capfilt.stages import inputs
from capfilt.stages.count_pairs import count_images
from capfilt.stages.export import ExportConfig, ExportJob, Piece
from capfilt.stages.runner import check_success, run_stage
from capfilt.stages.workload import Place, of_shards
from capfilt.storage.paths import StoragePath, storage_path


@dataclass(frozen=True)
class Source:
    """Where data lie."""

    urls: dict[str, str]
    """Shards by their names in the records of their run."""
    annotations: StoragePath | None = None
    """Of texts that are not in the shards."""
    verdicts: StoragePath | None = None
    ledger: Ledger | None = None
    """Which counted them."""
    column: Literal["in", "kept"] = "in"
    """What it calls them."""

    def tallies(self) -> dict[str, Tally]:
        """What the ledger has of each shard; {} where there is none."""
        done = () if self.ledger is None else self.ledger.completions()
        return {each.shard: each.tally for each in done if self.column == "kept" or each.shard in self.urls}


def run(place: Place, data: str, config: ExportConfig, fetch: bool) -> dict[str, Any]:
    """The verb: write data in a format; returns the files and the counts.

    `fetch`: whether shards may be read that the plan of a run names elsewhere.

    Raises:
        UsageError: there are no data, or options that the format does not take.
        FolderError: a folder that holds several rounds, or a selection that has not ended.
        RunError: other counts than those of the run that the data come from.
        ShortfallError: nothing could be written, or a smaller share than `min_success`.
    """
    out, show = place.out, place.show
    check_config(config)
    source = find(data, fetch)
    config = _with_root(config, out)
    urls = list(source.urls.values())
    plan = {"verb": stage.STAGE, **config.model_dump(mode="json"), "data": data, "shards": urls}
    opened = Run.open(out, configs.to_yaml(config), plan)
    begun = time.monotonic()
    with place.connect(stage.STAGE, of_shards(urls)) as (session, worker):
        pieces = _pieces(session, config, source, out, show)
        total = pieces[-1].first + pieces[-1].files
        job = ExportJob(
            out=out.absolute(), config=config, total=total, annotations=source.annotations, verdicts=source.verdicts,
            names=shards.renamed(source.urls),
        )  # fmt: skip
        items = {piece.name: json.dumps(piece) for piece in pieces}
        tally = run_stage(session, job, items, worker, show, stage.STAGE)
    if source.ledger is not None:
        stage.check_counts(tally, sum(source.tallies().values(), Tally.zero()), source.ledger.folder, source.column)
    with show.wait("putting the parts together"):
        made = FORMS[config.form].finish(out, stage.finished(out, pieces), tally.samples["kept"])
    result = {"out": str(out), "as": config.form, "written": [str(path) for path in made or (out,)], **tally.to_json()}
    opened.write_summary(result)
    opened.log("end", samples=result["samples"], seconds=time.monotonic() - begun)
    check_success(stage.STAGE, tally, place.options.min_success, result)
    if not tally.samples["kept"]:
        raise ShortfallError(f"export: no picture of {data} has a text, which {config.form} is made of.", result)
    return result


def check_config(config: ExportConfig) -> None:
    """Refuse a format that is none, and options that it does not take. UsageError."""
    if config.form not in FORMS:
        near = did_you_mean(config.form, FORMS)
        raise UsageError(f"{config.form!r} is no format of data: there is {', '.join(FORMS)}.{near}")
    if config.samples_per_shard and not FORMS[config.form].resharded:
        able = ", ".join(name for name, form in FORMS.items() if form.resharded)
        raise UsageError(f"--samples-per-shard is for {able}; {config.form} has as many files as there are shards.")
    if config.image_root is not None and config.form not in ROOTED:
        raise UsageError(f"--image-root is for {', '.join(ROOTED)}, whose readers open paths as they stand.")


ROOTED = ("blip-json", "open-clip-csv")
"""Formats whose readers open the paths of pictures as they stand."""


def _with_root(config: ExportConfig, out: StoragePath) -> ExportConfig:
    """The config with the path that stands before those of pictures; by default the folder's own."""
    if config.form not in ROOTED:
        return config
    root = config.image_root
    if root is None:
        root = str(out.absolute()) if isinstance(out, Path) else ""
    return config.model_copy(update={"image_root": f"{root.rstrip('/')}/" if root else ""})


def find(data: str, fetch: bool) -> Source:
    """What the shards and texts of data are. Errors as in `run`."""
    folder = None if {*data} & {*"{*?["} or "::" in data else storage_path(data)
    if folder is not None and (folder / "dataset").is_dir():
        return _selected(folder)
    if folder is not None and (folder / "annotations").is_dir():
        return _annotated(folder, fetch)
    if isinstance(folder, Path) and (rounds := sorted(folder.glob("round-*/annotations"))):
        newest = max((path.parent for path in rounds), key=lambda path: (len(path.name), path.name))
        raise FolderError(f"{data} is the run folder of a bootstrap, with data of each round: give {newest}.")
    try:
        return Source(shards.by_name(shards.expand(data)))
    except NoShardError as error:
        of = f"a run of `capfilt {verb}`" if folder is not None and (verb := verb_of(folder)) else "no data"
        raise UsageError(
            f"{data} is {of}: {error}. Data are the run folder of `select` or `annotate`, a round of a bootstrap, or"
            " shards; a model leaves as hf, pth, open_clip or capfilt."
        ) from None


def _selected(folder: StoragePath) -> Source:
    """The kept texts of a selection."""
    if not (folder / "dataset" / "sizes.json").is_file():
        raise FolderError(f"the selection in {folder} has not ended: run its command again, then export it.")
    try:
        urls = shards.by_name(shards.expand(str(folder / "dataset")))
    except NoShardError:
        raise FolderError(f"the selection in {folder} kept nothing; there is nothing to export.") from None
    return Source(urls, None, folder / "dataset", Ledger(folder, "select"), "kept")


def _annotated(folder: StoragePath, fetch: bool) -> Source:
    """All texts of annotated shards."""
    home = labels.run_folder_of(folder)
    run = Run.load(home)
    specs = inputs.input_shards(home, run.plan)
    inputs.check_reachable(home, specs, fetch)
    urls = inputs.annotated_urls_by_name(folder, shards.expand(specs))
    check_annotations(urls, folder / "annotations")
    return Source(urls, (folder / "annotations").absolute(), None, Ledger(folder, "annotate"))


def _pieces(session: Session, config: ExportConfig, source: Source, out: StoragePath, show: Progress) -> list[Piece]:
    """The parts of an export; shards whose samples no ledger has counted are read to count them where that matters."""
    urls = list(source.urls.values())
    counts: Mapping[str, int] = {}
    if config.samples_per_shard:
        known = {name: tally.samples[source.column] for name, tally in source.tallies().items()}
        counts = {url: known[name] for name, url in source.urls.items() if name in known}
        if missing := [url for url in urls if url not in counts]:
            counts |= count_images(session, missing, out, show)
    return stage.pieces(urls, counts, config.samples_per_shard)
