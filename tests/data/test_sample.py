from __future__ import annotations

import dataclasses
import hashlib

import pytest

from capfilt.data.sample import Fault, Sample, leave_out


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
    "foreign", [[], ["a", "b"], "a", {"text": "a"}, [{"text": 1, "source": "web"}], [{"text": "a"}]]
)
def test_captions_of_another_shape_are_not_ours_to_interpret(foreign):
    assert sample(captions=foreign).captions == [{"text": "a dog", "source": "web"}]


def test_samples_and_faults_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        sample().text = "another"
    with pytest.raises(dataclasses.FrozenInstanceError):
        Fault("k", "no image").reason = "another"


def test_what_is_left_out_is_a_fault_in_its_place():
    items = [sample(), Fault("a", "no image"), dataclasses.replace(sample(), key="b")]
    assert list(leave_out(items, {2: "it kills"})) == [*items[:2], Fault("b", "it kills")]
    assert list(leave_out(items, {})) == items
