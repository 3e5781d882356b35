"""`capfilt download` on a run folder that is there: what failed, what is too little, what is a placeholder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from capfilt.data import shards
from capfilt.data.sample import Sample
from capfilt.pipelines.download import check_kinds

# ---- trying again, and what counts as success ----


def test_what_failed_is_tried_again_into_new_shards(hostile: Any, fetch: Any, tmp_path: Path) -> None:
    urls = [hostile.url(path) for path in ("/ok", "/later/500?seed=1", "/later/404?seed=2", "/status/410")]
    done = fetch(urls, "--shard-size", "2")
    assert json.loads(done.out)["failed"] == {"http-500": 1, "http-404": 1, "http-410": 1}
    first = (tmp_path / "out/00000.tar").read_bytes()
    hostile.healed = True
    again = fetch(urls, "--shard-size", "2", "--retry", "http-500")
    assert again.code == 0, again.err
    assert json.loads(again.out)["failed"] == {"http-404": 1, "http-410": 1}
    again = fetch(urls, "--shard-size", "2", "--retry", "failed")
    answer = json.loads(again.out)
    assert answer["samples"] == {"in": 4, "kept": 3, "failed": 1}
    assert answer["failed"] == {"http-410": 1}
    out = tmp_path / "out"
    assert (out / "00000.tar").read_bytes() == first
    sizes = json.loads((out / "sizes.json").read_text())
    assert sizes == {"00000.tar": 1, "00001.tar": 0, "00002.tar": 1, "00003.tar": 1}
    samples = [item for tar in shards.expand(str(out)) for item in shards.read(tar)]
    assert [item.text for item in samples if isinstance(item, Sample)] == ["text 0", "text 1", "text 2"]
    assert hostile.paths().count("/ok") == 1
    assert hostile.paths().count("/status/410") == 2
    # And without the word nothing is tried again.
    assert json.loads(fetch(urls, "--shard-size", "2").out)["samples"] == answer["samples"]
    assert hostile.paths().count("/status/410") == 2


def test_a_retry_that_was_interrupted_is_continued_and_not_begun_anew(hostile: Any, fetch: Any, tmp_path: Path) -> None:
    urls = [hostile.url("/ok"), hostile.url("/later/500")]
    fetch(urls)
    hostile.healed = True
    assert fetch(urls, "--retry", "failed").code == 0
    out = tmp_path / "out"
    for path in (out / "ledger/download/00001.json", out / "00001.tar", out / "00001.parquet"):
        path.unlink()
    answer = json.loads(fetch(urls, "--retry", "failed").out)
    assert answer["samples"] == {"in": 2, "kept": 2, "failed": 0}
    assert not (out / "00002.tar").exists()
    done = fetch(urls, "--retry", "failed")
    assert json.loads(done.out)["samples"] == answer["samples"]
    assert len(list((out / "plan").glob("pass-*.json"))) == 2, "nothing failed, so there is no third"


def test_a_fork_with_a_longer_list_takes_over_what_came(hostile: Any, fetch: Any, tmp_path: Path) -> None:
    urls = [hostile.url(f"/ok?seed={i}") for i in range(3)]
    assert fetch(urls[:2], "--shard-size", "2").code == 0
    refused = fetch(urls, "--shard-size", "2")
    assert refused.code == 1
    assert "--fork NEW_OUT begins a new run" in refused.err
    new = tmp_path / "new"
    done = fetch(urls, "--shard-size", "2", "--fork", new)
    assert done.code == 0, done.err
    assert json.loads((new / "sizes.json").read_text()) == {"00000.tar": 2, "00001.tar": 1}
    assert len(hostile.paths()) == len(set(hostile.paths())), "nothing was fetched twice"
    assert (new / "00000.tar").read_bytes() == (tmp_path / "out/00000.tar").read_bytes()


def test_a_row_with_two_outcomes_is_said(hostile: Any, fetch: Any, tmp_path: Path) -> None:
    urls = [hostile.url("/later/500")]
    fetch(urls)
    hostile.healed = True
    assert fetch(urls, "--retry", "failed").code == 0
    (tmp_path / "out/00000.tar").unlink()
    done = fetch(urls)
    assert done.code == 1
    assert "1 rows in, but 2 kept + -1 failed. A shard was fetched again" in done.line


def test_a_retry_of_what_is_no_kind_is_refused(fetch: Any, tmp_path: Path) -> None:
    done = fetch(["http://127.0.0.1:9/"], "--retry", "timeouts")
    assert done.code == 2
    assert "--retry timeouts: allowed are failed, " in done.line
    assert "Did you mean 'timeout'?" in done.line
    assert not (tmp_path / "out").exists()
    check_kinds(["failed", "dns", "http-451"])


def test_too_little_success_is_exit_one_with_the_result_all_the_same(hostile: Any, fetch: Any) -> None:
    urls = [hostile.url("/ok"), hostile.url("/status/404")]
    assert fetch(urls, "--min-success", "0.5").code == 0
    done = fetch(urls, "--min-success", "0.51")
    assert done.code == 1
    assert "came (50.00%, and --min-success asks for 51.00%)" in done.line
    assert json.loads(done.out)["failed"] == {"http-404": 1}


def test_a_list_of_which_nothing_comes_is_exit_one_with_the_commonest_reason(hostile: Any, fetch: Any) -> None:
    urls = [hostile.url("/status/404?a"), hostile.url("/status/404?b"), hostile.url("/status/500")]
    for _ in range(2):
        done = fetch(urls)
        assert done.code == 1
        assert done.line.startswith("error: download: 0 of 3 pictures came; 2 failed by: http-404. What came stays.")
        answer = json.loads(done.out)
        assert (answer["enough"], answer["samples"]) == (False, {"in": 3, "kept": 0, "failed": 3})


def test_rows_that_are_none_are_counted(hostile: Any, fetch: Any, tmp_path: Path) -> None:
    path = tmp_path / "list.csv"
    path.write_text(f"url,text\n{hostile.url('/ok')},a\nhttp://h/,b,c,d\n")
    answer = json.loads(fetch(path).out)
    assert answer["samples"] == {"in": 2, "kept": 1, "failed": 1}
    assert answer["failed"] == {"unreadable-row": 1}


# ---- placeholders ----


def test_placeholders_are_reported_and_dropped_when_asked(hostile: Any, fetch: Any, tmp_path: Path) -> None:
    urls = [hostile.url(f"/ok?seed={i if i % 2 else 0}&n={i}") for i in range(8)]
    answer = json.loads(fetch(urls, "--shard-size", "3").out)
    [(digest, count)] = answer["repeated"].items()
    assert count == 4
    assert answer["samples"]["kept"] == 8
    assert json.loads(fetch(urls, "--shard-size", "3", "--drop-placeholders", "5").out)["samples"]["kept"] == 8
    answer = json.loads(fetch(urls, "--shard-size", "3", "--drop-placeholders", "4").out)
    assert answer["samples"] == {"in": 8, "kept": 4, "failed": 4}
    assert answer["failed"] == {"placeholder": 4}
    assert answer["repeated"] == {digest: 4}
    out = tmp_path / "out"
    assert json.loads((out / "sizes.json").read_text()) == {"00000.tar": 1, "00001.tar": 2, "00002.tar": 1}
    kept = [item for tar in shards.expand(str(out)) for item in shards.read(tar)]
    assert {item.sha256 for item in kept if isinstance(item, Sample)}.isdisjoint({digest})
    requested = len(hostile.seen)
    again = json.loads(fetch(urls, "--shard-size", "3", "--drop-placeholders", "4", "--retry", "failed").out)
    assert (again["samples"], len(hostile.seen)) == (answer["samples"], requested), (
        "they did come: no reason to ask again"
    )
