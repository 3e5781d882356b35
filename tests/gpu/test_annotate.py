"""Captions and scores of a GPU beside those of a CPU, in fp32: the same texts, and the same scores up to rounding."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from gpus import Waits
from torch import Tensor

import capfilt.data.annotations as tables
from capfilt.data.annotations import Annotation
from capfilt.data.images.preprocess import ImageFormat
from capfilt.data.sample import Sample
from capfilt.data.text.tokenizer import Tokenizer
from capfilt.inference.annotator import Annotator, Text
from capfilt.inference.batches import Images
from capfilt.inference.captioners.local import LocalCaptioner
from capfilt.inference.captioners.spec import captioner_spec
from capfilt.inference.config import AnnotateConfig, DecodeConfig, DeviceKind
from capfilt.inference.device import Compute, autocast
from capfilt.inference.filters.fusion import FusionFilter
from capfilt.inference.local_model import LocalModel
from capfilt.models import Blip
from capfilt.models.checkpoints import store
from capfilt.stages.annotation.annotate import AnnotateJob

MakeBlip = Callable[..., Blip]
Texts = Sequence[Sequence[str]]
SAMPLES = [Sample(f"{i}", b"", "png", "", {"uid": f"{i:032x}"}) for i in range(11)]
FORMAT = ImageFormat(16)
WEB = [["a red circle"], ["a red circle", "photo " * 40], [], [""], ["Photo!"], *(["a tan ring"] for _ in range(6))]
METHODS = {
    "nucleus": DecodeConfig(min_length=3, max_length=24),
    "nucleus, penalty, top k": DecodeConfig(min_length=3, max_length=24, repetition_penalty=1.3, top_k=5),
    "greedy, penalty": DecodeConfig(method="greedy", min_length=3, max_length=24, repetition_penalty=1.1),
    "beam": DecodeConfig(method="beam", min_length=3, max_length=24),
    "beam, penalty": DecodeConfig(method="beam", min_length=3, max_length=24, repetition_penalty=1.1),
}


def roles(small_blip: MakeBlip, shared: bool) -> tuple[Blip, Blip]:
    """A captioner that writes texts of many lengths, and a filter: one model, or two."""
    if shared:
        captioner = filter_ = small_blip(seed=3)
    else:
        captioner, filter_ = small_blip(seed=1, roles=("decoder",)), small_blip(seed=2, roles=("encoder",))
    with torch.no_grad():
        captioner.text.head.bias[3] += 3
    return captioner, filter_


def annotate(
    captioner: Blip,
    filter_: Blip,
    pixels: Tensor,
    config: DecodeConfig,
    fixed: int = 0,
    some: Sequence[int] = range(11),
) -> list[list[Text]]:
    tokenizer, captions = Tokenizer.load("world"), 1 if config.method == "greedy" else 3
    made = Annotator(
        LocalCaptioner(LocalModel(captioner, tokenizer), config, captions, seed=5, round_=1),
        FusionFilter(LocalModel(filter_, tokenizer), 16),
        fixed_batches=fixed,
    )
    return made.annotate(Images({FORMAT: pixels[[*some]]}), [SAMPLES[i] for i in some], [WEB[i] for i in some])


@pytest.fixture
def pixels() -> Tensor:
    return torch.randn(11, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2


@pytest.mark.parametrize("shared", [False, True], ids=["two towers", "one tower"])
@pytest.mark.parametrize("method", METHODS)
def test_texts_and_scores_are_those_of_a_cpu(
    small_blip: MakeBlip, pixels: Tensor, cuda: torch.device, method: str, shared: bool
) -> None:
    captioner, filter_ = roles(small_blip, shared)
    wanted = annotate(captioner, filter_, pixels, METHODS[method])
    captioner, filter_ = copy.deepcopy((captioner, filter_))
    found = annotate(captioner.to(cuda), filter_.to(cuda), pixels.to(cuda), METHODS[method])
    for own, other in zip(found, wanted, strict=True):
        assert [(t.source, t.text, t.whole) for t in own] == [(t.source, t.text, t.whole) for t in other]
        for score in ("itm", "itc"):
            values = [getattr(text, score) for text in other]
            assert [getattr(text, score) for text in own] == pytest.approx(values, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_with_deterministic_neighbours_change_no_bit(
    small_blip: MakeBlip, pixels: Tensor, cuda: torch.device, dtype: torch.dtype
) -> None:
    captioner, filter_ = (model.to(cuda) for model in roles(small_blip, shared=False))
    on_gpu, config = pixels.to(cuda), METHODS["nucleus"]
    with autocast(cuda, dtype):
        wanted = annotate(captioner, filter_, on_gpu, config, fixed=4)
        for some in ([7], [3, 2], [5, 10, 0, 1, 4]):
            found = annotate(captioner, filter_, on_gpu, config, fixed=4, some=some)
            assert found == [wanted[i] for i in some]


@pytest.mark.parametrize("method", ["nucleus", "beam"])
def test_every_picture_is_annotated_in_bf16(
    small_blip: MakeBlip, pixels: Tensor, cuda: torch.device, method: str
) -> None:
    captioner, filter_ = roles(small_blip, shared=False)
    with autocast(cuda, torch.bfloat16):
        found = annotate(captioner.to(cuda), filter_.to(cuda), pixels.to(cuda), METHODS[method])
    assert [len(of_image) - len(web) for of_image, web in zip(found, WEB, strict=True)] == [3] * 11
    assert all(text.itm is None or 0 <= text.itm <= 1 for of_image in found for text in of_image)


def save(folder: Path, captioner: Blip, filter_: Blip) -> None:
    """Where `job_of` looks for them."""
    for model, name in ((captioner, "captioner"), (filter_, "filter")):
        store.save(model, folder / name)
        Tokenizer.load("world").save(folder / name)


def job_of(out: Path, device: DeviceKind, config: AnnotateConfig) -> AnnotateJob:
    """Of the models beside `out`."""
    return AnnotateJob(
        out=out,
        captioner=captioner_spec(str(out.parent / "captioner")),
        filter=out.parent / "filter",
        captioner_fingerprint="c",
        filter_fingerprint="f",
        config=config,
        compute=Compute(device=device, precision="fp32"),
        seed=0,
        round=0,
    )


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_worker_s_shard_is_that_of_a_cpu(
    small_blip: MakeBlip, small_world: Path, cuda: torch.device, waits: Waits, tmp_path: Path, deterministic: bool
) -> None:
    """From the tar to the committed table, with the clock of the stages, for which nobody waits."""
    save(tmp_path, *roles(small_blip, shared=False))
    url = str(small_world / "human" / "00000.tar")

    def rows(device: DeviceKind) -> list[Annotation]:
        config = AnnotateConfig(batch_size=6, decode=METHODS["nucleus"], deterministic=deterministic)
        job = job_of(tmp_path / device, device, config)
        report = job.open()(url)
        assert {"copy", "vision", "caption", "score"} <= report.seconds.keys()
        (table,) = (tmp_path / device / "annotations").glob("*.parquet")
        return list(tables.rows(tables.read(table)))

    wanted = rows("cpu")
    with waits() as found:
        annotated = rows("cuda")
    for one, other in zip(annotated, wanted, strict=True):
        assert (one.key, one.source, one.text) == (other.key, other.source, other.text)
        assert (one.itm, one.itc) == pytest.approx((other.itm, other.itc), abs=1e-5)
    work = [line for line in found if "timer" not in line]
    assert found[: len(work)] == work, "the clock is read when all is done"


def test_batches_grow_until_memory_runs_out(
    small_blip: MakeBlip, small_world: Path, cuda: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if the default were 2 and any growth were faster; the worker remembers what fits, and texts are the same."""
    monkeypatch.setattr("capfilt.inference.batch_growth.BATCHES", 1)
    monkeypatch.setattr("capfilt.inference.batch_growth.GAIN", 0)
    work, whole = Annotator._annotate, list[int]()

    def limited(self: Annotator, images: Images, samples: list[Sample], web: Texts, count: int) -> list[list[Text]]:
        if len(samples) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        whole.append(len(samples))
        return work(self, images, samples, web, count)

    save(tmp_path, *roles(small_blip, shared=False))
    config = AnnotateConfig(batch_size=2, decode=METHODS["nucleus"])
    shards = [str(small_world / "human" / f"0000{n}.tar") for n in range(3)]

    def annotated(device: DeviceKind, urls: list[str]) -> list[list[tuple[str, str]]]:
        job = job_of(tmp_path / f"{device} {len(config.model_fields_set)}", device, config)
        annotate_shard = job.open()
        for url in urls:
            annotate_shard(url)
        files = sorted(map(str, (job.out / "annotations").glob("*.parquet")))
        return [[(row.key, row.text) for row in tables.rows(tables.read(file))] for file in files]

    wanted = annotated("cpu", shards)
    monkeypatch.setattr(Annotator, "_annotate", limited)
    assert annotated("cuda", shards[:1]) == wanted[:1]
    assert set(whole) == {2}, "what was set stays"
    whole.clear()
    config.model_fields_set.remove("batch_size")
    assert annotated("cuda", shards) == wanted
    assert whole[0] == 2
    assert whole[-4:] == [4] * 4, "the last shard"
