"""The embedded world against an independent reader, which parses its texts and checks them on its scenes."""

from __future__ import annotations

import gc
import io
import json
import re
import warnings
from collections import Counter
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError
from world_reader import MEANING, SIDES, SLOTS, parse, true_of

from capfilt.data.sample import Sample
from capfilt.data.synthetic import world
from capfilt.data.synthetic.world import HELD_OUT, Scene, WorldConfig
from capfilt.errors import DataError

SEED = 7
CONFIG = WorldConfig()
MANY = 1500

PAINTS = {
    "red": (222, 24, 32), "yellow": (250, 230, 40), "green": (20, 165, 55),
    "blue": (60, 105, 255), "purple": (165, 50, 205), "white": (250, 250, 250),
}  # fmt: skip


def one_word_off(said: dict[str, Any]) -> list[dict[str, Any]]:
    variants = []
    for i, phrase in enumerate(said["phrases"]):
        for slot in phrase:
            for value in SLOTS[slot]:
                phrases = [dict(p) for p in said["phrases"]]
                phrases[i][slot] = value
                variants.append({**said, "phrases": phrases})
    if said["relation"] is not None:
        variants += [{**said, "relation": (side, *said["relation"][1:])} for side in SIDES]
    return variants


@pytest.fixture(scope="module")
def web() -> list[tuple[Scene, Sample]]:
    indices = range(MANY)
    return [(world.scene(CONFIG, SEED, "web", i), world.sample(CONFIG, SEED, "web", i)) for i in indices]


def of_kind(web: list[tuple[Scene, Sample]], kind: str) -> list[tuple[Scene, str]]:
    found = [(scene, sample.text) for scene, sample in web if sample.meta["truth"]["kind"] == kind]
    assert len(found) > 30
    return found


def test_a_sample_depends_on_its_arguments_alone() -> None:
    forwards = [world.sample(CONFIG, SEED, split, i) for split in world.SPLITS for i in range(6)]
    backwards = [world.sample(CONFIG, SEED, split, i) for split in reversed(world.SPLITS) for i in reversed(range(6))]
    assert forwards == backwards[::-1]
    assert len({sample.image for sample in forwards}) == len(forwards)
    assert len({sample.meta["uid"] for sample in forwards}) == len(forwards)
    assert world.sample(CONFIG, SEED + 1, "web", 0).image != forwards[0].image


def test_the_pictures_do_not_depend_on_the_noise() -> None:
    clean, wrong = WorldConfig(noise=0), WorldConfig(noise=1)
    for i in range(20):
        a, b = world.sample(clean, SEED, "web", i), world.sample(wrong, SEED, "web", i)
        assert (a.image, a.meta["uid"]) == (b.image, b.meta["uid"])
        assert a.text != b.text


def test_right_and_human_captions_are_true(web: list[tuple[Scene, Sample]]) -> None:
    for scene, text in of_kind(web, "right"):
        assert true_of(scene, parse(text)), (scene, text)
    for split in ("human", "val", "test"):
        for i in range(60):
            scene = world.scene(CONFIG, SEED, split, i)
            for caption in world.sample(CONFIG, SEED, split, i).meta["captions"]:
                assert true_of(scene, parse(caption["text"])), (scene, caption)


def test_attribute_corruptions_are_false_by_one_word(web: list[tuple[Scene, Sample]]) -> None:
    for scene, text in of_kind(web, "attribute"):
        said = parse(text)
        assert not true_of(scene, said), (scene, text)
        assert any(true_of(scene, variant) for variant in one_word_off(said)), (scene, text)


def test_attribute_corruptions_touch_every_kind_of_word(web: list[tuple[Scene, Sample]]) -> None:
    touched: Counter[str] = Counter()
    for scene, text in of_kind(web, "attribute"):
        said = parse(text)
        for variant in one_word_off(said):
            if true_of(scene, variant):
                pairs = zip(variant["phrases"], said["phrases"], strict=True)
                slots = [slot for new, old in pairs for slot in new if new[slot] != old[slot]]
                touched[slots[0] if slots else "relation"] += 1
                break
    assert set(touched) == {*SLOTS, "relation"}
    assert min(touched.values()) > 10


def test_attribute_corruptions_are_not_obvious_from_their_words(web: list[tuple[Scene, Sample]]) -> None:
    for _, text in of_kind(web, "attribute"):
        pairs = [(phrase["colour"], phrase["shape"]) for phrase in parse(text)["phrases"]]
        assert len(set(pairs)) == len(pairs), text
        looks = {
            tuple(phrase.get(slot) for slot in ("colour", "shape", "size", "texture"))
            for phrase in parse(text)["phrases"]
        }
        assert not HELD_OUT & looks, text


def test_other_captions_are_false(web: list[tuple[Scene, Sample]]) -> None:
    for scene, text in of_kind(web, "other"):
        assert not true_of(scene, parse(text)), (scene, text)


def test_boilerplate_file_names_and_stumps_say_nothing_true(web: list[tuple[Scene, Sample]]) -> None:
    for _, text in of_kind(web, "boilerplate"):
        assert not re.search("|".join((*SLOTS["colour"], *SLOTS["shape"], "crimson", "disc")), text.lower())
    for scene, text in of_kind(web, "seo"):
        words = text.lower().strip(".").split()
        shown = {word for thing in scene.things for word in (thing.colour, thing.shape)}
        assert not shown & set(words), (scene, text)
    for _, text in of_kind(web, "truncated"):
        assert 1 <= len(text.split()) <= 2
        assert not {MEANING.get(w, w) for w in text.lower().strip(".").split()} & set(SLOTS["shape"]), text


def test_kinds_come_in_the_stated_shares(web: list[tuple[Scene, Sample]]) -> None:
    found = Counter(sample.meta["truth"]["kind"] for _, sample in web)
    shares = {kind: CONFIG.noise * weight / sum(CONFIG.kinds.values()) for kind, weight in CONFIG.kinds.items()}
    shares["right"] = 1 - CONFIG.noise
    assert set(found) == set(shares)
    for kind, share in shares.items():
        spread = (MANY * share * (1 - share)) ** 0.5
        assert abs(found[kind] - MANY * share) < 4 * spread, (kind, found[kind], share)
    for _, sample in web:
        assert sample.meta["truth"]["matches"] == (sample.meta["truth"]["kind"] == "right")


@pytest.mark.parametrize("kind", world.KINDS)
def test_weights_choose_the_kind(kind: str) -> None:
    config = WorldConfig(noise=1, kinds={kind: 2})
    assert {world.sample(config, SEED, "web", i).meta["truth"]["kind"] for i in range(40)} == {kind}


def test_no_noise_means_all_right() -> None:
    truths = [world.sample(WorldConfig(noise=0), SEED, "web", i).meta["truth"] for i in range(100)]
    assert all(truth == {"matches": True, "kind": "right"} for truth in truths)


def test_held_out_appearances_are_in_every_test_scene_and_nowhere_else(web: list[tuple[Scene, Sample]]) -> None:
    for split in world.SPLITS:
        for i in range(300):
            looks = {thing.appearance for thing in world.scene(CONFIG, SEED, split, i).things}
            assert bool(HELD_OUT & looks) == (split == "test")
    # A word, or a colour with a shape, that only the test split shows could not be learnt at all.
    for part, words in enumerate((SLOTS["colour"], SLOTS["shape"], SLOTS["size"], SLOTS["texture"])):
        assert {thing.appearance[part] for scene, _ in web for thing in scene.things} == set(words)
    every_pair = {(colour, shape) for colour in SLOTS["colour"] for shape in SLOTS["shape"]}
    assert {thing.pair for scene, _ in web for thing in scene.things} == every_pair


def test_things_barely_touch_and_no_relation_is_borderline(web: list[tuple[Scene, Sample]]) -> None:
    """A large thing off the middle of its cell may stick out of it, by a fiftieth of the side at most."""
    out = 0.02
    numbers: Counter[int] = Counter()
    for scene, _ in web:
        numbers[len(scene.things)] += 1
        for thing in scene.things:
            assert thing.radius - out <= thing.x <= 1 - thing.radius + out
            assert thing.radius - out <= thing.y <= 1 - thing.radius + out
        for a, b in permutations(scene.things, 2):
            assert max(abs(a.x - b.x), abs(a.y - b.y)) > a.radius + b.radius - 2 * out
            assert all(not 0.17 < abs(d) < 0.33 for d in (a.x - b.x, a.y - b.y))
    assert set(numbers) == {1, 2, 3}
    assert numbers[1] > numbers[2] > numbers[3] > 0


@pytest.mark.parametrize("side", [32, 48, 64])
def test_the_picture_shows_the_scene(side: int) -> None:
    """The colour where a thing should be is nearest to the one the scene names, through JPEG and noise."""
    config, names = WorldConfig(image_size=side), list(PAINTS)
    seen = 0
    for i in range(120):
        scene = world.scene(config, SEED, "web", i)
        image = Image.open(io.BytesIO(world.sample(config, SEED, "web", i).image)).convert("RGB")
        assert image.size == (side, side)
        pixels = np.asarray(image, np.float32)
        for thing in scene.things:
            if thing.texture != "solid":
                continue
            x = thing.x + (0.8 * thing.radius if thing.shape == "ring" else 0)
            found = pixels[int(thing.y * side), int(x * side)]
            distances = [np.linalg.norm(found - np.asarray(PAINTS[name])) for name in names]
            assert names[int(np.argmin(distances))] == thing.colour, (thing, found)
            seen += 1
    assert seen > 40


def test_textures_can_be_told_apart_by_their_dark_part() -> None:
    def darkness(texture: str, size: str) -> float:
        thing = world.Thing("square", "white", size, texture, 0.5, 0.5, 0.225 if size == "large" else 0.14)
        pixels = world.paint(Scene((thing,), "gray"), 48, np.random.default_rng(3)).astype(float)
        reach = int(thing.radius * 48 * 0.75)
        return float((pixels[24 - reach : 24 + reach, 24 - reach : 24 + reach].mean(2) < 150).mean())

    for size in SLOTS["size"]:
        assert darkness("solid", size) == 0
        assert 0.1 < darkness("striped", size) < 0.65


def test_both_formats_appear_and_open(web: list[tuple[Scene, Sample]]) -> None:
    formats = Counter()
    for _, sample in web[:100]:
        found = Image.open(io.BytesIO(sample.image)).format
        assert {"png": "PNG", "jpg": "JPEG"}[sample.extension] == found
        formats[found] += 1
    assert min(formats["PNG"], formats["JPEG"]) > 20


def test_clean_captions_differ_and_tell_colour_and_shape() -> None:
    for i in range(100):
        sample = world.sample(CONFIG, SEED, "human", i)
        texts = [caption["text"] for caption in sample.meta["captions"]]
        assert len(set(texts)) == 5
        assert sample.text == texts[0] == sample.meta["caption"]
        assert {caption["source"] for caption in sample.meta["captions"]} == {"human"}
        assert "truth" not in sample.meta


def test_captions_repeat_only_when_there_are_no_more() -> None:
    scene = world.scene(WorldConfig(objects=(1, 0, 0)), SEED, "web", 0)
    texts = world.captions(scene, np.random.default_rng(0), 500)
    assert len(texts) == 500
    assert 20 < len(set(texts)) < 500


def test_metadata_is_that_of_img2dataset(web: list[tuple[Scene, Sample]]) -> None:
    config = WorldConfig(shard_size=10)
    sample = world.sample(config, SEED, "web", 123)
    assert sample.key == sample.meta["key"] == "000120003"
    assert re.fullmatch("[0-9a-f]{32}", sample.meta["uid"])
    assert sample.meta["sha256"] == sample.sha256
    assert sample.meta["status"] == "success"
    assert sample.meta["url"].startswith("https://world.invalid/")
    assert {sample.meta[k] for k in ("width", "height", "original_width", "original_height")} == {32}
    assert "captions" not in sample.meta


def test_vocabulary_is_small_fixed_and_covers_any_ascii_text() -> None:
    words = world.vocabulary()
    assert words == world.vocabulary()
    assert words[:5] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert len(set(words)) == len(words) < 300
    assert all(word == word.lower() for word in words[5:])
    for code in range(33, 127):
        character = chr(code).lower()
        assert character in words
        assert not character.isalnum() or f"##{character}" in words
    assert 80 <= sum(len(word) > 1 and word[0] not in "[#" for word in words) <= 110


def test_vocabulary_has_every_word_of_the_templates(web: list[tuple[Scene, Sample]]) -> None:
    words = set(world.vocabulary())
    texts = [sample.text for _, sample in web if sample.meta["truth"]["kind"] != "truncated"]
    for split in ("human", "test"):
        for i in range(60):
            texts += [caption["text"] for caption in world.sample(CONFIG, SEED, split, i).meta["captions"]]
    assert len(texts) > 500
    for text in texts:
        # A file's number is the one thing that is spelt out in pieces.
        for word in re.findall(r"[a-z]+|[^\w\s]|_", text.lower()):
            assert word in words, (word, text)


def test_shards_open_with_plain_webdataset(tmp_path: Path) -> None:
    import webdataset

    config = WorldConfig(web=25, human=3, shard_size=10)
    paths = world.write(config, SEED, tmp_path, "web")
    sizes = {"00000.tar": 10, "00001.tar": 10, "00002.tar": 5}
    assert paths == [tmp_path / "web" / name for name in sizes]
    assert json.loads((tmp_path / "web" / "sizes.json").read_text()) == sizes
    with warnings.catch_warnings():
        # webdataset leaves closing the tars to the garbage collector.
        warnings.simplefilter("ignore", ResourceWarning)
        rows = list(webdataset.WebDataset([str(path) for path in paths], shardshuffle=False))
        gc.collect()
    assert len(rows) == 25
    for i, row in enumerate(rows):
        sample = world.sample(config, SEED, "web", i)
        assert row["__key__"] == sample.key
        assert row[sample.extension] == sample.image
        assert row["txt"].decode() == sample.text
        assert json.loads(row["json"])["truth"] == sample.meta["truth"]


def test_writing_again_gives_the_same_bytes_and_strangers_are_refused(tmp_path: Path) -> None:
    config = WorldConfig(val=12, shard_size=10)
    first = [path.read_bytes() for path in world.write(config, SEED, tmp_path, "val")]
    assert [path.read_bytes() for path in world.write(config, SEED, tmp_path, "val")] == first
    with pytest.raises(DataError, match=r"already holds 00001\.tar"):
        world.write(WorldConfig(val=5, shard_size=10), SEED, tmp_path, "val")


def test_what_does_not_exist_is_refused() -> None:
    with pytest.raises(DataError, match="Did you mean 'web'"):
        world.sample(CONFIG, SEED, "wep", 0)
    with pytest.raises(DataError, match="index -1"):
        world.sample(CONFIG, SEED, "web", -1)
    with pytest.raises(ValidationError, match="Did you mean 'boilerplate'"):
        WorldConfig(kinds={"boilerplat": 1})


@pytest.mark.parametrize(
    "fields",
    [{"kinds": {}}, {"kinds": {"seo": 0}}, {"objects": (1, -1, 1)}, {"noise": 1.5}, {"image_size": 20}],
)
def test_impossible_configs_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        WorldConfig(**fields)
