from __future__ import annotations

from typing import Any

import pytest
import torch

from capfilt.errors import ClusterError
from capfilt.inference import device as devices
from capfilt.inference.device import Ability, Compute, ability, autocast, choose

CPU = torch.device("cpu")
FAST, SLOW = Ability("cuda", "H100 on a", bf16=True), Ability("cuda", "T4 on b", bf16=False)


@pytest.mark.parametrize("precision_wanted", ["auto", "fp32", "bf16"])
def test_a_cpu_computes_in_fp32_unless_it_is_asked_for_bf16(precision_wanted: devices.Precision) -> None:
    """Whatever its instruction set: with AVX-512 bf16 units, auto took bf16."""
    compute, message = choose(precision_wanted, "cpu")
    assert compute == Compute(device="cpu", precision="bf16" if precision_wanted == "bf16" else "fp32")
    assert message == ""
    assert compute.open() == CPU
    assert compute.dtype == (torch.bfloat16 if precision_wanted == "bf16" else torch.float32)


@pytest.mark.parametrize(
    ("abilities", "precision", "message"),
    [
        ([FAST, FAST], "bf16", ""),
        ([SLOW], "fp32", ""),
        ([FAST, SLOW], "fp32", "fp32, since 1 of 2 nodes (first T4 on b) have no bf16 units and all take the same"),
        ([], "fp32", "fp32: no node with a GPU answered"),
    ],
)
def test_auto_is_the_format_that_all_nodes_with_gpus_are_fast_in(
    abilities: list[Ability], precision: devices.Format, message: str
) -> None:
    assert choose("auto", "cuda", abilities) == (Compute(device="cuda", precision=precision), message)
    assert choose("bf16", "cuda", abilities)[0].precision == "bf16", "what is asked for is taken"


def test_a_node_whose_gpu_torch_does_not_see_is_named() -> None:
    with pytest.raises(ClusterError, match=r"finds none: torch there is for CPUs.*set gpus=0"):
        choose("auto", "cuda", [FAST, Ability("cpu", "c", bf16=False)])


def test_emulated_bf16_is_no_reason_to_take_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch says that a V100 supports bf16: it emulates it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla V100")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    abilities = ability()
    assert (abilities.device, abilities.bf16) == ("cuda", False)
    assert "Tesla V100" in abilities.name
    assert choose("auto", "cuda", [abilities])[0].precision == "fp32"


def test_a_worker_refuses_what_it_cannot_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ClusterError, match=r"has no CUDA device that torch can use.*gpus=1"):
        Compute(device="cuda", precision="fp32").open()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "GeForce 9")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    with pytest.raises(ClusterError, match=r"cannot compute in bf16 \(GeForce 9\).*precision=fp32"):
        Compute(device="cuda", precision="bf16").open()


def test_fp32_on_a_gpu_is_no_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    parts: list[Any] = [torch.backends.cuda.matmul, torch.backends.cudnn.conv]  # type: ignore[attr-defined]
    before = [part.fp32_precision for part in parts]
    try:
        for part in parts:
            part.fp32_precision = "tf32"
        Compute(device="cuda", precision="fp32").open()
        assert [part.fp32_precision for part in parts] == ["ieee", "ieee"]
    finally:
        for part, value in zip(parts, before, strict=True):
            part.fp32_precision = value


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
def test_an_accelerator_is_taken_where_there_is_one() -> None:
    assert ability().device == devices.local_device() == "cuda"
    assert Compute(device="cuda", precision="fp32").open().type == "cuda"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_the_cpu_is_taken_where_there_is_no_accelerator() -> None:
    assert ability().device == devices.local_device() == "cpu"
