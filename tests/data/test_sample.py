from __future__ import annotations

import dataclasses
import hashlib

import pytest

from capfilt.data.sample import FailedSample, Sample, is_text, skip_positions


def sample(**meta):
    return Sample("000000001", b"picture", "jpg", "a dog", meta)


def test_sha256_is_that_of_the_image_bytes():
    assert sample().sha256 == hashlib.sha256(b"picture").hexdigest()


def test_the_uid_of_the_json_wins_in_lower_case():
    assert sample(uid="ABCDEF" + "0" * 26).uid == "abcdef" + "0" * 26


@pytest.mark.parametrize("uid", [None, "", "0" * 31, "0" * 33, "g" * 32, 7, "0" * 32 + "\n"])
def test_a_uid_that_is_none_gives_way_to_the_sha256(uid):
    assert sample(uid=uid).uid == sample().sha256[:32]


def test_without_captions_the_text_is_the_web_caption():
    assert sample().captions == [{"text": "a dog", "source": "web"}]


def test_our_own_captions_come_back_whole():
    captions = [{"text": "a dog", "source": "web", "itm": 0.5}, {"text": "a cat", "source": "synthetic"}]
    assert sample(captions=captions).captions == captions


@pytest.mark.parametrize(
    ("foreign", "texts"),
    [
        (["a", "b"], ["a dog", "a", "b"]),
        (["a", "a dog"], ["a", "a dog"]),  # the txt is one of them
        ([{"caption": "a"}, {"text": "b"}], ["a dog", "a", "b"]),
        ([{"text": "a", "source": "coco"}], ["a dog", "a"]),
        ([{"text": "a", "source": "human"}, "b"], ["a dog", "a", "b"]),
        ("a", ["a dog", "a"]),
        ({"text": "a"}, ["a dog", "a"]),
        ([], ["a dog"]),
        ([None, 7, {"text": 1, "source": "web"}, {"url": "a"}, ["a"]], ["a dog"]),
    ],
)
def test_other_people_s_captions_stand_beside_the_txt(foreign, texts):
    assert [caption["text"] for caption in sample(captions=foreign).captions] == texts


def test_other_people_s_captions_count_as_the_web_s_unless_they_say_otherwise():
    found = sample(captions=["a", {"text": "b", "source": "human"}, {"text": "c", "source": ["coco"]}]).captions
    assert [caption["source"] for caption in found] == ["web", "web", "human", "web"]


def test_captions_without_a_txt_are_all_there_is():
    assert dataclasses.replace(sample(captions=["a", "b"]), text="").captions == [
        {"text": "a", "source": "web"},
        {"text": "b", "source": "web"},
    ]


@pytest.mark.parametrize("text", ["a", "7", "ⅷ", "犬", "कु", "👍", "☺", "#1", "... a"])
def test_a_letter_a_number_or_a_pictogram_makes_a_text(text):
    assert is_text(text)


@pytest.mark.parametrize(
    "text", ["", " \t\n", "...", "-—_", "|", "$ + = < > ^ ` ~", "\x00\x7f", "\ufeff\u200d\u00a0", "\ud800"]
)
def test_white_space_punctuation_and_signs_alone_are_no_text(text):
    assert not is_text(text)
    assert dataclasses.replace(sample(), text=text).captions == []
    found = dataclasses.replace(sample(captions=["a", text]), text="")
    assert [caption["text"] for caption in found.captions] == ["a"]
    assert [caption["text"] for caption in found.all_captions] == ["a", text]


def test_samples_and_faults_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        sample().text = "another"
    with pytest.raises(dataclasses.FrozenInstanceError):
        FailedSample("k", "no image").reason = "another"


def test_what_is_left_out_is_a_fault_in_its_place():
    items = [sample(), FailedSample("a", "no image"), dataclasses.replace(sample(), key="b")]
    assert list(skip_positions(items, {2: "it kills"})) == [*items[:2], FailedSample("b", "it kills")]
    assert list(skip_positions(items, {})) == items
