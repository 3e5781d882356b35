"""The verbs as functions: the same results as the command line, and a caller's process that stays the caller's."""

from __future__ import annotations

import http.server
import json
import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import capfilt
from capfilt.runs.locking import lock
from capfilt.runs.locking.lock_file import find_lock

QUICK = {"decode.max_length": 12, "decode.min_length": 3}


@pytest.fixture(scope="module")
def models(finished_run: Path) -> dict[str, str]:
    return {"captioner": str(finished_run / "round-1/captioner"), "filter": str(finished_run / "round-1/filter")}


@pytest.fixture(scope="module")
def annotated(finished_run: Path, models: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Any:
    out = tmp_path_factory.mktemp("annotated") / "run"
    return capfilt.annotate(finished_run / "data/web", **models, out=out, captions=2, settings=QUICK, seed=7)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class TestTheCommandLineDoesTheSame:
    def test_annotate(
        self, finished_run: Path, models: dict[str, str], annotated: Any, tmp_path: Path, capfilt: Any
    ) -> None:
        roles = ("--captioner", models["captioner"], "--filter", models["filter"])
        sets = [word for key, value in QUICK.items() for word in ("--set", f"{key}={value}")]
        words = ("--out", tmp_path / "run", "--captions", "2", "--seed", "7", *sets, "--json")
        done = capfilt("annotate", finished_run / "data/web", *roles, *words)
        assert files(tmp_path / "run/annotations") == files(annotated.annotations)
        printed = json.loads(done.out)
        assert printed.pop("annotations") == str(tmp_path / "run/annotations")
        assert printed.pop("usage").keys() == annotated.record["usage"].keys() == {"annotate"}
        assert printed == {
            key: annotated.record[key] for key in annotated.record if key not in ("annotations", "usage")
        }

    def test_select(self, finished_run: Path, annotated: Any, tmp_path: Path, capfilt: Any) -> None:
        import capfilt as library

        cleaned = library.select(
            [finished_run / "data/web"], annotations=annotated, out=tmp_path / "a", settings={"threshold": 0.1}
        )
        words = ("--annotations", annotated.out, "--out", tmp_path / "b", "--set", "threshold=0.1", "--json")
        done = capfilt("select", finished_run / "data/web", *words)
        printed = json.loads(done.out)
        assert files(tmp_path / "b/dataset") == files(cleaned.dataset)
        assert (printed["samples"], printed["threshold"]) == (cleaned.record["samples"], cleaned.threshold)

    def test_a_resumed_bootstrap(self, finished_run: Path, run_copy: Path, capfilt: Any) -> None:
        import capfilt as library

        result = library.bootstrap(finished_run.parent / "mine.yaml", out=run_copy)
        assert result.record == json.loads(
            capfilt("bootstrap", finished_run.parent / "mine.yaml", "--out", run_copy, "--json").out
        )
        assert [done.number for done in result.rounds] == [0, 1]
        assert result.rounds[0].models.keys() == {"pretrain"}
        assert result.rounds[1].models.keys() == {"captioner", "filter", "pretrain"}
        assert result.rounds[1].figures["samples_in"] == 60
        ((number, rows),) = result.rows()
        assert number == 1
        assert Counter(row.source for row in rows) == {"web": 60, "synthetic": 60}

    @pytest.mark.parametrize("verb", ["status", "verify"])
    def test_verbs_that_read_a_run(self, verb: str, finished_run: Path, capfilt: Any) -> None:
        import capfilt as library

        assert getattr(library, verb)(finished_run).record == json.loads(capfilt(verb, finished_run, "--json").out)

    def test_show(self, capfilt: Any) -> None:
        import capfilt as library

        result = library.show("demo", settings={"seed": 3})
        assert result.yaml == capfilt("show", "demo", "--set", "seed=3").out
        assert result.settings["seed"] == 3


class TestResults:
    def test_the_counts_balance_and_the_rows_are_there(self, annotated: Any) -> None:
        assert annotated.samples == capfilt.Counts(num_in=60, kept=60, dropped=0, failed=0)
        rows = list(annotated.rows())
        assert Counter(row.source for row in rows) == {"web": 60, "synthetic": 120}
        assert annotated.texts.num_in == {"web": 60, "synthetic": 120}

    def test_what_was_kept_has_its_texts(self, finished_run: Path, annotated: Any, tmp_path: Path) -> None:
        policy = {"threshold": "keep-rate", "keep_rate": 0.3}
        cleaned = capfilt.select(
            finished_run / "data/web", annotations=annotated, out=tmp_path / "run", settings=policy
        )
        kept = list(cleaned.kept())
        assert len(kept) == cleaned.samples.kept
        assert sum(len(sample.captions) for sample in kept) == sum(cleaned.texts.kept.values())
        kept_rows = [row for row in cleaned.rows().verdicts() if row.verdict == "kept"]
        assert len(kept_rows) == sum(cleaned.texts.kept.values())
        assert all(row.annotation.itm >= cleaned.threshold for row in kept_rows)

    def test_damage_is_named_and_mended(self, run_copy: Path) -> None:
        tar = next((run_copy / "round-1/dataset").glob("*.tar"))
        tar.write_bytes(tar.read_bytes()[:-1] + b"x")
        result = capfilt.verify(run_copy)
        assert not result.ok
        (damage,) = result.rows()
        assert (damage.stage, damage.folder, damage.shard) == ("select", "round-1", tar.stem)
        assert capfilt.verify(run_copy, mend=True).withdrawn == 1
        assert capfilt.verify(run_copy).undone == 1

    def test_one_image_is_explained(self, finished_run: Path) -> None:
        key = next(iter(capfilt.read_annotations(finished_run / "round-1"))).key
        result = capfilt.explain(finished_run, key)
        assert {row["source"] for row in result.rows() if "source" in row} == {"web", "synthetic"}
        assert any("shard" in line for line in result.lines())

    def test_a_run_is_watched_to_its_end(self, finished_run: Path) -> None:
        (status,) = capfilt.watch(finished_run)
        assert status.done
        assert {stage.stage for stage in status.stages} >= {"annotate", "select", "pretrain"}


class TestErrors:
    def test_too_few_successes_carry_the_result(
        self, tmp_path: Path, models: dict[str, str], hostile_shard: Path
    ) -> None:
        with pytest.raises(capfilt.ShortfallError, match="0 of 1 samples succeeded") as caught:
            capfilt.annotate(hostile_shard, **models, out=tmp_path / "run")
        assert caught.value.result is not None
        assert caught.value.result["failed"] == {"not an image": 1}

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"decode.metod": "beam"}, "unknown key 'decode.metod'. Did you mean 'method'?"),
            ({"batch_size": object()}, "settings: 'batch_size' is a object: a object cannot be written"),
            ("batch_size=3", "settings is the text 'batch_size=3'; give a mapping"),
        ],
    )
    def test_settings_that_cannot_be(self, settings: Any, message: str, tmp_path: Path, models: dict[str, str]) -> None:
        with pytest.raises(capfilt.CapfiltError) as caught:
            capfilt.annotate("shards", **models, out=tmp_path / "run", settings=settings)
        assert message in str(caught.value)

    def test_numbers_that_cannot_be(self, tmp_path: Path, models: dict[str, str]) -> None:
        with pytest.raises(capfilt.RecipeError, match="'workers' is -1"):
            capfilt.annotate("shards", **models, out=tmp_path / "run", workers=-1)


@pytest.fixture
def hostile_shard(tmp_path: Path) -> Path:
    from capfilt.data import shards
    from capfilt.data.sample import Sample

    shards.write(tmp_path / "bad/00000.tar", [Sample("a", b"GIF of nothing", "jpg", "a text", {})])
    return tmp_path / "bad"


class TestCallbacks:
    def test_each_step_is_an_event(self, finished_run: Path, models: dict[str, str], tmp_path: Path) -> None:
        events: list[capfilt.ProgressEvent] = []
        call = {"out": tmp_path / "run", "settings": QUICK, "on_progress": events.append, **models}
        tars = sorted((finished_run / "data/web").glob("*.tar"))
        capfilt.annotate(tars, **call)
        assert {event.stage for event in events} == {"annotate"}
        assert sorted({event.done for event in events}) == [0, 1, 2, 3]
        assert events[1].note == "waiting for the captioner and the filter to load"
        assert [event.samples.get("in", 0) for event in events if not event.ended] == [0, 0, 20, 40, 60]
        counts = {"in": 60, "kept": 60}
        assert events[-1] == capfilt.ProgressEvent("annotate", 3, 3, ended=True, unit="shards", samples=counts)
        assert (events[-1].samples_per_second or 0) > 0
        assert events[-1].samples_per_second == pytest.approx(20 * (events[-1].per_second or 0))
        events.clear()
        capfilt.annotate(tars, **call)
        assert events[-1] == capfilt.ProgressEvent("annotate", 3, 3, 3, "resumed", True, "shards", counts)
        assert (events[-1].samples_per_second, events[-1].seconds_left) == (None, None), "nothing was done"

    def test_what_a_callback_raises_ends_the_call_and_the_next_goes_on(
        self, finished_run: Path, models: dict[str, str], annotated: Any, tmp_path: Path
    ) -> None:
        def stop(event: capfilt.ProgressEvent) -> None:
            if event.done == 1:
                raise InterruptedError

        call = {**models, "out": tmp_path / "run", "captions": 2, "settings": QUICK, "seed": 7}
        with pytest.raises(InterruptedError):
            capfilt.annotate(finished_run / "data/web", **call, on_progress=stop)
        assert find_lock(tmp_path / "run") is None
        events: list[capfilt.ProgressEvent] = []
        again = capfilt.annotate(finished_run / "data/web", **call, on_progress=events.append)
        assert events[-1].resumed == 1
        assert files(again.annotations) == files(annotated.annotations)


class TestTheProcessIsTheCallers:
    def test_without_an_address_no_ray_is_started(self, annotated: Any) -> None:
        from capfilt.cluster.session import current_address

        if "ray" in sys.modules:
            pytest.skip("another test of this process has imported Ray")
        assert current_address() == "local"

    def test_random_draws_go_on_as_if_nothing_had_happened(self, finished_run: Path, tmp_path: Path) -> None:
        recipe = tmp_path / "pretrain.yaml"
        mine = capfilt.show(finished_run.parent / "mine.yaml").settings
        recipe.write_text(
            json.dumps({"model": mine["model"], "data": str(finished_run / "data/human"), "train": mine["pretrain"]})
        )
        torch.manual_seed(3)
        before = torch.rand(3)
        torch.manual_seed(3)
        trained = capfilt.pretrain(recipe, out=tmp_path / "run", settings={"train.steps": 1})
        assert torch.equal(torch.rand(3), before)
        assert [line["step"] for line in trained.rows()] == [1]

    def test_two_threads_have_their_own_locks(self, run_copy: Path, tmp_path: Path) -> None:
        """A call that ends lets go of its own run folder, and of no other's."""
        inside, leave = threading.Event(), threading.Event()

        def wait() -> None:
            with lock.driving():
                lock.acquire_once(tmp_path)
                inside.set()
                leave.wait(60)

        thread = threading.Thread(target=wait)
        thread.start()
        try:
            assert inside.wait(60)
            capfilt.verify(run_copy, mend=True)
            assert find_lock(run_copy) is None
            assert find_lock(tmp_path) is not None
            with pytest.raises(capfilt.RunError, match="is in use by process"), lock.driving():
                lock.acquire_once(tmp_path)
        finally:
            leave.set()
            thread.join()
        assert find_lock(tmp_path) is None

    @pytest.mark.slow
    def test_the_callers_ray_is_used_and_left_running(
        self, finished_run: Path, models: dict[str, str], tmp_path: Path
    ) -> None:
        web = str(finished_run / "data/web")
        code = f"""
import time, ray, capfilt
ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
done = capfilt.annotate({web!r}, **{models!r}, out={str(tmp_path / "run")!r}, settings={QUICK!r})
assert done.samples.kept == 60
assert ray.is_initialized()
assert ray.get(ray.remote(lambda: 3).remote()) == 3
until = time.monotonic() + 60
while (free := ray.available_resources().get("CPU")) != 2 and time.monotonic() < until:
    time.sleep(0.1)
print(free)
"""
        environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        assert done.stdout.split()[-1] == "2.0", "no worker of ours is left"


# ---- download ----


class _Pictures(http.server.BaseHTTPRequestHandler):
    picture = b""

    def do_GET(self) -> None:
        there = self.path != "/robots.txt" and "gone" not in self.path
        self.send_response(200 if there else 404)
        self.send_header("Content-Length", str(len(self.picture) if there else 0))
        self.end_headers()
        if there:
            self.wfile.write(self.picture)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def server(picture: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(_Pictures, "picture", picture("PNG"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Pictures) as served:
        threading.Thread(target=served.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{served.server_port}"
        served.shutdown()


def test_download(server: str, url_list: Any, tmp_path: Path) -> None:
    urls = url_list(tmp_path, [f"{server}/{name}.png" for name in ("a", "b", "gone")])
    settings = {"limits.allow_private": ["127.0.0.0/8"], "manners.host_rate": 0, "thread_count": 4, "image_size": 16}
    result = capfilt.download(urls, out=tmp_path / "shards", caption_col="text", settings=settings)
    assert result.samples == capfilt.Counts(num_in=3, kept=2, dropped=0, failed=1)
    assert result.failed == {"http-404": 1}
    assert [sample.text for sample in result.rows()] == ["text 0", "text 1"]
    assert list(result.repeated.values()) == [2]
