"""Steps that are captured and replayed write what steps of the model write.

On a CPU the capture is a record of the operators of a step, done again on the same tensors: what a step hands to the
next one otherwise than through these is lost, as it is in a CUDA graph. (tests/gpu/test_decode.py has real ones.)
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from capfilt.inference.config import DecodeConfig
from capfilt.inference.generation import beam, decode
from capfilt.inference.generation.beam import scored_beams
from capfilt.inference.generation.decode import generate
from capfilt.inference.generation.fused import FusedSteps
from capfilt.inference.generation.graphs import StepGraphs, few_sizes
from capfilt.models import Blip
from capfilt.models.layers.image_context import ImageContext

MakeBlip = Callable[..., Blip]
SEP, STEPS = 3, 17


class Recording(TorchDispatchMode):
    """A step's operators, with the tensors that they got and gave."""

    def __init__(self, step: Callable[[], None]):
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []
        with self:
            step()
        self.done = True

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        """Once the step was recorded, all again, into the tensors that it gave then."""
        if self.done:  # a graph is replayed first when it was captured, which did nothing; a recording did the step
            self.done = False
            return
        for func, args, kwargs, out in self.calls:
            new = func(*args, **kwargs)
            given = {storage(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
            for then, now in zip(tree_leaves(out), tree_leaves(new), strict=True):
                if isinstance(then, Tensor) and storage(then) not in given:  # no view of what was given
                    then.copy_(now)


def storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@pytest.fixture(scope="module")
def model(small_blip: MakeBlip) -> Blip:
    model = small_blip(roles=("decoder",)).double()
    with torch.no_grad():
        model.text.head.bias[SEP] += 0.6  # texts of many lengths
        for name, weight in model.text.named_parameters():
            if name.endswith("bias"):
                weight += torch.randn(weight.shape, generator=torch.Generator().manual_seed(len(name))) / 10
    return model


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return 3 * torch.randn(24, 5, 24, generator=torch.Generator().manual_seed(4), dtype=torch.double)


def context(model: Blip, tokens: Tensor) -> ImageContext:
    with torch.inference_mode():
        return model.image_context(tokens, "decoder")


def write(
    model: Blip, image: ImageContext, config: DecodeConfig, texts: int, fused: FusedSteps | None, prompt: Tensor
) -> list[Any]:
    """The texts of a batch, and by beam search their scores as far as they are the same in any order of sums."""
    if config.method == "beam":
        found = scored_beams(model, image, prompt, SEP, config, texts, None, fused)
        return [(ids, round(score, 9)) for ids, score in found]
    count = config.max_length - prompt.shape[1]
    draws = torch.rand(image.rows * texts, count, generator=torch.Generator().manual_seed(1), dtype=torch.double)
    return generate(model, image, prompt, SEP, config, draws, None, fused)


def settings(**options: Any) -> DecodeConfig:
    return DecodeConfig.model_validate({"min_length": 4, "max_length": STEPS + 2, **options})


@pytest.mark.parametrize(
    ("config", "texts", "every"),
    [
        (settings(method="greedy", repetition_penalty=1.2), 1, 3),
        (settings(), 3, 1),
        (settings(repetition_penalty=1.4, top_k=9), 2, 3),
        (settings(method="beam", beams=4), 2, 1),
        (settings(method="beam", accounting="original", repetition_penalty=1.3), 3, 3),
    ],
    ids=["greedy", "nucleus", "penalty", "beam", "original"],
)
def test_captured_steps_write_what_the_model_writes(
    model: Blip, tokens: Tensor, monkeypatch: pytest.MonkeyPatch, config: DecodeConfig, texts: int, every: int
) -> None:
    """Batches of many sizes one after the other, after prompts of their own, whose texts leave at any time."""
    for module in (decode, beam):
        monkeypatch.setattr(module, "is_poll_step", lambda _device, step: step % every == every - 1)
    replays = itertools.count()
    runners = [FusedSteps(model), FusedSteps(model, StepGraphs(lambda: Recording))]
    replay, lengths = Recording.replay, set[int]()
    monkeypatch.setattr(Recording, "replay", lambda self: (next(replays), replay(self)))
    prompts = torch.tensor([[model.config.text.dec, word] for word in range(40, 64)])
    for rows in (slice(16), slice(8, 24), slice(4, 20), slice(3), slice(5, 6), slice(16), slice(20), slice(2, 18)):
        image, prompt = context(model, tokens[rows]), prompts[rows]
        wanted = write(model, image, config, texts, None, prompt)
        assert [write(model, image, config, texts, fused, prompt) for fused in runners] == [wanted] * 2
        lengths |= {len(text[0] if config.method == "beam" else text) for text in wanted}
    assert len(lengths) > 1
    assert next(replays) >= 10


def test_a_step_that_finds_no_memory_for_its_graph_goes_on_without(
    model: Blip, tokens: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    def full(step: Callable[[], None]) -> Recording:
        try:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        finally:
            raise RuntimeError("the capture was ended by an error")  # as ending it says, after what ended it

    prompt, image = torch.tensor([[model.config.text.dec]]).expand(8, -1), context(model, tokens[:8])
    fused = FusedSteps(model, StepGraphs(lambda: full))
    wanted = write(model, image, settings(), 1, None, prompt)
    assert [write(model, image, settings(), 1, fused, prompt) for _ in range(3)] == [wanted] * 3
    assert caplog.text.count("no memory for CUDA graphs") == 1


def test_another_fault_of_a_capture_is_none_of_memory(model: Blip, tokens: Tensor) -> None:
    def faulty(step: Callable[[], None]) -> Recording:
        raise RuntimeError("operation not permitted when stream is capturing")

    prompt, image = torch.tensor([[model.config.text.dec]]).expand(8, -1), context(model, tokens[:8])
    fused = FusedSteps(model, StepGraphs(lambda: faulty))
    write(model, image, settings(), 1, fused, prompt)
    with pytest.raises(RuntimeError, match="not permitted"):
        write(model, image, settings(), 1, fused, prompt)


def test_where_memory_runs_out_nothing_is_held(model: Blip, tokens: Tensor) -> None:
    prompt, image = torch.tensor([[model.config.text.dec]]).expand(8, -1), context(model, tokens[:8])
    graphs = StepGraphs(lambda: Recording)
    fused = FusedSteps(model, graphs)
    wanted = [write(model, image, settings(), 1, fused, prompt) for _ in range(3)]
    with pytest.raises(torch.OutOfMemoryError), fused.runner(image):
        raise torch.OutOfMemoryError("CUDA out of memory.")
    assert not graphs._graphs
    assert not graphs._room
    assert [write(model, image, settings(), 1, fused, prompt) for _ in range(3)] == wanted


def test_sizes_are_few() -> None:
    assert sorted({few_sizes(count) for count in range(1, 100)}) == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128]
    assert all(count <= few_sizes(count) <= 1.5 * count for count in range(1, 100))
