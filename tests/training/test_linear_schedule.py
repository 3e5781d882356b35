"""The linear schedule of ViLT, VLMo and X-VLM."""

from __future__ import annotations

import pytest
import torch

from capfilt.training.config import OptimizerConfig
from capfilt.training.optimizer import learning_rate


def test_it_is_that_of_transformers() -> None:
    """A warm-up whose first step is at 0, then evenly to the end."""
    from transformers import get_polynomial_decay_schedule_with_warmup

    config = OptimizerConfig(lr=1e-3, min_lr=1e-5, warmup=0.1, warmup_first=0, decay="linear")
    theirs = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    schedule = get_polynomial_decay_schedule_with_warmup(theirs, 5, 50, lr_end=1e-5, power=1.0)
    for step in range(50):
        assert learning_rate(config, step, 50) == pytest.approx(theirs.param_groups[0]["lr"], rel=1e-9)
        theirs.step()
        schedule.step()
