"""Two roles on whole batches, against both of them with one image and one text at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from capfilt.data.images.preprocess import ImageFormat, Preprocess
from capfilt.data.sample import Sample, is_text
from capfilt.data.text.tokenizer import Tokenizer
from capfilt.errors import RunError
from capfilt.inference.annotator import Annotator, Text, same_context
from capfilt.inference.batches import Images, NotYetCopied, Pictures
from capfilt.inference.captioners.local import LocalCaptioner
from capfilt.inference.config import DecodeConfig
from capfilt.inference.device import autocast
from capfilt.inference.filters.dual_encoder import DualEncoderFilter
from capfilt.inference.filters.fusion import FusionFilter
from capfilt.inference.local_model import LocalModel, same_vision
from capfilt.inference.timer import StageTimer
from capfilt.models import Blip
from capfilt.models.layers.bert import TextTransformer
from capfilt.models.layers.packed_linear import PackedLinear

MakeBlip = Callable[..., Blip]
CONFIG = DecodeConfig(min_length=3, max_length=14)
SAMPLES = [Sample(f"{i}", b"", "png", "", {"uid": f"{i:032x}"}) for i in range(11)]
FORMAT = ImageFormat(16)
WEB = [["a red circle"], ["a red circle", "photo " * 40], [], [""], ["Photo!"], *(["a tan ring"] for _ in range(6))]


def annotator(
    captioner: Blip, filter_: Blip, captions: int = 3, timer: StageTimer | None = None, fixed: int = 0
) -> Annotator:
    tokenizer = Tokenizer.load("world")
    return Annotator(
        LocalCaptioner(LocalModel(captioner, tokenizer), CONFIG, captions, seed=5, round_=1),
        FusionFilter(LocalModel(filter_, tokenizer), 16),
        timer,
        fixed,
    )


def annotated(engine: Annotator, pixels: Tensor, some: list[int] | None = None) -> list[list[Text]]:
    """The texts of these images, or of all."""
    some = [*range(11)] if some is None else some
    images = Images({FORMAT: pixels[some]})
    return engine.annotate(images, [SAMPLES[i] for i in some], [WEB[i] for i in some])


@pytest.fixture(scope="module")
def captioner_model(small_blip: MakeBlip) -> Blip:
    model = small_blip(seed=1, roles=("decoder",))
    with torch.no_grad():
        model.text.head.bias[3] += 3  # texts of many lengths
    return model


@pytest.fixture(scope="module")
def filter_model(small_blip: MakeBlip) -> Blip:
    return small_blip(seed=2, roles=("encoder",))


@pytest.fixture(scope="module")
def both(small_blip: MakeBlip) -> Blip:
    return small_blip(seed=3)


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    return torch.randn(11, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2


def close(actual: list[list[Text]], wanted: list[list[Text]], far: float = 1e-5) -> None:
    """The same texts, and scores that are at most so far apart."""
    for own, other in zip(actual, wanted, strict=True):
        assert [(t.source, t.candidate, t.text, t.whole) for t in own] == [
            (t.source, t.candidate, t.text, t.whole) for t in other
        ]
        for score in ("itm", "itc"):
            assert [getattr(t, score) for t in own] == pytest.approx([getattr(t, score) for t in other], abs=far)


def one_by_one(captioner_model: Blip, filter_model: Blip, pixels: Tensor) -> list[list[Text]]:
    actual = []
    for i, sample in enumerate(SAMPLES):
        one = annotator(captioner_model, filter_model)
        images = Images({FORMAT: pixels[i : i + 1]})
        (written,) = one.captioner.caption(images, [sample])
        texts = [("web", n, text) for n, text in enumerate(WEB[i])]
        texts += [("synthetic", n, new.text) for n, new in enumerate(written)]
        of_image = []
        for source, number, text in texts:
            scores: list[float | None] = [None, None]
            if is_text(text):  # else there is nothing to read, and no score
                scores = [values[0][0] for values in one.filter.score(images, [[text]]).values() if values]
            of_image.append(Text(source, number, text, *scores, one.filter.reads_all(text)))
        actual.append(of_image)
    return actual


def test_batches_order_and_neighbours_change_nothing(captioner_model: Blip, filter_model: Blip, pixels: Tensor) -> None:
    with torch.inference_mode():
        wanted = one_by_one(captioner_model, filter_model, pixels)
    engine = annotator(captioner_model, filter_model)
    assert not engine.shared_vision
    close(annotated(engine, pixels), wanted)
    order = torch.randperm(11, generator=torch.Generator().manual_seed(1)).tolist()
    for size in (1, 4, 5):
        for start in range(0, 11, size):
            some = order[start : start + size]
            close(annotated(engine, pixels, some), [wanted[i] for i in some])


class LinearShapes(TorchDispatchMode):
    """The shapes of what is multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[tuple[int, ...], ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.linear.default, torch.ops.aten.matmul.default, torch.ops.aten.addmm.default):
            self.seen.add(tuple(tuple(x.shape) for x in args if x is not None))
        return func(*args, **(kwargs or {}))


def test_fixed_batches_have_one_shape_and_the_same_answers(
    captioner_model: Blip, filter_model: Blip, pixels: Tensor
) -> None:
    """Whoever has to look for what a GPU rounds otherwise in another batch finds nothing that depends on neighbours."""
    wanted = annotated(annotator(captioner_model, filter_model), pixels)
    engine = annotator(captioner_model, filter_model, fixed=6)
    engine.vectors = []
    shapes = []
    for some in ([*range(6)], [7], [3, 2], [*range(11)]):
        with LinearShapes() as multiplied:
            close(annotated(engine, pixels, some), [wanted[i] for i in some])
        shapes.append(multiplied.seen)
    assert shapes[0] == shapes[1] == shapes[2] == shapes[3]
    assert len(engine.vectors) == 6 + 1 + 2 + 11, "none of the pictures that fill a batch up"
    with LinearShapes() as multiplied:
        annotated(annotator(captioner_model, filter_model), pixels, [3, 2])
    assert multiplied.seen != shapes[0]


def test_a_copy_that_does_not_fit_is_done_in_halves(
    captioner_model: Blip, filter_model: Blip, monkeypatch: pytest.MonkeyPatch
) -> None:
    rule = ImageFormat(16)
    bytes_of = np.random.default_rng(0).integers(0, 256, (11, 16, 16, 3), dtype=np.uint8)
    given = Pictures(SAMPLES, {rule.resizing: rule.preprocess.stack(list(bytes_of))}, [])
    engine = annotator(captioner_model, filter_model)
    wanted = engine.annotate(given.on(torch.device("cpu"), [rule]), SAMPLES, WEB)
    whole, copied = Pictures.on, list[int]()

    def on(pictures: Pictures, *where: Any) -> Images:
        copied.append(len(pictures.pixels[rule.resizing]))
        if copied[-1] > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(pictures, *where)

    monkeypatch.setattr(Pictures, "on", on)
    close(engine.annotate(NotYetCopied(given, torch.device("cpu"), [rule]), SAMPLES, WEB), wanted)
    assert copied == [11, 5, 2, 2, 2, 2, 2, 1]


def test_a_fixed_batch_that_does_not_fit_is_an_error(
    captioner_model: Blip, filter_model: Blip, pixels: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = annotator(captioner_model, filter_model, fixed=6)

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(engine.captioner, "prepare", full)
    with pytest.raises(RunError, match=r"with 6 pictures at a time, which deterministic keeps.*smaller batch_size"):
        annotated(engine, pixels)


@pytest.mark.parametrize(("format_", "far"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=["fp32", "bf16"])
def test_batches_change_no_text_of_packed_layers(
    small_blip: MakeBlip, pixels: Tensor, format_: torch.dtype, far: float
) -> None:
    shape = {"width": 256, "hidden": 512, "init_std": 0.1}
    engine = annotator(small_blip(seed=1, roles=("decoder",), **shape), small_blip(seed=2, roles=("encoder",), **shape))
    assert any(isinstance(part, PackedLinear) for part in engine.captioner.model.modules())
    with autocast(torch.device("cpu"), format_):
        wanted = annotated(engine, pixels)
        for some in ([3], [5, 0, 10, 7], [*range(4, 11)]):
            close(annotated(engine, pixels, some), [wanted[i] for i in some], far)


def test_texts_that_are_longer_than_the_filter_reads_are_known(
    captioner_model: Blip, filter_model: Blip, pixels: Tensor
) -> None:
    engine = annotator(captioner_model, filter_model)
    actual = annotated(engine, pixels)
    assert [[t.whole for t in own if t.source == "web"] for own in actual[:5]] == [
        [True],
        [True, False],
        [],
        [True],
        [True],
    ]
    for text, whole in (("red " * 14, True), ("red " * 15, False), ("a" * 10_001, False), (". " * 40, True)):
        assert engine.filter.reads_all(text) == whole


class TestWorkIsDoneOnce:
    def test_one_pass_of_the_vision_tower_serves_both_where_it_is_the_same(self, both: Blip, pixels: Tensor) -> None:
        counted, keys = Counted(both.vision), []
        model = copy.deepcopy(both)
        model.vision = counted  # type: ignore[assignment]
        project = TextTransformer.image_context

        def noted(self: TextTransformer, tokens: Tensor, role: str) -> object:
            keys.append(role)
            return project(self, tokens, role)  # type: ignore[arg-type]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(TextTransformer, "image_context", noted)
            engine = annotator(model, model, captions=4)
            actual = annotated(engine, pixels)
        assert engine.shared_vision
        assert engine.shared_context
        assert (counted.batch_sizes, keys) == ([11], ["decoder"])
        apart = annotator(model, model, captions=4)
        assert isinstance(apart.filter, FusionFilter)
        apart.filter.local.tokens_name, apart.filter.context_name = object(), object()
        close(actual, annotated(apart, pixels))

    def test_each_vision_tower_runs_once(self, captioner_model: Blip, filter_model: Blip, pixels: Tensor) -> None:
        one, two = copy.deepcopy(captioner_model), copy.deepcopy(filter_model)
        one.vision, two.vision = Counted(captioner_model.vision), Counted(filter_model.vision)  # type: ignore[assignment]
        annotated(annotator(one, two, captions=10), pixels)
        assert (one.vision.batch_sizes, two.vision.batch_sizes) == ([11], [11])

    def test_what_is_the_same_is_known_by_its_weights(self, both: Blip, small_blip: MakeBlip) -> None:
        again = copy.deepcopy(both)
        assert same_vision(both, again)
        assert same_context(both, again)
        again.vision.norm.eps *= 10  # type: ignore[operator, union-attr]
        assert not same_vision(both, again)
        with torch.no_grad():
            again.text.layers[1].cross_attention.of("encoder").block.value.bias[0] += 1
        assert not same_context(both, again)
        assert not same_context(both, small_blip(seed=3, depth=1))
        apart = small_blip(seed=3, share="none")
        assert not same_context(apart, apart)

    def test_nothing_is_shared_by_models_that_name_no_vision_modules(
        self, both: Blip, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert same_vision(both, both)
        monkeypatch.setattr(Blip, "vision_modules", [])
        assert not same_vision(both, both)


class Counted(nn.Module):
    """A vision tower that counts; more pictures than there is room for run out of memory, as an accelerator does."""

    def __init__(self, vision_modules: nn.Module, room: int = 1000, error: RuntimeError | None = None):
        super().__init__()
        self.vision_modules, self.room, self.error = vision_modules, room, error
        self.batch_sizes: list[int] = []

    def forward(self, images_B3SS: Tensor) -> Tensor:
        self.batch_sizes.append(len(images_B3SS))
        if len(images_B3SS) > self.room:
            raise self.error or torch.OutOfMemoryError("CUDA out of memory")
        tokens: Tensor = self.vision_modules(images_B3SS)
        return tokens


def test_models_may_read_pictures_of_other_sizes_and_normalised_otherwise(
    captioner_model: Blip, small_blip: MakeBlip, pixels: Tensor
) -> None:
    """The texts are those of the captioner's pictures, the scores those of the filter's, each image alone."""
    grey = ImageFormat(24, Preprocess(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)))
    larger = small_blip(seed=2, roles=("encoder",), image_size=24)
    others = torch.randn(11, 3, 24, 24, generator=torch.Generator().manual_seed(1))
    tokenizer = Tokenizer.load("world")
    captioner = LocalCaptioner(LocalModel(captioner_model, tokenizer), CONFIG, 3, seed=5, round_=1)
    filter_ = FusionFilter(LocalModel(larger, tokenizer, grey.preprocess), 16)
    engine = Annotator(captioner, filter_)
    assert not engine.shared_vision
    assert (captioner.image_formats, filter_.image_formats) == ((FORMAT,), (grey,))
    actual = engine.annotate(Images({FORMAT: pixels, grey: others}), SAMPLES, WEB)
    with torch.inference_mode():
        for i, texts in enumerate(actual):
            written = captioner.write(captioner_model.encode_image(pixels[i : i + 1]), [SAMPLES[i].uid])
            assert [text.text for text in texts] == [*WEB[i], *written[0]]
            real = [text for text in texts if is_text(text.text)]
            scores = filter_.score_tokens(larger.encode_image(others[i : i + 1]), [[text.text for text in real]])
            assert [[text.itm for text in real]] == [pytest.approx(row, abs=1e-5) for row in scores["itm"] or []]
            assert [[text.itc for text in real]] == [pytest.approx(row, abs=1e-5) for row in scores["itc"] or []]


def test_equal_weights_that_read_other_pictures_share_nothing(both: Blip) -> None:
    tokenizer = Tokenizer.load("world")
    captioner = LocalCaptioner(LocalModel(both, tokenizer), CONFIG)
    for preprocess, shared in ((Preprocess(), True), (Preprocess(mean=(0.5, 0.5, 0.5)), False)):
        engine = Annotator(captioner, FusionFilter(LocalModel(both, tokenizer, preprocess)))
        assert engine.shared_vision == engine.shared_context == shared


def test_a_filter_that_cannot_fuse_gives_cosines_alone(
    captioner_model: Blip, filter_model: Blip, pixels: Tensor
) -> None:
    tokenizer = Tokenizer.load("world")
    wanted = annotated(annotator(captioner_model, filter_model), pixels)
    captioner = LocalCaptioner(LocalModel(captioner_model, tokenizer), CONFIG, 3, seed=5, round_=1)
    actual = annotated(Annotator(captioner, DualEncoderFilter(LocalModel(filter_model, tokenizer), 16)), pixels)
    assert all(text.itm is None for texts in actual for text in texts)
    close(actual, [[replace(text, itm=None) for text in texts] for texts in wanted])


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_out_of_memory_is_not_the_end(
    captioner_model: Blip, filter_model: Blip, pixels: Tensor, error: RuntimeError
) -> None:
    small = copy.deepcopy(filter_model)
    small.vision = Counted(filter_model.vision, 3, error)  # type: ignore[assignment]
    engine = annotator(captioner_model, small)
    close(annotated(engine, pixels), annotated(annotator(captioner_model, filter_model), pixels))
    assert small.vision.batch_sizes == [11, 5, 2, 2, 2, 2, 2, 1]
    assert engine.oom_backoff.limit == 2
    small.vision.room = 0
    with pytest.raises(RunError, match="one picture at a time"):
        annotated(engine, pixels)


def test_a_timer_sees_the_stages(captioner_model: Blip, filter_model: Blip, pixels: Tensor) -> None:
    timer = StageTimer(torch.device("cpu"))
    annotated(annotator(captioner_model, filter_model, timer=timer), pixels)
    assert set(timer.seconds) == {"copy", "vision", "caption", "score"}
