from __future__ import annotations

import logging
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capfilt.errors import RunError
from capfilt.printable import MAX_MESSAGE, PrintableFormatter, printable, printable_lines, short_repr


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("00000", "00000"),
        ("a dog's [/x] été 犬 🐕", "a dog's [/x] été 犬 🐕"),
        ("\x1b]0;title\x07", "\\x1b]0;title\\x07"),
        ("\x1b[2J\x9b2J", "\\x1b[2J\\x9b2J"),
        ("a\r\nerror: forged\n", "a error: forged "),
        ("a\u2028b\u3000c\xa0d\te", "a b c d e"),
        ("\u202eevil\u2066", "\\u202eevil\\u2066"),
        ("\ud800\x00\x7f", "\\ud800\\x00\\x7f"),
        (7, "7"),
    ],
)
def test_what_cannot_be_seen_is_an_escape(text: object, shown: str) -> None:
    assert printable(text) == shown


def test_the_ends_of_a_long_text_are_shown() -> None:
    assert printable("0123456789" * 10**6 + "end", 12) == "01234567…end"
    assert printable("\x1b" * 100, 12) == "\\x1b\\x1b…x1b"


@given(st.text(st.characters(), max_size=80), st.integers(4, 50))
def test_it_is_one_bounded_line_and_may_be_done_twice(text: str, limit: int) -> None:
    shown = printable(text, limit)
    assert shown.isprintable()
    assert len(shown) <= limit
    assert printable(shown, limit) == shown


def test_another_program_s_lines_stay_lines() -> None:
    said = "\x1b[36m(worker)\x1b[0m a\r\n\tb\rforged\x1b]52;c;aGk=\x07\n"
    assert printable_lines(said) == "(worker) a\n\tb\\rforged\\x1b]52;c;aGk=\\x07\n"


def test_a_large_value_is_not_written_out() -> None:
    tree: list[object] = ["x"]
    for _ in range(100):
        tree = [tree] * 9
    assert len(short_repr(tree)) <= 60
    assert short_repr({"a": 10**6000}) == "{'a': an integer of 19932 bits}"
    assert short_repr("itm") == "'itm'"


def test_errors_and_warnings_are_one_line() -> None:
    error = RunError("shard \x1b[2J\nerror: forged " + "x" * 10**6 + " do this")
    assert str(error).startswith("shard \\x1b[2J error: forged xxx")
    assert str(error).endswith("xxx do this")
    assert len(str(error)) == MAX_MESSAGE
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    record = logging.LogRecord("x", logging.WARNING, "", 0, "%s stays", ("\x1b[2J\n",), None)
    assert PrintableFormatter().format(record) == "\\x1b[2J  stays"
