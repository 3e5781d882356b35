"""What a pretend GPU cannot show: memory that runs out, kernels that are taken, how they round, several GPUs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from capfilt.data.sample import Sample
from capfilt.data.text.tokenizer import Tokenizer
from capfilt.errors import RunError
from capfilt.inference.annotator import Annotator, Text
from capfilt.inference.batches import Images
from capfilt.inference.captioners.local import LocalCaptioner
from capfilt.inference.config import DecodeConfig
from capfilt.inference.device import autocast
from capfilt.inference.filters.fusion import FusionFilter
from capfilt.inference.local_model import LocalModel
from capfilt.models import Model, architecture_of, build

SAMPLES = [Sample(f"{i}", b"", "png", "", {"uid": f"{i:032x}"}) for i in range(64)]
WEB = [["a red circle", "a tan ring on a gray background"]] * 64


@pytest.fixture(scope="module")
def model() -> Model:
    """BLIP of 384 x 6 at 224 px, whose outputs differ."""
    torch.manual_seed(0)
    made = build(architecture_of("blip/small")).eval()
    with torch.no_grad():
        for weight in made.parameters():
            weight += 0.02 * torch.randn(weight.shape)
    return made


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    return torch.randn(64, 3, 224, 224, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def limited(real_gpu: torch.device) -> Iterator[Callable[[int], None]]:
    """Limits what torch may allocate to so many bytes."""

    def limit(size: int) -> None:
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(size / torch.cuda.mem_get_info()[1])

    yield limit
    torch.cuda.set_per_process_memory_fraction(1.0)


def annotator(model: Model) -> Annotator:
    tokenizer, config = Tokenizer.load("world"), DecodeConfig(min_length=3, max_length=20)
    local = LocalModel(model, tokenizer)
    return Annotator(LocalCaptioner(local, config), FusionFilter(local))


def annotate(made: Annotator, pixels: Tensor, rows: slice = slice(None)) -> list[list[Text]]:
    image_format = made.captioner.image_formats[0]
    return made.annotate(Images({image_format: pixels[rows]}), SAMPLES[rows], WEB[rows])


def texts(annotated: list[list[Text]]) -> list[str]:
    return [text.text for of_image in annotated for text in of_image]


def scores(annotated: list[list[Text]]) -> Tensor:
    return torch.tensor([(text.itm, text.itc) for of_image in annotated for text in of_image])


def in_batches(made: Annotator, pixels: Tensor, size: int) -> list[list[Text]]:
    parts = [annotate(made, pixels, slice(start, start + size)) for start in range(0, 64, size)]
    return [of_image for part in parts for of_image in part]


def test_memory_that_runs_out(
    model: Model, pixels: Tensor, real_gpu: torch.device, limited: Callable[[int], None]
) -> None:
    """The batch goes on in halves, and the texts are the same."""
    made, on_gpu = annotator(model.to(real_gpu)), pixels.to(real_gpu)
    annotate(made, on_gpu, slice(4))
    standing = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    wanted = annotate(made, on_gpu)
    limited(standing + (torch.cuda.max_memory_allocated() - standing) // 3)
    found = annotate(made, on_gpu)
    assert made.oom_backoff.limit is not None
    assert made.oom_backoff.limit < 64
    assert texts(found) == texts(wanted)
    limited(standing // 2)
    made.oom_backoff.limit = 1
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RunError, match="one picture at a time"):
        patch.setattr("capfilt.inference.oom_backoff.PAUSES", (0.1,))
        annotate(made, pixels.to(real_gpu))


def test_attention_of_pictures_takes_flash_in_bf16(model: Model, pixels: Tensor, real_gpu: torch.device) -> None:
    """It is an error where no other kernel is allowed and this one cannot be taken."""
    model.to(real_gpu)
    with torch.inference_mode(), autocast(real_gpu, torch.bfloat16), sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        tokens = model.encode_image(pixels[:8].to(real_gpu))
    assert bool(tokens.isfinite().all())


@pytest.mark.parametrize("size", [1, 8, 24])
def test_in_other_batches_texts_are_equal_and_scores_near(
    model: Model, pixels: Tensor, real_gpu: torch.device, size: int
) -> None:
    """In fp32: a token may differ where two are as likely, up to rounding, and then what follows it."""
    made, on_gpu = annotator(model.to(real_gpu)), pixels.to(real_gpu)
    one, other = annotate(made, on_gpu), in_batches(made, on_gpu, size)
    same = [a == b for a, b in zip(texts(one), texts(other), strict=True)]
    assert sum(same) >= 0.98 * len(same)
    equal = torch.tensor(same)
    torch.testing.assert_close(scores(one)[equal], scores(other)[equal], atol=1e-4, rtol=0)


def test_two_gpus_train_as_one_process(tmp_path: Path, real_gpu: torch.device) -> None:
    """NCCL: DDP and FSDP, beside one rank that has the whole batch."""
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    ranks_agree("cuda", tmp_path)


def ranks_agree(device: str, folder: Path) -> None:
    """Two ranks of `ranks_of_trainings.py`, which compare what they trained with one process's."""
    script = Path(__file__).with_name("ranks_of_trainings.py")
    command = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run([*command, device, str(folder)], env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-6000:]
