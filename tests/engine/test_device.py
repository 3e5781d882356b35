from __future__ import annotations

import pytest
import torch

from capfilt.engine.device import autocast, pick_device, pick_dtype

CPU = torch.device("cpu")


def test_a_number_format_that_is_asked_for_is_taken() -> None:
    assert pick_dtype("fp32", CPU) == torch.float32
    assert pick_dtype("bf16", CPU) == torch.bfloat16
    assert pick_dtype("auto", CPU) in (torch.float32, torch.bfloat16)


def test_fp32_is_no_autocast() -> None:
    a = torch.randn(3, 3)
    with autocast(CPU, torch.float32):
        assert (a @ a).dtype == torch.float32


def test_bf16_multiplies_so_and_keeps_the_weights() -> None:
    layer = torch.nn.Linear(3, 3)
    with autocast(CPU, torch.bfloat16):
        assert layer(torch.randn(2, 3)).dtype == torch.bfloat16
    assert layer.weight.dtype == torch.float32


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_accelerator_is_picked_where_there_is_one() -> None:
    assert pick_device().type == "cuda"
    assert pick_dtype("auto", pick_device()) == torch.bfloat16


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_the_cpu_is_picked_where_there_is_no_accelerator() -> None:
    assert pick_device() == CPU
