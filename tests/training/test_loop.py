from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from pydantic import ValidationError

from capfilt import config as configs
from capfilt import presets
from capfilt.data.loading.config import LoaderConfig, Source
from capfilt.data.loading.loader import Batch, Loader
from capfilt.data.loading.task_rows import loader_of
from capfilt.data.text.tokenizer import Tokenizer
from capfilt.errors import CapfiltError, ModelError
from capfilt.models import Blip, BlipConfig
from capfilt.models.checkpoints import store as weights
from capfilt.models.layers.vit import resize_positions
from capfilt.objectives.config import ObjectivesConfig
from capfilt.objectives.tasks.blip import BlipPretraining
from capfilt.runs.forks import FORK
from capfilt.storage.atomic import write_json
from capfilt.storage.remote_path import RemotePath
from capfilt.training import loop
from capfilt.training.checkpoints.states import States
from capfilt.training.config import ExecutionConfig, OptimizerConfig, TrainConfig
from capfilt.training.distributed.data_parallel import Gradients
from capfilt.training.job import TrainJob
from capfilt.training.log import StepLog
from capfilt.training.loop import draw, initial_model, seed_draws, train

MakeJob = Callable[..., TrainJob]


def log_of(job: TrainJob) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (job.out / "log.jsonl").read_text().splitlines()]


def weights_of(job: TrainJob) -> bytes:
    return (job.model_folder / "model.safetensors").read_bytes()


GOLDEN = {
    "itc": [
        7.47253, 4.21123, 3.79419, 3.72590, 3.66886, 3.66152, 3.68542, 3.74104, 3.84551, 3.89200,
        3.94571, 4.00377, 4.05292, 4.07850, 4.09387, 4.10181, 4.11878, 4.13230, 4.14035, 4.14308,
    ],
    "itm": [
        0.76248, 0.65426, 0.70333, 0.63476, 0.65227, 0.64846, 0.63877, 0.63804, 0.63940, 0.64584,
        0.64292, 0.63968, 0.63901, 0.63638, 0.63507, 0.63500, 0.63689, 0.63513, 0.63658, 0.63694,
    ],
    "lm": [
        5.32022, 5.26999, 5.20492, 5.15795, 5.08523, 5.03640, 4.95444, 4.88938, 4.83825, 4.80213,
        4.77502, 4.72558, 4.68190, 4.68433, 4.63901, 4.62246, 4.62169, 4.61787, 4.58635, 4.61015,
    ],
}  # fmt: skip


def test_the_golden_curve(make_job: MakeJob, tmp_path: Path) -> None:
    """Twenty steps of blip/tiny on the embedded world. Whoever changes model, losses, optimizer, world or vocabulary on
    purpose copies the curve that the failure shows."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    small = make_job(
        tmp_path,
        steps=20,
        loader=LoaderConfig(batch_size=16, max_length=24, shuffle=64),
        objectives=ObjectivesConfig(queue=48, momentum=0.9, alpha_ramp=0.5),
        optimizer=OptimizerConfig(lr=1e-3, warmup=0.1),
    )
    tiny = configs.read(presets.find("models", "blip/tiny"), BlipConfig)
    job = small.model_copy(update={"architecture": tiny})
    try:
        train(job)
    finally:
        torch.set_num_threads(threads)
    curve = {name: [line[name] for line in log_of(job)] for name in ("itc", "itm", "lm")}
    assert curve == {name: pytest.approx(values, abs=1e-4) for name, values in GOLDEN.items()}, json.dumps(curve)


class Killed(Exception):
    """Stands for the end of the process."""


def killed_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the next training die when it asks for the batch of `step`."""

    class Dying(Loader):
        def batches(self, start: int = 0) -> Iterator[Batch]:
            for now, batch in enumerate(super().batches(start), start):
                if now == step:
                    raise Killed
                yield batch

    monkeypatch.setattr(loop, "loader_of", lambda kind, *args, **options: Dying(*args, **options))


def cut_short(job: TrainJob, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train until the process dies in the fourth step."""
    with monkeypatch.context() as dying:
        killed_at(3, dying)
        with pytest.raises(Killed):
            train(job)


def fork_of(old: Path, new: Path) -> None:
    """A run folder that was forked, as `--fork` leaves it."""
    new.mkdir()
    write_json(new / "plan.json", {})
    write_json(new / FORK, {"from": str(old)})


class TestResume:
    @pytest.mark.parametrize(
        ("kills", "there"), [pytest.param([2, 4, 7], False, marks=pytest.mark.slow), ([2, 5], True)]
    )
    def test_a_killed_training_ends_with_the_same_weights(
        self,
        make_job: MakeJob,
        tmp_path: Path,
        store: RemotePath,
        monkeypatch: pytest.MonkeyPatch,
        kills: list[int],
        there: bool,
    ) -> None:
        """In a folder, and on a store."""
        whole = make_job(tmp_path / "whole", steps=8, checkpoint_every=2)
        train(whole)
        job = whole.model_copy(update={"out": (store if there else tmp_path) / "killed"})
        for step in kills:
            killed_at(step, monkeypatch)
            with pytest.raises(Killed):
                train(job)
            monkeypatch.setattr(loop, "loader_of", loader_of)
            assert (job.out / "states").exists() == (step > 1)
            assert not job.model_folder.exists()
        train(job)
        assert weights_of(job) == weights_of(whole)
        assert {path.name for path in job.out.iterdir()} == {"log.jsonl", "checkpoint", "states"}
        told = ("step", "itc", "itm", "lm", "itm_accuracy", "lr", "unreadable")
        assert [[line[n] for n in told] for line in log_of(job)] == [[line[n] for n in told] for line in log_of(whole)]

    def test_a_kill_before_the_first_state_begins_again(
        self, make_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        job = make_job(tmp_path / "a", steps=3, checkpoint_every=2)
        killed_at(1, monkeypatch)
        with pytest.raises(Killed):
            train(job)
        monkeypatch.undo()
        train(job)
        assert [line["step"] for line in log_of(job)] == [1, 2, 3]

    def test_the_state_of_another_job_is_refused(
        self, make_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        killed_at(3, monkeypatch)
        with pytest.raises(Killed):
            train(make_job(tmp_path, checkpoint_every=2))
        monkeypatch.undo()
        other = make_job(tmp_path, checkpoint_every=2, optimizer=OptimizerConfig(lr=2e-3))
        with pytest.raises(ModelError, match="belongs to another training: other pace"):
            train(other)

    @pytest.mark.slow
    def test_a_fork_goes_on_at_another_pace(
        self, make_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        cut_short(make_job(tmp_path / "old/pretrain", checkpoint_every=2), monkeypatch)
        fork_of(tmp_path / "old", tmp_path / "new")
        before = sorted((tmp_path / "old").rglob("*"))
        slower = make_job(tmp_path / "new/pretrain", checkpoint_every=2, steps=5, optimizer=OptimizerConfig(lr=1e-4))
        killed_at(4, monkeypatch)
        with pytest.raises(Killed):
            train(slower)
        monkeypatch.undo()
        assert [(line["step"], line.get("resumed")) for line in log_of(slower)] == [(3, 2), (4, None)]
        assert sorted((tmp_path / "old").rglob("*")) == before
        shutil.rmtree(tmp_path / "old/pretrain")  # what it began with is its own
        train(slower)
        assert [line["step"] for line in log_of(slower)] == [3, 4, 5]
        assert max(line["lr"] for line in log_of(slower)) <= 1e-4

    @pytest.mark.slow
    def test_a_fork_begins_anew_where_the_origin_s_states_are_of_another_training(
        self, make_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A round of a bootstrap that was killed, forked with other pairs for it; or with fewer steps than it has."""
        for changes in ({"precision": "bf16"}, {"steps": 2}):
            home = tmp_path / "-".join(changes)
            cut_short(make_job(home / "old/pretrain", checkpoint_every=2), monkeypatch)
            fork_of(home / "old", home / "new")
            other = make_job(home / "new/pretrain", **changes)
            train(other)
            assert log_of(other)[0]["step"] == 1
            assert "old/pretrain/states has no state that this training can go on from" in caplog.text
            caplog.clear()

    def test_a_fork_of_a_fork_finds_the_state_of_the_first(
        self, make_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        cut_short(make_job(tmp_path / "a/pretrain", checkpoint_every=2), monkeypatch)
        for old, new in ("ab", "bc"):
            fork_of(tmp_path / old, tmp_path / new)
        third = make_job(tmp_path / "c/pretrain", optimizer=OptimizerConfig(lr=1e-4))
        train(third)
        assert [line["step"] for line in log_of(third)] == [3, 4]


def with_objectives(job: TrainJob, **changes: Any) -> TrainConfig:
    return job.train.model_copy(update={"objectives": job.train.objectives.model_copy(update=changes)})


class TestStart:
    def test_the_seed_decides_the_fresh_weights(self, make_job: MakeJob, tmp_path: Path) -> None:
        job, words = make_job(tmp_path), len(Tokenizer.load("world"))
        one, again = (initial_model(job, words).state_dict() for _ in range(2))
        other = initial_model(job.model_copy(update={"seed": 1}), words).state_dict()
        assert all(torch.equal(one[name], again[name]) for name in one)
        assert not torch.equal(one["vision.positions"], other["vision.positions"])

    def test_a_model_folder_can_be_gone_on_from_in_one_role_and_at_another_size(
        self, make_job: MakeJob, small_blip: Callable[..., Blip], tmp_path: Path
    ) -> None:
        base = small_blip()
        weights.save(base, tmp_path / "base")
        architecture = small_blip(image_size=32, roles=("decoder",)).config
        job = make_job(tmp_path / "out", objectives=ObjectivesConfig(losses={"lm": 1.0}))
        job = job.model_copy(update={"start": tmp_path / "base", "architecture": architecture})
        model = initial_model(job, len(Tokenizer.load("world")))
        found, old = model.state_dict(), base.state_dict()
        assert torch.equal(found.pop("vision.positions"), resize_positions(old["vision.positions"], 32, 8))
        assert all(torch.equal(tensor, old[name]) for name, tensor in found.items())
        train(job)
        assert weights.load(job.model_folder).config == architecture
        assert Tokenizer.load(job.model_folder).vocab == Tokenizer.load("world").vocab

    def test_a_retrieval_fine_tuning_goes_on_as_blip_s(
        self, make_job: MakeJob, small_blip: Callable[..., Blip], tmp_path: Path
    ) -> None:
        """Momentum and queues from the pretraining, online negatives of all processes, vision blocks recomputed."""
        before = make_job(tmp_path / "before", keep_momentum=True)
        train(before)
        kept = safetensors.torch.load_file(before.model_folder / "momentum.safetensors")
        assert kept["queue_image"].shape == (16, 8)
        objectives = {"losses": {"itc": 1.0, "itm": 1.0}, "queue": 16, "itc_targets": "image"}
        objectives |= {"negatives": "all", "negatives_by": "online", "momentum_from": "start"}
        job = make_job(
            tmp_path / "filter", steps=1, recompute=1, checkpoint_every=1, objectives=ObjectivesConfig(**objectives)
        )
        filter_ = small_blip(roles=("encoder",)).config
        job = job.model_copy(update={"start": before.model_folder, "architecture": filter_})
        train(job)
        anew = job.model_copy(update={"out": tmp_path / "anew"})
        anew = anew.model_copy(update={"train": with_objectives(anew, momentum_from="model")})
        train(anew)
        # Other queues and other soft targets, and so another loss of the very first step.
        assert log_of(job)[0]["itc"] != pytest.approx(log_of(anew)[0]["itc"], abs=1e-3)
        assert weights.load(job.model_folder).capabilities == {"encode_image", "encode_text", "fuse"}

    def test_only_itc_has_a_momentum_to_keep(self, make_job: MakeJob, tmp_path: Path) -> None:
        with pytest.raises(ValidationError, match="without the objective itc there is no momentum copy"):
            make_job(tmp_path, keep_momentum=True, objectives=ObjectivesConfig(losses={"lm": 1.0}))

    def test_a_vocabulary_larger_than_the_model_s_is_refused(self, make_job: MakeJob, tmp_path: Path) -> None:
        words = len(Tokenizer.load("world"))
        with pytest.raises(ModelError, match=rf"has {words} entries, the model takes 50: set model.text.vocab_size="):
            train(make_job(tmp_path, text={"vocab_size": 50}))

    def test_a_queue_that_the_batch_does_not_divide_is_refused_at_once(self, make_job: MakeJob, tmp_path: Path) -> None:
        with pytest.raises(ValidationError, match=r"queue 20 is not a multiple of loader.batch_size 8; 16 is"):
            make_job(tmp_path, objectives=ObjectivesConfig(queue=20))
        make_job(tmp_path, objectives=ObjectivesConfig(losses={"lm": 1.0}, queue=20))  # without ITC there is no queue


class TestNotFinite:
    def test_a_loss_stops_the_training(self, make_job: MakeJob, tmp_path: Path) -> None:
        job = make_job(tmp_path, steps=6, skips=2, optimizer=OptimizerConfig(lr=1e30, warmup=0.0))
        with pytest.raises(ModelError, match=r"gradients of 3 steps in a row, up to step 4, .*lower optimizer.lr"):
            train(job)
        assert not job.model_folder.exists()
        told = json.loads((job.out / "not_finite.json").read_text())
        assert told["step"] == 4
        assert [batch["step"] for batch in told["batches"]] == [2, 3, 4]
        assert [len(batch["uids"]) for batch in told["batches"]] == [8, 8, 8]
        assert [line["skipped"] for line in log_of(job)] == [0, 1, 1]

    @pytest.mark.parametrize("losses", [{"lm": 1.0}, {"itc": 1.0, "itm": 1.0, "lm": 1.0}])
    def test_a_step_that_is_not_finite_is_left_out_and_counted(
        self, make_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, losses: dict[str, float]
    ) -> None:
        """And its features do not stay in the queues, from where they would spoil the next steps."""

        class Dark(Loader):
            """One batch in the middle is a picture of nothing that can be counted with."""

            def batches(self, start: int = 0) -> Iterator[Batch]:
                for now, batch in enumerate(super().batches(start), start):
                    yield replace(batch, images=batch.images * torch.nan) if now == 2 else batch

        job = make_job(tmp_path, steps=5, log_every=5, objectives=ObjectivesConfig(losses=losses, queue=16))
        monkeypatch.setattr(loop, "loader_of", lambda kind, *args, **options: Dark(*args, **options))
        train(job)
        (line,) = log_of(job)
        assert (line["skipped"], line["step"]) == (1, 5)
        assert math.isfinite(line["lm"])
        assert line["grad_norm"] > 0
        assert all(tensor.isfinite().all() for tensor in weights.load(job.model_folder).state_dict().values())

    def test_clipping_bounds_the_step(self, make_job: MakeJob, tmp_path: Path) -> None:
        seen = []

        class Noted(torch.optim.AdamW):
            def step(self, closure: Any = None) -> None:  # type: ignore[override]
                grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
                seen.append(float(torch.cat([g.flatten() for g in grads]).norm()))

        job = make_job(tmp_path, optimizer=OptimizerConfig(clip=0.01))
        tokenizer = Tokenizer.load("world")
        learner = BlipPretraining(initial_model(job, len(tokenizer)), job.train.objectives)
        batches = Loader(job.sources, job.train.loader, tokenizer, 16, 0).batches()
        optimizer = Noted([p for p in learner.parameters() if p.requires_grad])
        gradients = Gradients(learner, job.execution, torch.device("cpu"), torch.float32)
        log = StepLog(tmp_path / "log.jsonl", job.train)
        loop.run_steps(job, gradients, optimizer, batches, 0, States(tmp_path, {}, 1), log)
        assert seen == pytest.approx([0.01] * 4, rel=1e-3)


def test_a_draw_is_a_function_of_all_its_names() -> None:
    found = {draw(seed, name, step) for seed in range(5) for name in ("step", "weights") for step in range(20)}
    assert len(found) == 200
    assert all(0 <= number < 2**63 for number in found)
    assert draw(1, "step", 2) == draw(1, "step", 2)
    assert math.log2(max(found)) > 62


def test_bf16_trains_the_same_model_nearly(make_job: MakeJob, tmp_path: Path) -> None:
    curves = []
    for precision in ("fp32", "bf16"):
        job = make_job(tmp_path / precision, steps=3, precision=precision)
        train(job)
        curves.append([[line[name] for name in ("itc", "itm", "lm")] for line in log_of(job)])
    for exact, rough in zip(*curves, strict=True):
        assert rough == pytest.approx(exact, rel=0.05)
    assert curves[0] != curves[1]
    assert all(tensor.dtype == torch.float32 for tensor in weights.load(job.model_folder).state_dict().values())


def test_a_prompt_in_the_texts_is_no_target_of_lm(make_job: MakeJob, tmp_path: Path) -> None:
    given = {"steps": 2, "objectives": ObjectivesConfig(losses={"lm": 1.0}, smoothing=0.0)}
    loader = LoaderConfig(batch_size=8, max_length=24, shuffle=32, prompt="a picture of ")
    job = make_job(tmp_path, text={"roles": ("decoder",)}, **given, loader=loader)
    train(job)
    tokenizer = Tokenizer.load("world")
    batch = next(Loader(job.sources, loader, tokenizer, 16, job.seed).batches())
    model = initial_model(job, len(tokenizer)).train()
    torch.manual_seed(draw(job.seed, "step", 0, 0))
    keys = model.image_context(model.encode_image(batch.images), "decoder")
    logits = model.decode(batch.ids, batch.mask, keys)[:, :-1].detach()
    asked = batch.mask[:, 1:].bool()
    prompt = len(tokenizer.encode(["a picture of"], 24)[0][0]) - 2
    asked[:, :prompt] = False
    wanted = -logits.log_softmax(-1).gather(2, batch.ids[:, 1:, None])[..., 0][asked].mean()
    assert log_of(job)[0]["lm"] == pytest.approx(wanted.item(), abs=1e-4)


class TestStates:
    @pytest.mark.slow
    def test_a_training_cut_short_goes_on_where_its_folder_was_moved_to(
        self, make_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Its tokenizer and its start lie in the folder that is moved, as those of a bootstrap's rounds do."""
        (tmp_path / "run").mkdir()
        Tokenizer.load("world").save(tmp_path / "run/tokenizer")
        whole = make_job(tmp_path / "whole", steps=6, checkpoint_every=2)
        train(whole)
        here = {"out": tmp_path / "run/pretrain", "tokenizer": str(tmp_path / "run/tokenizer")}
        killed_at(5, monkeypatch)
        with pytest.raises(Killed):
            train(whole.model_copy(update=here))
        monkeypatch.undo()
        (tmp_path / "run").rename(tmp_path / "moved")
        there = {"out": tmp_path / "moved/pretrain", "tokenizer": str(tmp_path / "moved/tokenizer")}
        seen = []
        resume = States.resume

        def noted(self: States, *of: Any) -> int:
            seen.append(resume(self, *of))
            return seen[-1]

        monkeypatch.setattr(States, "resume", noted)
        moved = whole.model_copy(update=there)
        train(moved)
        assert seen == [4]
        assert weights_of(moved) == weights_of(whole)

    @pytest.mark.slow
    def test_how_steps_are_computed_is_no_part_of_the_identity(
        self, make_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        job = make_job(tmp_path, steps=6, checkpoint_every=2)
        killed_at(3, monkeypatch)
        with pytest.raises(Killed):
            train(job)
        monkeypatch.undo()
        other = job.model_copy(update={"execution": ExecutionConfig(micro_batches=4, parallel="fsdp")})
        train(other.model_copy(update={"train": job.train.model_copy(update={"checkpoint_every": 3, "recompute": 1})}))
        assert [line["step"] for line in log_of(job)] == [1, 2, 3, 4, 5, 6]

    def test_a_state_of_another_architecture_says_so(
        self, make_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        killed_at(3, monkeypatch)
        with pytest.raises(Killed):
            train(make_job(tmp_path, checkpoint_every=2))
        monkeypatch.undo()
        with pytest.raises(ModelError, match=r"000000002 belongs to another training: other architecture; use another"):
            train(make_job(tmp_path, checkpoint_every=2, text={"dropout": 0.1, "hidden": 48}))

    @pytest.mark.slow
    def test_the_best_model_is_left_beside_the_last(self, make_job: MakeJob, tmp_path: Path) -> None:
        """A learning rate that ends in ruin: the best state is an early one."""
        only_lm = ObjectivesConfig(losses={"lm": 1.0})
        ruin = OptimizerConfig(lr=0.1, decay="constant", warmup=0.9, warmup_lr=1e-3)
        options = {"objectives": only_lm, "checkpoint_every": 3, "checkpoints": 1, "keep_best": True}
        job = make_job(tmp_path, steps=15, optimizer=ruin, **options)
        train(job)
        assert {path.name for path in job.out.iterdir()} == {"log.jsonl", "checkpoint", "best", "states"}
        losses = [line["lm"] for line in log_of(job)]
        means = [sum(losses[i : i + 3]) / 3 for i in range(0, 15, 3)]
        assert min(means) < means[-1], "it did not end in ruin"
        best = 3 * (means.index(min(means)) + 1)
        cut = make_job(tmp_path / "cut", steps=15, optimizer=ruin, **options, log_every=1)
        seen = {}
        with pytest.MonkeyPatch.context() as patch:

            def noted(self: States, learner: Any, optimizer: Any, step: int, loss: float | None = None) -> None:
                seen[step] = {name: tensor.clone() for name, tensor in learner.model.state_dict().items()}
                assert loss == pytest.approx(means[step // 3 - 1], abs=1e-4)

            patch.setattr(States, "save", noted)
            train(cut)
        kept = weights.load(job.best_folder).state_dict()
        assert all(torch.equal(kept[name], tensor) for name, tensor in seen[best].items())


class TestWhatIsSaidInOneLine:
    def test_a_shard_that_vanishes_while_it_trains(
        self, make_job: MakeJob, small_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        data = shutil.copytree(small_world / "human", tmp_path / "data")
        monkeypatch.setattr("capfilt.data.loading.rows.KEPT_BYTES", 0)
        job = make_job(
            tmp_path / "out", steps=200, loader=LoaderConfig(batch_size=8, max_length=24, shuffle=8, lanes=1)
        )
        job = job.model_copy(update={"sources": (Source(shards=str(data)),)})

        def gone(line: dict[str, Any]) -> None:
            for path in data.glob("*.tar"):
                path.unlink()

        with pytest.raises(CapfiltError, match=r"0000\d\.tar") as caught:
            train(job, gone)
        assert "\n" not in str(caught.value)


def test_a_step_s_seed_on_a_cpu_is_told_to_no_other_device(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(draw(3, "step", 7, 0))
    wanted = torch.rand(4)
    monkeypatch.setattr(torch, "manual_seed", None)
    seed_draws(torch.device("cpu"), 3, "step", 7, 0)
    assert torch.equal(torch.rand(4), wanted)
