"""pack: data of any source into shards of tars, in a run folder of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from capfilt import config as configs
from capfilt.config import Config
from capfilt.data import shards
from capfilt.runs.run import Run
from capfilt.stages.pack import STAGE, pack
from capfilt.stages.runner import check_success
from capfilt.stages.workload import Place, of_shards


def run(place: Place, specs: Sequence[str]) -> dict[str, Any]:
    """The verb: returns where the tars are, and what became of every key.

    ShortfallError where no sample, or too few, could be read.
    """
    urls = shards.expand(specs)
    shards.by_name(urls)  # refuses one that is given twice
    named = {f"{number:05d}": url for number, url in enumerate(urls)}
    names = {url: name for name, url in named.items()}
    run = Run.open(place.out, configs.to_yaml(Config()), {"verb": STAGE, "shards": urls, "names": names})
    with place.connect(STAGE, of_shards(urls)) as (session, worker):
        tally = pack(session, named, place.out, worker, place.show)
    record = {"command": STAGE, "shards": str(place.out), **tally.to_json()}
    run.write_summary(record)
    check_success(STAGE, tally, place.options.min_success, record)
    return record
