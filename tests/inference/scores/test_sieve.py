from __future__ import annotations

import numpy as np
import pytest

from capfilt.data.annotations import Annotation
from capfilt.inference.scores.interface import ScoredImages
from capfilt.inference.scores.sieve import SieveScorer, without_medium


class Words:
    """An encoder whose vectors are the shares of a few words, so that cosines can be had by hand."""

    def __init__(self):
        self.read = []

    def encode(self, texts):
        self.read += texts
        counts = np.array([[text.split().count(word) for word in ("dog", "cat", "red")] for text in texts], np.float32)
        return counts / np.linalg.norm(counts, axis=1, keepdims=True)


def image(*texts):
    """Rows of one image, each "source: text"."""
    rows = (each.partition(": ") for each in texts)
    return [
        Annotation("k", "u", "s", source, n, text, None, None, "", "", 0, 0) for n, (source, _, text) in enumerate(rows)
    ]


def test_a_text_has_the_greatest_cosine_to_the_captions_of_its_image_and_a_caption_to_the_others():
    encoder = Words()
    images = [
        image("synthetic: a photo of dog", "synthetic: cat", "web: dog red", "human: cat"),
        image("synthetic: red", "web: red", "web: !"),
        image("web: dog"),
    ]
    (first, second, third) = SieveScorer(encoder).score(ScoredImages(images))
    assert first == pytest.approx([0, 0, 0.5**0.5, 1])
    assert second == [None, 1, None], "one caption has no other to be compared with; a mark is no text"
    assert third == [None], "no caption, nothing to compare with"
    assert sorted(encoder.read) == ["cat", "dog", "dog red", "red"], "each text once, without the medium"


def test_captions_that_say_the_same_vouch_for_each_other():
    [values] = SieveScorer(Words()).score(ScoredImages([image("synthetic: dog", "synthetic: Photo of dog")]))
    assert values == [1, 1]


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("a photo of a dog", "a dog"),
        ("Stock photo: red cat", ": red cat"),
        ("the pictures of an old mill", "an old mill"),
        ("An illustration showing two birds", "two birds"),
        ("a photographer at work", "a photographer at work"),
        ("dog, stock photography", "dog, stock photography"),
        ("a photo", ""),
    ],
)
def test_the_words_for_the_medium_are_left_out_and_no_part_of_another_word_is(text, left):
    assert without_medium(text) == left


def test_a_shard_without_texts_is_not_read_at_all():
    assert SieveScorer(Words()).score(ScoredImages([])) == []
