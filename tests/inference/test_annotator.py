"""Two roles on whole batches, against both of them asked one image and one text at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from capfilt.data.sample import is_text
from capfilt.data.text.tokenizer import Tokenizer
from capfilt.errors import RunError
from capfilt.inference.annotator import Annotator, Text, same_keys, same_vision
from capfilt.inference.captioners.local import Captioner
from capfilt.inference.filters.fusion import Filter
from capfilt.inference.generation.decode import DecodeConfig
from capfilt.inference.timer import StageTimer
from capfilt.models import Blip
from capfilt.models.layers.bert import TextTransformer

MakeBlip = Callable[..., Blip]
CONFIG = DecodeConfig(min_length=3, max_length=14)
UIDS = tuple(f"{i:032x}" for i in range(11))
WEB = [["a red circle"], ["a red circle", "photo " * 40], [], [""], ["Photo!"], *(["a tan ring"] for _ in range(6))]


def annotator(writer: Blip, judge: Blip, captions: int = 3, clock: StageTimer | None = None) -> Annotator:
    tokenizer = Tokenizer.load("world")
    return Annotator(Captioner(writer, tokenizer, CONFIG, captions), Filter(judge, tokenizer, 16), clock)


@pytest.fixture(scope="module")
def writer(small_blip: MakeBlip) -> Blip:
    model = small_blip(seed=1, roles=("decoder",))
    with torch.no_grad():
        model.text.head.bias[3] += 3  # texts of many lengths
    return model


@pytest.fixture(scope="module")
def judge(small_blip: MakeBlip) -> Blip:
    return small_blip(seed=2, roles=("encoder",))


@pytest.fixture(scope="module")
def both(small_blip: MakeBlip) -> Blip:
    return small_blip(seed=3)


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    return torch.randn(11, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2


def close(found: list[list[Text]], wanted: list[list[Text]]) -> None:
    """The same texts, and scores to 1e-5."""
    for own, other in zip(found, wanted, strict=True):
        assert [(t.source, t.candidate, t.text, t.whole) for t in own] == [
            (t.source, t.candidate, t.text, t.whole) for t in other
        ]
        for score in ("itm", "itc"):
            assert [getattr(t, score) for t in own] == pytest.approx([getattr(t, score) for t in other], abs=1e-5)


def one_by_one(writer: Blip, judge: Blip, pixels: Tensor) -> list[list[Text]]:
    found = []
    for i, uid in enumerate(UIDS):
        one = annotator(writer, judge)
        image = pixels[i : i + 1]
        (written,) = one.captioner.write(writer.encode_image(image), [uid], 5, 1)
        texts = [("web", n, text) for n, text in enumerate(WEB[i])]
        texts += [("synthetic", n, text) for n, text in enumerate(written)]
        seen, own = judge.encode_image(image), []
        for source, number, text in texts:
            scores = (
                one.judge.score(seen, [[text]])[0][0] if is_text(text) else (None, None)
            )  # nothing to read, no score
            own.append(Text(source, number, text, *scores, one.judge.reads_all(text)))
        found.append(own)
    return found


def test_batches_order_and_neighbours_change_nothing(writer: Blip, judge: Blip, pixels: Tensor) -> None:
    with torch.inference_mode():
        wanted = one_by_one(writer, judge, pixels)
    engine = annotator(writer, judge)
    assert not engine.shared_vision
    close(engine.annotate(pixels, UIDS, WEB, 5, 1), wanted)
    order = torch.randperm(11, generator=torch.Generator().manual_seed(1)).tolist()
    for size in (1, 4, 5):
        for start in range(0, 11, size):
            some = order[start : start + size]
            found = engine.annotate(pixels[some], [UIDS[i] for i in some], [WEB[i] for i in some], 5, 1)
            close(found, [wanted[i] for i in some])


def test_texts_that_are_longer_than_the_filter_reads_are_known(writer: Blip, judge: Blip, pixels: Tensor) -> None:
    engine = annotator(writer, judge)
    found = engine.annotate(pixels, UIDS, WEB, 5, 1)
    assert [[t.whole for t in own if t.source == "web"] for own in found[:5]] == [
        [True],
        [True, False],
        [],
        [True],
        [True],
    ]
    for text, whole in (("red " * 14, True), ("red " * 15, False), ("a" * 10_001, False), (". " * 40, True)):
        assert engine.judge.reads_all(text) == whole


class TestWorkIsDoneOnce:
    def test_one_pass_of_the_eyes_serves_both_where_they_are_the_same(self, both: Blip, pixels: Tensor) -> None:
        looks, keys = Counted(both.vision), []
        model = copy.deepcopy(both)
        model.vision = looks  # type: ignore[assignment]
        project = TextTransformer.image_context

        def noted(self: TextTransformer, tokens: Tensor, role: str) -> object:
            keys.append(role)
            return project(self, tokens, role)  # type: ignore[arg-type]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(TextTransformer, "image_context", noted)
            engine = annotator(model, model, captions=4)
            found = engine.annotate(pixels, UIDS, WEB, 5, 1)
        assert engine.shared_vision
        assert engine.shared_keys
        assert (looks.asked, keys) == ([11], ["decoder"])
        apart = copy.deepcopy(engine)
        apart.shared_vision = apart.shared_keys = False
        close(found, apart.annotate(pixels, UIDS, WEB, 5, 1))

    def test_each_pair_of_eyes_looks_once(self, writer: Blip, judge: Blip, pixels: Tensor) -> None:
        one, two = copy.deepcopy(writer), copy.deepcopy(judge)
        one.vision, two.vision = Counted(writer.vision), Counted(judge.vision)  # type: ignore[assignment]
        annotator(one, two, captions=10).annotate(pixels, UIDS, WEB, 5, 1)
        assert (one.vision.asked, two.vision.asked) == ([11], [11])

    def test_what_is_the_same_is_known_by_its_weights(self, both: Blip, small_blip: MakeBlip) -> None:
        again = copy.deepcopy(both)
        assert same_vision(both, again)
        assert same_keys(both, again)
        with torch.no_grad():
            again.text.layers[1].cross_attention.of("encoder").block.value.bias[0] += 1
        assert not same_keys(both, again)
        assert not same_keys(both, small_blip(seed=3, depth=1))
        apart = small_blip(seed=3, share="none")
        assert not same_keys(apart, apart)


class Counted(nn.Module):
    """Eyes that count; more pictures than there is room for run out of memory, as an accelerator does."""

    def __init__(self, vision_modules: nn.Module, room: int = 1000, error: RuntimeError | None = None):
        super().__init__()
        self.vision_modules, self.room, self.error = vision_modules, room, error
        self.asked: list[int] = []

    def forward(self, images_B3SS: Tensor) -> Tensor:
        self.asked.append(len(images_B3SS))
        if len(images_B3SS) > self.room:
            raise self.error or torch.OutOfMemoryError("CUDA out of memory")
        tokens: Tensor = self.vision_modules(images_B3SS)
        return tokens


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_out_of_memory_is_not_the_end(writer: Blip, judge: Blip, pixels: Tensor, error: RuntimeError) -> None:
    small = copy.deepcopy(judge)
    small.vision = Counted(judge.vision, 3, error)  # type: ignore[assignment]
    engine = annotator(writer, small)
    close(engine.annotate(pixels, UIDS, WEB, 5, 1), annotator(writer, judge).annotate(pixels, UIDS, WEB, 5, 1))
    assert small.vision.asked == [11, 5, 2, 2, 2, 2, 2, 1]
    assert engine.pieces.limit == 2
    small.vision.room = 0
    with pytest.raises(RunError, match="one picture at a time"):
        engine.annotate(pixels, UIDS, WEB, 5, 1)


def test_a_clock_sees_the_stages(writer: Blip, judge: Blip, pixels: Tensor) -> None:
    clock = StageTimer(torch.device("cpu"))
    annotator(writer, judge, clock=clock).annotate(pixels, UIDS, WEB, 5, 1)
    assert set(clock.seconds) == {"vision", "caption", "score"}
