from __future__ import annotations

import json

import pytest
import typer

from capfilt.cli.execute import execute
from capfilt.errors import ClusterError, RecipeError


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (RecipeError("no such key"), 2, "error: no such key\n"),
        (ClusterError("no such node"), 1, "error: no such node\n"),
        (
            OSError(28, "No space left"),
            1,
            "error: [Errno 28] No space left; nothing that was committed is lost, run the same command again\n",
        ),
        (KeyboardInterrupt(), 130, "interrupted: run the same command again to go on\n"),
    ],
)  # fmt: skip
def test_every_end_has_its_code_and_its_line(
    error: BaseException, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def work(_: object) -> None:
        raise error

    with pytest.raises(typer.Exit) as left:
        execute(work, as_json=False, debug=False)
    assert left.value.exit_code == code
    assert capsys.readouterr() == ("", said)


def test_our_own_bugs_are_not_dressed_up() -> None:
    def work(_: object) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        execute(work, as_json=False, debug=False)


def test_a_result_is_lines_for_people_and_json_for_machines(capsys: pytest.CaptureFixture[str]) -> None:
    result = {"model": "a/b", "figures": {"auc": 0.123456, "texts": {"web": 3}}}
    execute(lambda _: result, as_json=False, debug=False)
    assert capsys.readouterr().out.split() == ["model", "a/b", "figures.auc", "0.1235", "figures.texts.web", "3"]
    execute(lambda _: result, as_json=True, debug=False)
    assert json.loads(capsys.readouterr().out) == result
