"""JSON larger than memory: the same elements as json.load gives, whatever the chunks, and an error for what is none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capfilt.data.tasks.official import json_stream
from capfilt.data.tasks.official.json_stream import elements, lines
from capfilt.errors import DataError, ListError

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**12), 10**12) | st.floats(-9, 9) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("json") / "a.json"


@given(st.lists(VALUES, max_size=4), VALUES, st.integers(1, 7), st.sampled_from([None, 1]))
def test_the_elements_are_those_of_json_load(
    file: Path, items: list[object], other: object, chunk: int, indent: int | None
) -> None:
    tree = {"info": other if not isinstance(other, list) else 1, "data": {"items": items, "n": 12}, "rows": items}
    if isinstance(tree["info"], dict):
        tree["info"] = {}
    file.write_text(json.dumps(tree, indent=indent, ensure_ascii=False))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_stream, "CHUNK", chunk)
        read = list(elements(str(file)))
    assert read == [("data.items", item) for item in items] + [("rows", item) for item in items]
    file.write_text(json.dumps(items))
    assert list(elements(str(file))) == [("", item) for item in items]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"a": [1, 2', "is no JSON, at character 11"),
        ('{"a": [1 2]}', r"a comma or \] was expected"),
        ('{"a" [1]}', "a key and a colon were expected"),
        ("{1: [1]}", "a key and a colon were expected"),
        ("[1] 2", "there is more behind its end"),
        ('{"a": [tru]}', "Expecting value"),
        ("", "Expecting value"),
        ("[" + "[" * 100_000, "nested too deeply"),
        ('["\xff"]', "it is not UTF-8"),
        ("[" + "1" * 5000 + "]", "is no JSON"),
    ],
)  # fmt: skip
def test_what_is_no_json_is_said(file: Path, text: str, said: str) -> None:
    file.write_text(text, "latin-1")
    with pytest.raises(DataError, match=said):
        list(elements(str(file)))


def test_an_element_without_end_is_not_read_to_the_end(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_stream, "CHUNK", 16)
    monkeypatch.setattr(json_stream, "MAX_ELEMENT", 64)
    file.write_text('["' + "x" * 1000 + '"]')
    with pytest.raises(DataError, match="is no JSON, at character 1: "):
        list(elements(str(file)))


def test_numbers_that_no_double_has_are_none(file: Path) -> None:
    file.write_text("[NaN, -Infinity, 1e999, 1.5]")
    assert [value for _, value in elements(str(file))] == [None, None, None, 1.5]


def test_lines(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write_bytes(b'\xef\xbb\xbf{"a": 1}\n\n{"a"\n"\xff"\n2')
    assert list(lines(str(file))) == [(1, {"a": 1}), (3, None), (4, None), (5, 2)]
    monkeypatch.setattr(json_stream, "MAX_ELEMENT", 8)
    with pytest.raises(DataError, match="line 1 is longer than 8 bytes"):
        list(lines(str(file)))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    for read in (elements, lines):
        with pytest.raises(ListError, match="there is no file"):
            list(read(str(tmp_path / "none.json")))
    with pytest.raises(DataError, match="cannot be read"):
        list(elements(str(tmp_path)))
