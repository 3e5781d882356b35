"""Training steps of every task on a GPU beside those of a CPU, in fp32: equal losses and gradients up to rounding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from capfilt.data.text.bert_tokenizers import BertTokenizer
from capfilt.data.text.language_tokenizer import tokenizer_of
from capfilt.models import ArchitectureConfig, architecture_of, build
from capfilt.models.heads.config import AnswererConfig, ClassifierConfig
from capfilt.objectives.config import ObjectivesConfig
from capfilt.objectives.draws import Draws
from capfilt.objectives.interface import StepBatch, Task
from capfilt.objectives.kinds import TaskConfig
from capfilt.objectives.kinds.albef import AlbefObjectives
from capfilt.objectives.kinds.classify import (
    AssignObjectives,
    EntailmentObjectives,
    NlvrObjectives,
    VqaClassesObjectives,
)
from capfilt.objectives.kinds.clip import ClipObjectives
from capfilt.objectives.kinds.downstream import DialogObjectives, GroundingObjectives, VqaObjectives
from capfilt.objectives.kinds.vilt import ViltObjectives, ViltRetrievalObjectives
from capfilt.objectives.kinds.vlmo import VlmoObjectives, VlmoTextObjectives
from capfilt.objectives.kinds.xvlm import XvlmObjectives
from capfilt.objectives.masking import Vocabulary
from capfilt.objectives.tasks import FURTHER, PRETRAINING, build_task
from capfilt.training.config import ExecutionConfig, OptimizerConfig
from capfilt.training.distributed.data_parallel import Gradients
from capfilt.training.optimizer import make_optimizer

CPU = torch.device("cpu")


def classifier(base: str, *labels: str, images: int = 1) -> ClassifierConfig:
    return ClassifierConfig(base=base, labels=labels, images=images)  # type: ignore[arg-type]


class Case(NamedTuple):
    architecture: ArchitectureConfig
    config: TaskConfig
    chunks: int = 1
    recompute: int = 0


BLIP, THREE = architecture_of("blip/tiny"), ("entailment", "neutral", "contradiction")
STEP = {"queue": 16}
CASES = {
    "blip": Case(BLIP, ObjectivesConfig(**STEP)),
    "blip, by image": Case(
        BLIP,
        ObjectivesConfig(**STEP, itc_targets="image", negatives="all", negatives_by="online", mean_over="all"),
    ),
    "blip, micro batches": Case(BLIP, ObjectivesConfig(**STEP), chunks=4),
    "blip, recompute": Case(BLIP, ObjectivesConfig(**STEP), recompute=2),
    "blip2": Case(architecture_of("blip2/tiny"), ObjectivesConfig(queue=0)),
    "blip2, language": Case(
        architecture_of("blip2/tiny-opt"), ObjectivesConfig(losses={"lm": 1.0}, queue=0, smoothing=0.0)
    ),
    "albef": Case(architecture_of("albef/tiny"), AlbefObjectives(queue=16)),
    "clip": Case(architecture_of("clip/tiny"), ClipObjectives()),
    "clip, micro batches": Case(architecture_of("clip/tiny"), ClipObjectives(), chunks=2),
    "vilt": Case(architecture_of("vilt/tiny"), ViltObjectives()),
    "vilt, retrieval": Case(architecture_of("vilt/tiny"), ViltRetrievalObjectives()),
    "vlmo": Case(architecture_of("vlmo/tiny"), VlmoObjectives()),
    "vlmo, texts": Case(architecture_of("vlmo/tiny"), VlmoTextObjectives()),
    "xvlm": Case(architecture_of("xvlm/tiny"), XvlmObjectives()),
    "grounding": Case(architecture_of("xvlm/tiny"), GroundingObjectives()),
    "dialog": Case(BLIP, DialogObjectives(losses={"rank": 1, "lm": 1})),
    "entailment": Case(classifier("albef/tiny", *THREE), EntailmentObjectives(alpha=0.4)),
    "nlvr2": Case(classifier("vlmo/tiny", "false", "true", images=2), NlvrObjectives()),
    "vqa by classes": Case(classifier("vilt/tiny", "ring", "red"), VqaClassesObjectives()),
    "assign": Case(classifier("albef/tiny", "left", "right", "neither", images=2), AssignObjectives()),
    "vqa": Case(architecture_of("blip/tiny-answers"), VqaObjectives()),
    "vqa, distilled": Case(AnswererConfig(base=architecture_of("albef/tiny")), VqaObjectives(alpha=0.4)),
}


IN_BF16 = ("blip", "clip", "blip2", "vqa")


class Noted(Draws):
    """Draws on the CPU and remembers what."""

    def __init__(self) -> None:
        self.made: list[Any] = []

    def take(self, name: str, draw: Callable[[], Any]) -> Any:
        self.made.append(draw())
        return self.made[-1]

    def on(self, device: torch.device) -> Draws:
        """Gives out the same draws on a device."""
        return Given(tree_map_only(Tensor, lambda x: x.to(device), self.made))


class Given(Draws):
    """Gives out draws in their order."""

    def __init__(self, made: list[Any]):
        self.made = iter(made)

    def take(self, name: str, draw: Callable[[], Any]) -> Any:
        return next(self.made)


def task_of(case: Case, device: torch.device) -> Task:
    torch.manual_seed(0)
    model = build(case.architecture)
    model.recompute_vision(case.recompute)
    task = build_task(model, case.config)
    for module in task.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    if case.architecture.tokenizer_kind.endswith("bert"):
        tokenizer = tokenizer_of("world", case.architecture.tokenizer_kind)
        assert isinstance(tokenizer, BertTokenizer)
        task.vocabulary = Vocabulary.of(tokenizer, device)
    return task.to(device)


def batch_of(task: Task) -> StepBatch:
    """Eight texts of nine tokens, one of them shorter."""
    example, generator = task.example(8, 9), torch.Generator().manual_seed(1)
    ids = torch.randint(5, 190, example.ids_BT.shape, generator=generator)
    ids[:, 0] = 1
    mask = torch.ones_like(ids)
    mask[2, 5:] = ids[2, 5:] = 0
    images = torch.randn(example.images.shape, generator=generator)
    return example._replace(images=images, ids_BT=ids, mask_BT=mask)  # type: ignore[return-value]


def step(case: Case, device: torch.device, draws: Draws, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """One step; its losses and metrics, and the weights behind it, on the CPU."""
    task = task_of(case, device)
    task.draws = draws
    gradients = Gradients(task, ExecutionConfig(micro_batches=case.chunks), device, dtype)
    optimizer = make_optimizer(task, OptimizerConfig(lr=1e-4))
    assert optimizer.defaults["fused"] is (True if device.type == "cuda" else None)
    torch.manual_seed(3)
    losses, metrics = gradients.of(batch_of(task).to(device), 0.5)
    found = losses | metrics | {"norm": gradients.clip(1.0)}
    grads = {name: p.grad for name, p in task.named_parameters() if p.grad is not None}
    found |= grads
    found = {name: value.detach().cpu() for name, value in found.items()}
    optimizer.step()
    task.after_step()
    return found


@pytest.mark.parametrize("name", CASES)
def test_losses_and_gradients_are_those_of_a_cpu(name: str, cuda: torch.device) -> None:
    """In fp32 up to rounding; in bf16 losses are near."""
    draws = Noted()
    wanted = step(CASES[name], CPU, draws)
    found = step(CASES[name], cuda, draws.on(cuda))
    assert found.keys() == wanted.keys()
    for figure, value in wanted.items():
        torch.testing.assert_close(found[figure], value, atol=2e-5, rtol=1e-4, msg=lambda m, f=figure: f"{f}: {m}")
    if name not in IN_BF16:
        return
    found = step(CASES[name], cuda, draws.on(cuda), torch.bfloat16)
    losses = [loss for loss in CASES[name].config.losses if loss in wanted]
    assert losses
    for loss in losses:
        assert found[loss].item() == pytest.approx(wanted[loss].item(), rel=0.05, abs=0.02)


def test_every_task_that_there_is_is_trained_here() -> None:
    every = [kind.config for kind in (*PRETRAINING.values(), *(kind for some in FURTHER.values() for kind in some))]
    assert {*every} == {type(case.config) for case in CASES.values()}
