"""The public heads, from files in their layouts, against the modules that their authors train."""

from __future__ import annotations

import itertools

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from capfilt.errors import ModelError
from capfilt.inference.scores.heads import HeadScorer, read_layout


class OnUnitVectors:
    """What a scorer asks of a model, without the model."""

    device = torch.device("cpu")

    class model:
        class config:
            feature_width = 8


class Layers(nn.Module):
    """As LAION's classes hold them."""

    def __init__(self, *modules):
        super().__init__()
        self.layers = nn.Sequential(*modules)

    def forward(self, x):
        return self.layers(x)


def sequential(*modules):
    return Layers(*modules).eval()


class Autokeras(nn.Module):
    """The layout of LAION's detector for L/14, with narrower layers."""

    def __init__(self):
        super().__init__()
        self.norm = nn.Module()
        self.norm.register_buffer("mean", torch.randn(8))
        self.norm.register_buffer("variance", torch.rand(8) + 0.1)
        sizes = (8, 6, 12, 5, 1)
        for number, (inputs, outputs) in enumerate(itertools.pairwise(sizes), 1):
            setattr(self, f"linear_{number}", nn.Linear(inputs, outputs))

    def forward(self, x):
        x = (x - self.norm.mean) / self.norm.variance.sqrt()
        for number in (1, 2, 3):
            x = getattr(self, f"linear_{number}")(x).relu()
        return self.linear_4(x).sigmoid()


def drop(inputs, outputs):
    return nn.Linear(inputs, outputs), nn.Dropout(0.5)


def relu(inputs, outputs):
    return nn.Linear(inputs, outputs), nn.ReLU(), nn.Dropout(0.5)


PUBLIC = {
    "aesthetic v1": lambda: nn.Linear(8, 1),
    "aesthetic v2": lambda: sequential(*drop(8, 9), *drop(9, 6), *drop(6, 5), nn.Linear(5, 4), nn.Linear(4, 1)),
    "aesthetic v2, relu": lambda: sequential(
        *relu(8, 9), *relu(9, 6), *relu(6, 5), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 1)
    ),
    "nsfw h14": lambda: sequential(
        *relu(8, 9), *relu(9, 12), *relu(12, 9), *relu(9, 5), *relu(5, 4), nn.Linear(4, 3), nn.Linear(3, 1)
    ),
    "nsfw l14": Autokeras,
}


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_head_gives_what_its_own_module_gives(name, tmp_path):
    torch.manual_seed(6)
    head = PUBLIC[name]()
    save_file(head.state_dict(), tmp_path / "head.safetensors")
    scorer = HeadScorer(OnUnitVectors, tmp_path / "head.safetensors", None)
    vectors = nn.functional.normalize(torch.randn(16, 8), dim=1)
    with torch.no_grad():
        expected = head(vectors)[:, 0]
    torch.testing.assert_close(scorer.apply(vectors), expected)
    assert expected.std() > 1e-4, "or this test compares constants"


def test_a_detector_stays_within_0_and_1_and_metadata_may_ask_for_a_sigmoid(tmp_path):
    weights = {"weight": torch.full((1, 8), 9.0), "bias": torch.zeros(1)}
    vectors = torch.eye(8)[:2] * torch.tensor([[1.0], [-1.0]])
    save_file(weights, tmp_path / "a.safetensors")
    assert HeadScorer(OnUnitVectors, tmp_path / "a.safetensors", (0, 1)).apply(vectors).tolist() == [1, 0]
    save_file(weights, tmp_path / "b.safetensors", metadata={"output": "sigmoid"})
    squashed = HeadScorer(OnUnitVectors, tmp_path / "b.safetensors", (0, 1)).apply(vectors)
    torch.testing.assert_close(squashed, torch.tensor([9.0, -9.0]).sigmoid())


def linear(width=8, outputs=1):
    return {"weight": torch.zeros(outputs, width), "bias": torch.zeros(outputs)}


@pytest.mark.parametrize(
    ("tensors", "error"),
    [
        (linear(width=768), r"weight is of \[1, 768\], and the vectors of clip/ have 8"),
        (linear(outputs=5), "gives one number for a vector of 8; this one gives 5"),
        ({**linear(), "extra": torch.zeros(1)}, "has bias, extra, weight; a head has weight, bias"),
        ({f"layers.{n}.{part}": torch.zeros(1) for n in (0, 2, 5) for part in ("weight", "bias")}, "has layers.0.bias"),
        (
            {**PUBLIC["nsfw l14"]().state_dict(), "linear_5.weight": torch.zeros(1)},
            "lacks or does not use linear_5.weight",
        ),
    ],
)
def test_what_is_no_head_for_the_model_is_refused_by_name(tensors, error, tmp_path):
    save_file(tensors, tmp_path / "head.safetensors")
    with pytest.raises(ModelError, match=error):
        read_layout(tmp_path / "head.safetensors", 8, "clip/")


def test_a_pickle_is_no_head(tmp_path):
    torch.save(linear(), tmp_path / "head.safetensors")
    with pytest.raises(ModelError, match="is no head in safetensors"):
        read_layout(tmp_path / "head.safetensors", 8, "clip/")
