"""A family is added through the public seam alone and goes through the verbs: this is what CONTRIBUTING says in words.

The toy is a dual encoder: it compares images and texts and neither fuses nor decodes. Between the two lines of `----`
is all that a new family needs; in the package its parts would be `models/toy/`, `objectives/tasks/toy.py` and a YAML.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from capfilt.data.text.tokenizer import Tokenizer
from capfilt.models.architecture import ArchitectureConfig
from capfilt.models.checkpoints import store
from capfilt.models.family import Family, FamilyCode
from capfilt.models.interface import Model
from capfilt.models.registry import FAMILIES
from capfilt.objectives.interface import LossesAndMetrics, PairBatch, Task
from capfilt.objectives.kinds import TaskConfig, TaskKind
from capfilt.objectives.tasks import PRETRAINING

# ---- models/toy/model.py ----


class ToyConfig(ArchitectureConfig):
    image_size_key = "side"
    family: Literal["toy"] = "toy"
    side: int
    words: int
    width: int

    @property
    def capabilities(self) -> frozenset[str]:
        return frozenset({"encode_image", "encode_text"})

    @property
    def image_size(self) -> int:
        return self.side

    @property
    def vocabulary_size(self) -> int:
        return self.words

    @property
    def num_weights(self) -> int:
        return (3 * self.side**2 + self.words) * self.width


class Toy(Model):
    config: ToyConfig

    def __init__(self, config: ToyConfig):
        super().__init__()
        self.config = config
        self.image, self.text = nn.Linear(3 * config.side**2, config.width), nn.Embedding(config.words, config.width)

    def encode_image(self, images_B3SS: Tensor) -> Tensor:
        return self.image(images_B3SS.flatten(1))[:, None]

    def encode_text(self, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        return (self.text(ids_BT) * mask_BT[..., None]).sum(dim=1, keepdim=True)

    def encode_cls(self, ids_BT: Tensor, lengths: Any) -> Tensor:
        return self.encode_text(ids_BT, (torch.arange(ids_BT.shape[1]) < torch.tensor(lengths)[:, None]).long())

    def project_image(self, tokens_BND: Tensor) -> Tensor:
        return F.normalize(tokens_BND[:, 0], dim=-1)

    def project_text(self, states_BTD: Tensor) -> Tensor:
        return F.normalize(states_BTD[:, 0], dim=-1)

    def similarity(self, image: Tensor, text_TP: Tensor) -> Tensor:
        return image @ text_TP.T


TOY = Family(name="toy", config=ToyConfig, load=lambda: FamilyCode(build=Toy))

# ---- objectives/tasks/toy.py ----


class ToyObjectives(TaskConfig):
    task: Literal["toy"] = "toy"
    losses: dict[Literal["contrast"], float] = {"contrast": 1.0}
    temperature: float = 0.1


class ToyPretraining(Task):
    config: ToyObjectives

    def compute_losses(self, batch: PairBatch, progress: float) -> LossesAndMetrics:
        image = self.model.project_image(self.model.encode_image(batch.images))
        text = self.model.project_text(self.model.encode_text(batch.ids_BT, batch.mask_BT))
        logits = self.model.similarity(image, text) / self.config.temperature
        loss = F.cross_entropy(logits, torch.arange(batch.rows))
        return {"contrast": loss}, {"right": (logits.argmax(dim=1) == torch.arange(batch.rows)).float().mean()}


TOY_PRETRAINING = TaskKind(ToyObjectives, ToyPretraining, {"contrast": frozenset({"encode_image", "encode_text"})})

# ---- a line in each table, and a YAML ----


@pytest.fixture(scope="module", autouse=True)
def added() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES, "toy", TOY)
        patch.setitem(PRETRAINING, "toy", TOY_PRETRAINING)
        yield


YAML = f"family: toy\nside: 24\nwords: {len(Tokenizer.load('world'))}\nwidth: 16\n"

# ----


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory, finished_run: Path) -> list[object]:
    """The words of a pretraining of the toy."""
    model = tmp_path_factory.mktemp("toy") / "toy.yaml"
    model.write_text(YAML)
    sets = {
        "model": model,
        "data": f"{finished_run}/data/human",
        "train.steps": 30,
        "train.log_every": 1,
        "train.loader.batch_size": 16,
        "train.objectives": "{task: toy, temperature: 0.2}",
        "train.optimizer.lr": 0.02,
    }
    return ["pretrain", "blip-tiny", *(word for key, value in sets.items() for word in ("--set", f"{key}={value}"))]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, capfilt: Any, words: list[object]) -> Path:
    out = tmp_path_factory.mktemp("trained")
    done = capfilt(*words, "--out", out, "--json")
    assert done.code == 0, done.err
    return Path(json.loads(done.out)["model"])


def test_it_is_pretrained_with_its_own_task(trained: Path) -> None:
    log = [json.loads(line) for line in (trained.parent / "log.jsonl").read_text().splitlines()]
    assert {"contrast", "right", "grad_norm"} <= log[-1].keys()
    assert "itm" not in log[-1]
    losses = [line["contrast"] for line in log]
    assert sum(losses[-5:]) < 0.95 * sum(losses[:5])
    model = store.load(trained)
    assert type(model) is Toy
    assert model.config.image_size == 24
    assert store.fingerprint(trained).startswith("toy-")


def test_a_recipe_with_objectives_of_another_family_is_refused(
    capfilt: Any, words: list[object], tmp_path: Path
) -> None:
    done = capfilt(*words, "--set", "train.objectives={queue: 0}", "--out", tmp_path / "out")
    assert done.code == 2
    assert "the family toy" in done.line
    assert "set objectives.task=toy" in done.line
    done = capfilt("pretrain", "blip-tiny", "--set", "train.objectives={task: toy}", "--out", tmp_path / "out")
    assert "leave objectives.task out" in done.line
    done = capfilt(*words, "--set", "train.objectives.task=tyo", "--out", tmp_path / "out")
    assert "there is no task 'tyo'. Did you mean 'toy'? There are: " in done.line
    done = capfilt(*words, "--set", "train.objectives.temperatur=1", "--out", tmp_path / "out")
    assert "Did you mean 'temperature'?" in done.line


def test_it_filters_what_a_captioner_of_another_picture_size_writes(
    trained: Path, finished_run: Path, capfilt: Any, tmp_path: Path
) -> None:
    tar = finished_run / "data/web/00000.tar"
    captioner = finished_run / "round-1/captioner"
    assert store.architecture(store.find(str(captioner))).image_size != 24
    done = capfilt("annotate", tar, "--captioner", captioner, "--filter", trained, "--out", tmp_path / "a", "--json")
    assert done.code == 0, done.err
    rows = pq.read_table(tmp_path / "a/annotations/00000.parquet").to_pylist()
    scored = [row for row in rows if row["itc"] is not None]
    assert len(scored) >= 20
    assert {row["source"] for row in scored} == {"web", "synthetic"}
    assert all(row["itm"] is None and -1 <= row["itc"] <= 1 for row in scored)
    select = ["select", tar, "--annotations", tmp_path / "a", "--out", tmp_path / "b", "--json"]
    done = capfilt(*select, "--set", "score=itc", "--set", "threshold=0.0")
    assert done.code == 0, done.err
    kept = json.loads(done.out)["texts"]["kept"]
    assert sum(kept.values()) == sum(row["itc"] >= 0 for row in scored) > 0
    done = capfilt(*select[:-3], "--out", tmp_path / "c", "--set", "score=itm", "--set", "threshold=0.5")
    assert done.code != 0, "there is no itm to select by"
    assert "itm" in done.line


def test_it_is_evaluated_as_what_it_can_do(trained: Path, finished_run: Path, capfilt: Any) -> None:
    done = capfilt("evaluate", trained, finished_run / "data/test", "--set", "rerank=0", "--json")
    assert done.code == 0, done.err
    figures = json.loads(done.out)
    assert figures.keys() == {"retrieval"}
    assert 0 < figures["retrieval"]["tr@10"] <= 100


def test_it_cannot_be_the_captioner(trained: Path, finished_run: Path, capfilt: Any, tmp_path: Path) -> None:
    done = capfilt(
        "annotate", finished_run / "data/web", "--captioner", trained, "--filter", trained, "--out", tmp_path / "out"
    )
    assert done.code == 2
    assert "cannot be the captioner: it cannot decode" in done.line
