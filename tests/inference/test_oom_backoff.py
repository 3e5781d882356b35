from __future__ import annotations

import logging

import pytest
import torch

from capfilt.errors import RunError
from capfilt.inference.oom_backoff import OomBackoff

CPU_SAYS = "[enforce fail at alloc_cpu.cpp:127] data. DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"


class Device:
    """Memory for so many items at a time."""

    def __init__(self, room: int, error: RuntimeError):
        self.room, self.error = room, error
        self.batch_sizes: list[int] = []

    def __call__(self, start: int, stop: int) -> list[int]:
        self.batch_sizes.append(stop - start)
        if stop - start > self.room:
            raise self.error
        return list(range(start, stop))


SAID = {
    "cuda": torch.OutOfMemoryError("CUDA out of memory. Tried 9 GiB"),
    "cpu": RuntimeError(CPU_SAYS),
    "accelerator": torch.AcceleratorError("CUDA error: out of memory"),
    "cublas": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "cudnn": RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    "cudnn 9": RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    "nccl": RuntimeError("NCCL error: ncclUnhandledCudaError: Last error: Cuda failure 2 'out of memory'"),
}


@pytest.fixture(params=SAID.values(), ids=SAID)
def error(request: pytest.FixtureRequest) -> RuntimeError:
    found: RuntimeError = request.param
    return found


@pytest.mark.parametrize("room", [1, 3, 4, 7, 64])
def test_every_item_is_done_once_and_in_order(room: int, error: RuntimeError) -> None:
    assert OomBackoff().run(Device(room, error), 37) == list(range(37))


def test_the_size_that_fitted_is_remembered_and_logged(error: RuntimeError, caplog: pytest.LogCaptureFixture) -> None:
    device, pieces = Device(5, error), OomBackoff()
    with caplog.at_level(logging.WARNING):
        pieces.run(device, 16)
    assert device.batch_sizes == [16, 8, 4, 4, 4, 4]
    assert pieces.limit == 4
    assert caplog.messages == [
        "out of memory with 16 pictures, going on with 8",
        "out of memory with 8 pictures, going on with 4",
    ]
    device.batch_sizes.clear()
    assert pieces.run(device, 10) == list(range(10))
    assert device.batch_sizes == [4, 4, 2], "it must not run out of memory once more"


def test_one_that_does_not_fit_alone_is_said(error: RuntimeError) -> None:
    with pytest.raises(RunError, match=r"one picture at a time .*take fewer captions"):
        OomBackoff().run(Device(0, error), 3)


def test_after_a_while_more_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory of a shared device comes back; where it does not, the tries become rare."""
    monkeypatch.setattr("capfilt.inference.oom_backoff.PIECES_BEFORE_GROWTH", 4)
    device, pieces = Device(5, RuntimeError(CPU_SAYS)), OomBackoff()
    pieces.run(device, 100)
    assert device.batch_sizes[:11] == [100, 50, 25, 12, 6, 3, 3, 3, 3, 6, 3]
    device.room = 1000
    pieces.run(device, 2000)
    assert pieces.limit is not None
    assert pieces.limit >= 12


def test_pieces_are_spoken_of_as_long_as_batches_are_done_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("capfilt.inference.oom_backoff.PIECES_BEFORE_GROWTH", 4)
    device, pieces = Device(5, RuntimeError(CPU_SAYS)), OomBackoff()
    pieces.run(device, 8)
    assert pieces.said == "4 at a time: no more fit into memory"
    device.room = 1000
    pieces.run(device, 8)
    pieces.run(device, 8)
    assert device.batch_sizes[-1] == 8
    assert pieces.said == ""


def test_it_never_grows_beyond_what_it_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("capfilt.inference.oom_backoff.PIECES_BEFORE_GROWTH", 2)
    device, pieces = Device(100, RuntimeError(CPU_SAYS)), OomBackoff(8)
    pieces.run(device, 100)
    assert set(device.batch_sizes) == {8, 4}


def test_a_picture_alone_waits_for_a_neighbour_on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    device, pauses = Device(0, torch.OutOfMemoryError("CUDA out of memory")), list[float]()

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        device.room = int(len(pauses) == 3)

    monkeypatch.setattr("time.sleep", pause)
    assert OomBackoff(1).run(device, 1) == [0]
    assert pauses == [1.0, 2.0, 4.0]


def test_each_picture_alone_has_its_own_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr("time.sleep", lambda _: None)
    tries = list[int]()

    def work(start: int, stop: int) -> list[int]:
        tries.append(start)
        if tries.count(start) < 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return [start]

    assert OomBackoff(1).run(work, 3) == [0, 1, 2]


def test_other_errors_are_not_swallowed() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        OomBackoff().run(Device(0, RuntimeError("mat1 and mat2 shapes cannot be multiplied")), 3)


def test_nothing_to_do_asks_for_nothing() -> None:
    device = Device(1, RuntimeError(CPU_SAYS))
    assert OomBackoff().run(device, 0) == []
    assert device.batch_sizes == []
