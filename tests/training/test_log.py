from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch

from capfilt.data.loading.config import LoaderConfig
from capfilt.objectives.config import ObjectivesConfig
from capfilt.training.config import TrainConfig
from capfilt.training.log import StepLog


class TestLog:
    def test_lines_are_means_of_the_steps_since_the_last(self, tmp_path: Path) -> None:
        config = TrainConfig(
            steps=5, log_every=2, loader=LoaderConfig(batch_size=8), objectives=ObjectivesConfig(queue=0)
        )
        log = StepLog(tmp_path / "log.jsonl", config)
        for step in range(5):
            with log.waiting():
                pass
            log.add(step, {"lm": torch.tensor(float(step))}, unreadable=step, lr=0.5)
        lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
        assert [(line["step"], line["lm"], line["unreadable"]) for line in lines] == [
            (2, 0.5, 1),
            (4, 2.5, 5),
            (5, 4, 4),
        ]
        for line in lines:
            assert (line["steps"], line["lr"]) == (5, 0.5)
            assert line["samples_per_second"] > 0
            assert 0 <= line["data_wait"] <= 1
            assert "itm_stuck" not in line

    def test_lines_of_undone_steps_go_when_it_is_taken_up(self, tmp_path: Path) -> None:
        path = tmp_path / "log.jsonl"
        config = TrainConfig(steps=9, log_every=1, objectives=ObjectivesConfig(queue=0))
        log = StepLog(path, config)
        for step in range(5):
            log.add(step, {"lm": torch.tensor(float(step))}, 0, 0.5)
        with path.open("a") as file:
            file.write('{"step": 6, "lm":')  # cut by the kill
        log = StepLog(path, config, done=3)
        log.add(3, {"lm": torch.tensor(9.0)}, 0, 0.5)
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        assert [(line["step"], line["lm"]) for line in lines] == [(1, 0), (2, 1), (3, 2), (4, 9)]

    def steps(self, path: Path, start: int, end: int, itm: float, done: int | None = None) -> None:
        config = TrainConfig(steps=600, log_every=20, objectives=ObjectivesConfig(queue=0))
        log = StepLog(path, config, start if done is None else done)
        for step in range(start, end):
            # To and fro around its mean, as a loss does.
            log.add(step, {"itm": torch.tensor(itm + 0.02 * (-1) ** step)}, 0, 0.5)

    def test_itm_at_the_trivial_answer_is_logged_and_warned_of_once(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        path = tmp_path / "log.jsonl"
        with caplog.at_level(logging.WARNING):
            self.steps(path, 0, 300, itm=0.6380)
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        assert [line["step"] for line in lines if line.get("itm_stuck")] == [200, 220, 240, 260, 280, 300]
        (record,) = caplog.records
        assert "step 200: itm has stood at 0.6365 since step 0, which is guessing" in record.getMessage()

    def test_itm_that_learns_is_not(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        self.steps(tmp_path / "log.jsonl", 0, 600, itm=0.60)
        assert "itm_stuck" not in (tmp_path / "log.jsonl").read_text()
        assert not caplog.records

    def test_the_alarm_outlives_a_kill(self, tmp_path: Path) -> None:
        path = tmp_path / "log.jsonl"
        self.steps(path, 0, 40, itm=0.70)
        self.steps(path, 40, 160, itm=0.6350)
        self.steps(path, 140, 260, itm=0.6350, done=140)
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        assert [line["step"] for line in lines] == list(range(20, 261, 20))
        assert [line["step"] for line in lines if line.get("itm_stuck")] == [240, 260]
