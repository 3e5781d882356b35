"""A VLMo goes through the verbs: texts alone, then pairs, then a filter beside a captioner of another family."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from capfilt.data import shards
from capfilt.data.sample import Sample
from capfilt.models.checkpoints import store
from capfilt.models.vlmo.model import Vlmo

VISION = "{image_size: 32, patch_size: 16, width: 16, depth: 2, heads: 2, hidden: 32, fused: FUSED, init_std: 0.25}"
TEXT = "{vocab_size: 195, width: 16, max_positions: 32, longest: 40, init_std: 0.25}"


def trained(capfilt: Any, folder: Path, data: Path, fused: int, objectives: str, *more: str) -> Path:
    model = folder / f"mite-{fused}.yaml"
    outputs = "[mlm]" if not fused else "[mlm, itm, itc, itc_fused]"
    vision = VISION.replace("FUSED", str(fused))
    model.write_text(f"family: vlmo\nvision: {vision}\ntext: {TEXT}\noutputs: {outputs}\n")
    sets = (
        f"model={model}",
        f"data={data}",
        "train.steps=8",
        "train.log_every=1",
        "train.loader.batch_size=16",
        f"train.objectives={objectives}",
        "train.optimizer.lr=0.01",
        "resources={workers: 1}",
        *more,
    )
    words = [word for assignment in sets for word in ("--set", assignment)]
    done = capfilt("pretrain", "blip-tiny", *words, "--out", folder / f"run-{fused}", "--json")
    assert done.code == 0, done.err
    return Path(json.loads(done.out)["model"])


@pytest.fixture(scope="module")
def stages(capfilt: Any, finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The models that texts alone and then pairs leave."""
    folder, data = tmp_path_factory.mktemp("vlmo"), finished_run / "data/human"
    lines, samples = folder / "texts.txt", shards.read(str(data / "00000.tar"))
    captions = [caption["text"] for sample in samples if isinstance(sample, Sample) for caption in sample.captions]
    lines.write_text("\n".join(captions))
    texts = trained(capfilt, folder, lines, 0, "{task: vlmo-texts}")
    return texts, trained(capfilt, folder, data, 1, "{task: vlmo, gather_with_grad: true}", f"start={texts}")


def test_texts_train_their_experts_and_pairs_go_on_from_them(stages: tuple[Path, Path]) -> None:
    logs = [[json.loads(line) for line in (model.parent / "log.jsonl").read_text().splitlines()] for model in stages]
    assert logs[0][-1]["mlm"] < logs[0][0]["mlm"]
    assert {"itc", "itm", "mlm", "itm_accuracy"} <= logs[1][-1].keys()
    assert "itc" not in logs[0][0]
    texts, pairs = (store.load(model) for model in stages)
    assert isinstance(texts, Vlmo)
    assert isinstance(pairs, Vlmo)
    assert "fused" not in texts.blocks[1].experts
    assert "fused" in pairs.blocks[1].experts


def test_texts_without_pictures_train_nothing_that_reads_pictures(
    stages: tuple[Path, Path], capfilt: Any, tmp_path: Path
) -> None:
    (lines,) = stages[0].parents[2].glob("texts.txt")
    done = capfilt("pretrain", "vlmo-tiny", "--set", f"data={lines}", "--out", tmp_path / "run")
    assert done.code == 2
    assert "texts.txt holds texts without pictures, and these objectives read pictures" in done.line


def test_it_filters_beside_a_blip(stages: tuple[Path, Path], finished_run: Path, capfilt: Any, tmp_path: Path) -> None:
    tar, captioner = finished_run / "data/web/00000.tar", finished_run / "round-1/captioner"
    done = capfilt("annotate", tar, "--captioner", captioner, "--filter", stages[1], "--out", tmp_path / "a", "--json")
    assert done.code == 0, done.err
    rows = pq.read_table(tmp_path / "a/annotations/00000.parquet").to_pylist()
    scored = [row for row in rows if row["itc"] is not None]
    assert len(scored) >= 20
    assert all(0 <= row["itm"] <= 1 and -1 <= row["itc"] <= 1 for row in scored)
    assert torch.tensor([row["itm"] for row in scored]).std() > 0
    done = capfilt("evaluate", stages[1], finished_run / "data/test", "--set", "rerank=4", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out).keys() == {"retrieval"}


def test_what_it_cannot_do_is_said_first(
    stages: tuple[Path, Path], finished_run: Path, capfilt: Any, tmp_path: Path
) -> None:
    tar = finished_run / "data/web/00000.tar"
    for captioner, filter_model, why in (
        (stages[1], stages[1], "cannot be the captioner: it cannot decode"),
        (finished_run / "round-1/captioner", stages[0], "cannot be the filter: it cannot encode_text"),
    ):
        done = capfilt("annotate", tar, "--captioner", captioner, "--filter", filter_model, "--out", tmp_path / "x")
        assert done.code == 2
        assert why in done.line


def test_an_export_is_a_pt_that_is_read_again(stages: tuple[Path, Path], capfilt: Any, tmp_path: Path) -> None:
    done = capfilt("export", stages[1], "--as", "pth", "--out", tmp_path / "out")
    assert done.code == 0, done.err
    again, model = store.load(tmp_path / "out/model.pt"), store.load(stages[1])
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    done = capfilt("export", stages[1], "--as", "hf", "--out", tmp_path / "hf")
    assert "transformers has no model of the family vlmo" in done.line
