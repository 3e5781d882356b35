"""Pickles of strangers: data is read, programs are not run."""

from __future__ import annotations

import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest

from capfilt.data.tasks.official.pickles import read_pickle
from capfilt.errors import DataError

REFS = [{"ref_id": 0, "ann_id": 2**40, "split": "testA", "score": 0.5, "ok": (True, None),
         "sentences": [{"sent": "the left dog \u00e9", "tokens": ["the"] * 3}]}]  # fmt: skip


class Shell:
    def __reduce__(self) -> Any:
        return open, ("/dev/null",)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_containers_texts_and_numbers_of_every_protocol(tmp_path: Path, protocol: int) -> None:
    (tmp_path / "refs.p").write_bytes(pickle.dumps(REFS, protocol))
    assert read_pickle(str(tmp_path / "refs.p")) == REFS


def test_texts_of_python_2(tmp_path: Path) -> None:
    (tmp_path / "refs.p").write_bytes(b"(lp0\n(dp1\nS'sent'\np2\nU\x05caf\xc3\xa9sS'n'\np4\nI7\nsa.")
    assert read_pickle(str(tmp_path / "refs.p")) == [{"sent": "caf\u00e9", "n": 7}]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (pickle.dumps([Shell()]), "it has the instruction STACK_GLOBAL"),
        (pickle.dumps([Shell()], 0), "it has the instruction GLOBAL"),
        (pickle.dumps(OrderedDict(a=1)), "it has the instruction STACK_GLOBAL"),
        (pickle.dumps(bytearray(3), 5), "it has the instruction BYTEARRAY8"),
        (b"]r\xff\xff\xff\x7f.", "it numbers an object 2147483647 after 2 instructions"),
        (b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x0fabc.", "is no pickle that can be read"),
        (b"]a.", "is no pickle that can be read"),
        (b"h\x05.", "is no pickle that can be read"),
        (pickle.dumps(REFS)[:-9], "is no pickle that can be read"),
        (b"{}", "is no pickle that can be read"),
        (b"", "is no pickle that can be read"),
        (b"I" + b"9" * 5000 + b"\n.", "is no pickle that can be read"),
    ],
)  # fmt: skip
def test_anything_else_is_refused(tmp_path: Path, data: bytes, said: str) -> None:
    (tmp_path / "refs.p").write_bytes(data)
    with pytest.raises(DataError, match=said):
        read_pickle(str(tmp_path / "refs.p"))
