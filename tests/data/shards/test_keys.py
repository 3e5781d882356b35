"""Keys: how names give them, and how they are written."""

from __future__ import annotations

import pytest

from capfilt.data.shards.keys import MAX_KEY, key_problem, split_name, tar_key


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("0001.jpg", ("0001", "jpg")),
        ("a/b.c/0001.JPG", ("a/b.c/0001", "jpg")),
        ("a/22.05 track 1.Jpg", ("a/22", "05 track 1.jpg")),
        ("0001.MASK.png", ("0001", "MASK.png")),
        ("0001.", ("0001", "")),
        (".hidden", ("", "")),
        ("README", ("", "")),
        ("a.b/README", ("", "")),
    ],
)
def test_a_name_is_cut_at_the_first_dot_of_its_last_segment(name: str, expected: tuple[str, str]) -> None:
    assert split_name(name) == expected


@pytest.mark.parametrize("key", ["a", "a.b/c", "a%b", "a b", "\u0645\u200c\u0627"])
def test_a_key_without_dots_is_written_as_it_is(key: str) -> None:
    assert tar_key(key) == key
    assert not key_problem(key, set())


def test_keys_with_dots_are_written_without_and_stay_distinct() -> None:
    keys = ["a/22.05 x", "a/22%2E05 x", "a.b.c", "a%2Eb.c"]
    written = [tar_key(key) for key in keys]
    assert written[0] == "a/22%2E05 x"
    assert all("." not in key.rpartition("/")[2] for key in written)
    assert written[2:] == ["a%2Eb%2Ec", "a%252Eb%2Ec"]
    assert key_problem("a.b.c", {"a%2Eb%2Ec"}) == "duplicate key"


@pytest.mark.parametrize(
    ("key", "why"),
    [
        ("k" * (MAX_KEY + 1), "longer than"),
        ("a\nb", "control characters"),
        ("a\u202eb", "turn the direction"),
        ("/a", "absolute"),
        ("a//b", "empty"),
        ("a/../b", "'..'"),
        ("__meta__/a", "metadata"),
    ],
)
def test_unsafe_keys_have_a_problem(key: str, why: str) -> None:
    assert key_problem(key, set()).startswith("unsafe key")
    assert why in key_problem(key, set())
