from __future__ import annotations

import weakref
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import vlms
from finished_run import paint, write_colours
from PIL import Image

from capfilt.data import shards
from capfilt.data.images.decode import decode
from capfilt.data.sample import Sample
from capfilt.data.synthetic import world
from capfilt.errors import DataError, RunError
from capfilt.evaluation.metrics.captioning import cider
from capfilt.inference.captioners.vlm.captioner import VlmCaptioner
from capfilt.inference.captioners.vlm.inputs import Processor
from capfilt.inference.config import AnnotateConfig
from capfilt.training import vision_language
from capfilt.training.config import SmallVlmConfig, TeachCaptionerConfig
from capfilt.training.vision_language import IGNORED, LABELS, Teaching, teach

CPU, PROMPT = torch.device("cpu"), "Describe this image in one or two sentences. Answer with the description only."
SMALL = SmallVlmConfig(patch_size=16, width=32, vision_depth=1, text_depth=1, heads=2, vocabulary=320)


def taught(
    folder: Path, urls: list[str], config: TeachCaptionerConfig, start: Path | None = None, seed: int = 0
) -> Path:
    folder.mkdir(parents=True)
    teach(folder, start, urls, PROMPT, config, seed, CPU, torch.float32)
    return folder


def captions(folder: Path, urls: list[str]) -> tuple[list[str], list[Sample]]:
    """What a model writes about pictures, as `--captioner hf:` has it write, greedily."""
    config = AnnotateConfig.model_validate({"decode": {"method": "greedy"}, "vlm": {"max_new_tokens": 24, "rules": []}})
    captioner = VlmCaptioner.load(folder, config, 0, 0, CPU, torch.float32)
    samples = [sample for url in urls for sample in shards.read(url) if isinstance(sample, Sample)]
    written = captioner.caption(None, samples)  # type: ignore[arg-type]  (it reads the samples' own bytes)
    return [of_image[0].text for of_image in written], samples


@pytest.fixture(scope="module")
def colours(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    home = tmp_path_factory.mktemp("colours")
    return {split: shards.expand(folder) for split, folder in write_colours(home).items()}


@pytest.mark.slow
def test_a_new_model_learns_to_name_what_it_sees(tmp_path: Path, colours: dict[str, list[str]]) -> None:
    config = TeachCaptionerConfig(shape=SMALL, steps=120, batch_size=16, lr=3e-3)
    written, samples = captions(taught(tmp_path / "model", colours["human"], config), colours["test"])
    right = [str(sample.captions[0]["text"]) for sample in samples]
    assert len(set(right)) == 4
    assert written == right


def test_the_same_seed_teaches_the_same_bytes(tmp_path: Path, colours: dict[str, list[str]]) -> None:
    config = TeachCaptionerConfig(shape=SMALL, steps=2, batch_size=4)
    folders = [
        taught(tmp_path / name, colours["human"], config, seed=seed) for name, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    a, b, c = ({path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders)
    assert a == b
    assert [name for name in a if a[name] != c[name]] == ["model.safetensors"]


@pytest.mark.parametrize("kind", vlms.KINDS)
@pytest.mark.slow
def test_a_published_model_is_fine_tuned_whatever_its_kind(
    tmp_path: Path, colours: dict[str, list[str]], kind: str
) -> None:
    start = vlms.save(kind, tmp_path / "start", texts=(*vlms.TEXTS, "red green blue white"))
    config = TeachCaptionerConfig(start=str(start), steps=12, batch_size=4, lr=1e-3)
    folder = tmp_path / "model"
    folder.mkdir()
    learned = [
        teach(
            folder, start, colours["human"], PROMPT, config.model_copy(update={"steps": steps}), 0, CPU, torch.float32
        )
        for steps in (1, 12)
    ]
    assert learned[1] < 0.8 * learned[0]
    assert (folder / "tokenizer.json").read_bytes() == (start / "tokenizer.json").read_bytes()
    written, _ = captions(folder, colours["test"])
    assert len(written) == 8


@pytest.mark.parametrize("kind", vlms.KINDS)
def test_only_the_answers_are_learned_each_to_its_end(tmp_path: Path, kind: str) -> None:
    processor = Processor(vlms.save(kind, tmp_path / kind))
    seen: list[list[int]] = []

    class Model(torch.nn.Module):
        def forward(self, **inputs: torch.Tensor) -> object:
            seen.extend([int(token) for token in row if token != IGNORED] for row in inputs[LABELS])
            assert inputs[LABELS].shape == inputs["input_ids"].shape == inputs["attention_mask"].shape
            assert bool((inputs["attention_mask"][inputs[LABELS] != IGNORED] == 1).all())
            return type("Output", (), {"loss": torch.ones(())})

    teaching = Teaching(Model(), processor, PROMPT, CPU, torch.float32)
    texts = ("a red ball", "two people walk along a beach at sunset")
    answers = [teaching.answer(text, 64) for text in texts]
    assert [processor.text(answer) for answer in answers] == list(texts)
    assert all(answer[-1] == processor.tokenizer.eos_token_id for answer in answers)
    picture = decode(paint("PNG", size=40))
    assert float(teaching.loss([(picture, answer) for answer in answers])) == 1.0
    assert sorted(seen) == sorted(answers)
    assert teaching.answer(texts[1], 3) == [], "too long"
    assert teaching.answer(f"a {processor.tokenizer.eos_token} b", 64) == [], "it would end the answer"


def test_where_there_is_nothing_to_learn_it_says_so(tmp_path: Path) -> None:
    shards.write(tmp_path / "00000.tar", [Sample("0", b"no picture", "png", "a text", {})])
    with pytest.raises(DataError, match=r"none of the 1 shards .* has a picture that can be read with a text"):
        taught(tmp_path / "model", [str(tmp_path / "00000.tar")], TeachCaptionerConfig(shape=SMALL, steps=1))


def test_pictures_wait_encoded(tmp_path: Path, colours: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand large ones, decoded, would fill any memory."""
    made = list[weakref.ref[Image.Image]]()

    def counted(image: bytes) -> Image.Image:
        picture = decode(image)
        made.append(weakref.ref(picture))
        return picture

    monkeypatch.setattr(vision_language, "decode", counted)
    vision_language.make(tmp_path, SMALL, ["a red square"], PROMPT)
    teaching = Teaching(torch.nn.Identity(), Processor(tmp_path), PROMPT, CPU, torch.float32)
    drawn = vision_language.draws(colours["human"], teaching, 64, np.random.default_rng(0))
    pictures = [next(drawn)[0] for _ in range(3)]
    assert len(made) > 10
    assert len(pictures) <= sum(one() is not None for one in made) <= 5


def test_a_loss_that_is_no_number_ends_the_training(tmp_path: Path, colours: dict[str, list[str]]) -> None:
    with pytest.raises(RunError, match=r"the captioner's loss is (nan|inf) at step \d; take a lower lr than 1e\+30"):
        taught(tmp_path / "m", colours["human"], TeachCaptionerConfig(shape=SMALL, steps=9, batch_size=2, lr=1e30))


@pytest.mark.slow
def test_on_the_world_it_says_more_than_any_one_caption_could(tmp_path: Path) -> None:
    config = world.WorldConfig(web=1, human=200, test=60)
    for split in ("human", "test"):
        world.write(config, 0, tmp_path, split)
    urls = {split: shards.expand(str(tmp_path / split)) for split in ("human", "test")}
    folder = taught(tmp_path / "model", urls["human"], TeachCaptionerConfig(steps=200))
    written, samples = captions(folder, urls["test"])
    references = [[str(caption["text"]) for caption in sample.captions] for sample in samples]
    common = [text for text, _ in Counter(text for each in references for text in each).most_common(20)]
    constant = max(cider([text] * len(references), references)["cider"] for text in common)
    assert cider(written, references)["cider"] > 1.2 * constant
