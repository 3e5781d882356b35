"""Visual dialog: what the loader hands on, the losses written out, and a model that learns a shard of the world."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from capfilt.data import shards
from capfilt.data.loading.config import LoaderConfig, Source
from capfilt.data.loading.dialog_rows import DialogLoader, DialogRows
from capfilt.data.loading.rows import count_pairs
from capfilt.data.sample import Sample
from capfilt.data.text.language_tokenizer import tokenizer_of
from capfilt.data.text.tokenizer import Tokenizer
from capfilt.inference.device import Compute
from capfilt.models import architecture_of, build
from capfilt.models.checkpoints import store
from capfilt.objectives.interface import DialogBatch
from capfilt.objectives.kinds.downstream import DialogObjectives
from capfilt.objectives.tasks import build_task, unsupported
from capfilt.objectives.tasks.dialog import DialogTask
from capfilt.training.config import TrainConfig
from capfilt.training.job import TrainJob
from capfilt.training.loop import train


def batches(folder: Path, count: int, family: str = "blip", **settings: Any) -> list[DialogRows]:
    config = LoaderConfig(**{"batch_size": 4, "max_length": 40, "shuffle": 8, "lanes": 2, "candidates": 4, **settings})
    tokenizer = tokenizer_of("world", architecture_of(f"{family}/tiny").tokenizer_kind)
    return [
        batch
        for batch in islice(DialogLoader([Source(shards=str(folder))], config, tokenizer, 32, 0).batches(), count)
        if isinstance(batch, DialogRows)
    ]


def dialog_task(family: str, **objectives: Any) -> DialogTask:
    torch.manual_seed(0)
    task = build_task(build(architecture_of(f"{family}/tiny")), DialogObjectives(**objectives))
    assert isinstance(task, DialogTask)
    return task


class TestLoader:
    def test_a_row_is_a_round_with_the_right_candidate_first(self, dialog_shards: Path) -> None:
        samples = [item for url in shards.expand(str(dialog_shards)) for item in shards.read(url)]
        known = {
            sample.uid: [(one["question"], one["answer"]) for one in sample.meta["dialog"]["rounds"]]
            for sample in samples
            if isinstance(sample, Sample)
        }
        tokenizer, seen = Tokenizer.load("world"), []
        for batch in batches(dialog_shards, 9):
            assert batch.ids.shape[0] == batch.mask.shape[0] == 4 * len(batch.uids)
            assert batch.there.all()
            for number, uid in enumerate(batch.uids):
                of_round = slice(4 * number, 4 * number + 4)
                texts = [
                    tokenizer.decode(row[answer].tolist())
                    for row, answer in zip(batch.ids[of_round], batch.answer[of_round], strict=True)
                ]
                assert len(set(texts)) == 4
                assert texts[0] in [tokenizer.decode(tokenizer.encode([a], 30)[0][0].tolist()) for _, a in known[uid]]
                seen.append(uid)
        assert sorted(seen) == sorted(uid for uid in known for _ in range(3)), "an epoch is every round once"

    def test_wrong_candidates_are_others_in_another_epoch_and_the_same_in_another_run(
        self, dialog_shards: Path
    ) -> None:
        one, two = (batches(dialog_shards, 18, candidates=3) for _ in range(2))
        texts = [
            {
                (uid, *map(tuple, batch.ids[3 * number : 3 * number + 3].tolist()))
                for batch in part
                for number, uid in enumerate(batch.uids)
            }
            for part in (one[:9], one[9:], two[:9])
        ]
        assert texts[0] == texts[2]
        assert texts[0] != texts[1]

    def test_a_round_of_few_candidates_is_filled_up(self, dialog_shards: Path) -> None:
        (batch,) = batches(dialog_shards, 1, candidates=12)
        assert batch.there.tolist() == [[True] * 10 + [False] * 2] * 4

    def test_rounds_are_counted(self, dialog_shards: Path) -> None:
        counted = [count_pairs(url).of_tasks["rounds"] for url in shards.expand(str(dialog_shards))]
        assert sum(counted) == 36


@pytest.fixture
def batch(dialog_shards: Path) -> DialogBatch:
    (loaded,) = batches(dialog_shards, 1)
    given = dialog_task("blip").batch_of(loaded)
    there = given.there_BC.clone()
    there[1, 2:] = False
    return given._replace(there_BC=there)


def test_losses_written_out(batch: DialogBatch) -> None:
    task = dialog_task("blip", losses={"rank": 1.0, "lm": 0.5}).eval()
    losses, metrics = task(batch, 0.0)
    model, rank, nll, words, right = task.model, 0.0, 0.0, 0, 0
    for number in range(4):
        image = model.encode_image(batch.images[number : number + 1])
        odds = []
        for place in range(4):
            row = 4 * number + place
            length = int(batch.mask_BT[row].sum())
            ids, mask = batch.ids_BT[row : row + 1, :length], batch.mask_BT[row : row + 1, :length]
            p = model.match(model.fuse(ids, mask, model.image_context(image, "encoder"))).softmax(1)[0, 1]
            odds.append(p / (1 - p))
            if place == 0:
                log_p = model.decode(ids, mask, model.image_context(image, "decoder")).log_softmax(2)[0]
                for at in range(1, length):
                    if batch.answer_BT[row, at]:
                        nll, words = nll - log_p[at - 1, ids[0, at]], words + 1
        shown = odds[:2] if number == 1 else odds
        rank -= (shown[0] / sum(shown)).log() / 4
        right += bool(shown[0] == max(shown))
    torch.testing.assert_close(losses["rank"], rank, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(losses["lm"], nll / words, rtol=1e-4, atol=1e-5)
    assert metrics["rank_accuracy"] == right / 4
    torch.testing.assert_close(task.total(losses), losses["rank"] + 0.5 * losses["lm"])


@pytest.mark.parametrize("family", ["albef", "vilt", "vlmo", "xvlm"])
def test_families_that_fuse_learn_to_rank(family: str, dialog_shards: Path) -> None:
    task = dialog_task(family).train()
    given = task.batch_of(batches(dialog_shards, 1, family, max_length=32)[0])
    optimizer = torch.optim.AdamW(task.parameters(), lr=3e-3)
    values = []
    for _ in range(6):
        losses, _ = task(given, 0.0)
        optimizer.zero_grad()
        losses["rank"].backward()
        optimizer.step()
        values.append(float(losses["rank"].detach()))
    assert min(values[3:]) < values[0]


def test_what_does_not_go_together() -> None:
    albef = architecture_of("albef/tiny")
    assert "objective 'lm' needs a model that can decode" in unsupported(albef, DialogObjectives(losses={"lm": 1}))
    assert "micro_batches is 2" in unsupported(albef, DialogObjectives(), 2)
    assert unsupported(albef, DialogObjectives()) == ""
    clip = architecture_of("clip/vit-b-32")
    assert unsupported(clip, DialogObjectives()).endswith("blip, albef, vilt, vlmo and xvlm can.")


def test_a_training(dialog_shards: Path, tmp_path: Path) -> None:
    settings = {
        "steps": 2,
        "loader": {"batch_size": 4, "max_length": 40, "shuffle": 8, "candidates": 3},
        "objectives": {"task": "dialog", "losses": {"rank": 1, "lm": 1}},
        "precision": "fp32",
        "log_every": 1,
    }
    job = TrainJob(
        out=tmp_path,
        architecture=architecture_of("blip/tiny"),
        tokenizer="world",
        sources=(Source(shards=str(dialog_shards)),),
        train=TrainConfig.model_validate(settings),
        compute=Compute(device="cpu", precision="fp32"),
    )
    lines: list[dict[str, Any]] = []
    train(job, lines.append)
    assert [{"rank", "lm", "rank_accuracy"} <= line.keys() for line in lines] == [True, True]
    assert store.load(job.model_folder).config == job.architecture
