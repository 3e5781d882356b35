from __future__ import annotations

import json
from pathlib import Path

import pytest

from capfilt.errors import RunError
from capfilt.storage import documents


def test_a_record_is_read_within_its_bounds(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b"[1, 2]")
    assert documents.read_json(path, 6) == [1, 2]
    with pytest.raises(RunError, match="larger than"):
        documents.read_json(path, 5)
    (tmp_path / "link.json").symlink_to(path)
    with pytest.raises(RunError, match="is a link"):
        documents.read_json(tmp_path / "link.json")


def test_json_has_a_depth_and_a_number_of_values() -> None:
    deep = documents.MAX_DEPTH
    assert documents.parse(b"[" * deep + b"]" * deep) is not None
    for data, why in (
        (b"[" * (deep + 1) + b"]" * (deep + 1), "nested more than 64 deep"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[" + b"1," * documents.MAX_VALUES + b"1]", "more than 4000000 values"),
        (b"9" * 20, "an integer has 20 digits"),
        (b"\xff", "codec can't decode"),
    ):
        with pytest.raises(ValueError, match=why):
            documents.parse(data)


def test_of_a_long_log_the_newest_lines_are_read(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps({"step": i}) + "\n" for i in range(10)) + '{"step": 1')
    assert [line["step"] for line in documents.read_json_lines(path)] == list(range(10))
    # The torn line has 10 bytes, and three whole ones 12 each: of the one before there is a part.
    assert [line["step"] for line in documents.read_json_lines(path, 10 + 3 * 12 + 5)] == [7, 8, 9]
    assert list(documents.read_json_lines(tmp_path / "none")) == []


def test_a_model_file_may_be_a_link_and_hold_the_integers_of_transformers(tmp_path: Path) -> None:
    target, path = tmp_path / "blob", tmp_path / "config.json"
    path.symlink_to(target)
    target.write_bytes(b'\xef\xbb\xbf{"model_max_length": 1000000000000000019884624838656}')
    assert documents.read_model_object(path) == {"model_max_length": int(1e30)}
    for data, why in (
        (b"[]", "it holds a list, not an object"),
        (b'{"a": ' + b"9" * 65 + b"}", "an integer has 65 digits"),
        (b" " * 101, "larger than 100 bytes"),
    ):
        target.write_bytes(data)
        with pytest.raises(ValueError, match=why):
            documents.read_model_object(path, 100)
    with pytest.raises(ValueError, match="not a file"):
        documents.read_model_object(tmp_path)
