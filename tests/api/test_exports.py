"""What `import capfilt` offers: every name once, sorted, typed, documented, and imported when it is used."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import capfilt

SOURCE = ast.parse(Path(capfilt.__file__).read_text())
NAMES = [name for name in capfilt.__all__ if name != "__version__"]
FUNCTIONS = [name for name in NAMES if name.islower()]


def in_a_new_process(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_the_names_are_sorted_and_each_is_there_once() -> None:
    assert capfilt.__all__ == sorted(set(capfilt.__all__))


def test_type_checkers_see_the_same_names_from_the_same_modules() -> None:
    block, _ = [node for node in SOURCE.body if isinstance(node, ast.If)]
    imported = {alias.name: node.module for node in block.body for alias in node.names}  # type: ignore[attr-defined]
    assert imported == {name: f"capfilt.{module}" for name, module in capfilt._MODULE_OF.items()}
    assert sorted(imported) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_name_resolves_and_is_documented(name: str) -> None:
    value = getattr(capfilt, name)
    assert inspect.isfunction(value) or inspect.isclass(value)
    assert value.__name__ == name
    assert inspect.getdoc(value)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_arguments_of_a_function_are_typed_and_explained(name: str) -> None:
    function = getattr(capfilt, name)
    signature, docstring = inspect.signature(function), inspect.getdoc(function) or ""
    assert signature.return_annotation is not inspect.Signature.empty
    for parameter in signature.parameters.values():
        assert parameter.annotation is not inspect.Parameter.empty
        assert re.search(rf"\b{parameter.name}\b", docstring), f"{name} does not say what {parameter.name} is"
    assert "Raises:" in docstring


def test_results_are_frozen() -> None:
    results = [value for name in NAMES if dataclasses.is_dataclass(value := getattr(capfilt, name))]
    assert len(results) > 20
    assert all(value.__dataclass_params__.frozen for value in results)


def test_no_name_is_that_of_a_module_too() -> None:
    """Whoever imported the module first would put it in the place of the name."""
    assert not {module.name for module in pkgutil.iter_modules(capfilt.__path__)} & set(capfilt.__all__)


def test_dir_lists_the_names_and_an_unknown_one_is_refused() -> None:
    assert set(capfilt.__all__) <= set(dir(capfilt))
    with pytest.raises(AttributeError, match="module 'capfilt' has no attribute 'anotate'"):
        capfilt.anotate  # type: ignore[attr-defined] # noqa: B018


def test_importing_it_imports_nothing_else() -> None:
    code = "import sys; before = set(sys.modules); import capfilt; print(*sorted(set(sys.modules) - before))"
    assert set(in_a_new_process(code).split()) <= {"__future__", "capfilt", "importlib"}


@pytest.mark.parametrize(
    ("name", "absent"),
    [
        ("CapfiltError", {"torch", "ray", "pydantic", "pyarrow", "rich", "transformers"}),
        ("annotate", {"torch", "ray", "pydantic", "pyarrow", "transformers"}),
        ("status", {"torch", "ray", "pydantic", "pyarrow", "transformers"}),
        ("read_shards", {"torch", "ray", "pydantic", "pyarrow", "transformers"}),
        ("AnnotateResult", {"torch", "ray", "pydantic", "pyarrow", "rich", "transformers"}),
    ],
)
def test_a_name_imports_only_what_it_needs(name: str, absent: set[str]) -> None:
    modules = in_a_new_process(f"import sys, capfilt; capfilt.{name}; print(*sys.modules)")
    assert not absent & set(modules.split())


def test_the_package_says_that_it_is_typed() -> None:
    assert (Path(capfilt.__file__).parent / "py.typed").is_file()
