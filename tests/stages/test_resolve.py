from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import capfilt.data.annotations as tables
from capfilt.cluster.session import connect
from capfilt.cluster.worker_pool import Resources
from capfilt.data.policy import PolicyConfig, Pool
from capfilt.data.policy.pool import count_values
from capfilt.runs.progress import Progress
from capfilt.stages import resolve

QUIET = Progress(quiet=True)
POLICY = PolicyConfig(threshold="keep-rate", keep_rate=0.3)


def test_a_share_is_found_once_and_again_for_other_annotations(
    run_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    annotations = run_copy / "round-1/annotations"
    names = tables.shards_in(annotations)
    with connect("local") as session:

        def found() -> resolve.Resolved:
            return resolve.resolve_once(session, POLICY, Pool(annotations, names), None, tmp_path, Resources(), QUIET)

        first = found()
        with monkeypatch.context() as patch:
            patch.setattr(resolve, "resolve", None)
            assert found() == first
        (tmp_path / "ledger/select.rule.json").write_text("{}")
        with pytest.raises(resolve.RunError, match="remove it, and it is found again"):
            found()
        (tmp_path / "ledger/select.rule.json").unlink()
        rows = list(tables.rows(tables.read(annotations / f"{names[0]}.parquet")))
        tables.write(annotations / f"{names[0]}.parquet", rows[: len(rows) // 2])
        assert found() != first


def test_workers_count_what_one_process_counts(run_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolve, "BLOCK", 2)
    annotations = run_copy / "round-1/annotations"
    pool = Pool(annotations, tables.shards_in(annotations), ("web",))
    with connect("local") as session:
        for of in ("texts", "images"):
            wanted = count_values(pool, "itm", (), of, (-1.0, 1.0))
            spread = resolve._count_on_workers(session, Resources(), QUIET, pool, "itm", (), of, (-1.0, 1.0))
            assert wanted.total
            assert np.array_equal(spread.counts, wanted.counts)
