from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[2]
SHELVES = ("models", "pipelines")
FIND_ALL = """
import json
from capfilt import presets
found = {shelf: {n: presets.find(shelf, n).read_text() for n in presets.names(shelf)} for shelf in %r}
print(json.dumps(found))
"""


def shelf_texts(shelf: str) -> dict[str, str]:
    root = CHECKOUT / shelf
    return {f.relative_to(root).with_suffix("").as_posix(): f.read_text() for f in root.rglob("*.yaml")}


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=cwd, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment that holds the wheel and nothing else; its python."""
    tmp = tmp_path_factory.mktemp("wheel")
    # hatchling's own command: no isolated environment, so nothing is fetched.
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp / "dist", cwd=CHECKOUT)
    (wheel,) = (tmp / "dist").glob("*.whl")
    run(sys.executable, "-m", "venv", "--without-pip", tmp / "venv", cwd=tmp)
    python = tmp / "venv/bin/python"
    run(
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "-q",
        "--no-deps",
        "--no-index",
        wheel,
        cwd=tmp,
    )
    return python


def site_packages(python: Path) -> Path:
    return Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=python.parent).strip())


def test_only_capfilt_is_at_the_top(installed: Path) -> None:
    names = {entry.name for entry in site_packages(installed).iterdir()}
    assert names == {"capfilt", f"capfilt-{version()}.dist-info"}


def test_every_preset_is_found_by_name_and_has_the_same_text(installed: Path) -> None:
    result = json.loads(run(installed, "-c", FIND_ALL % (SHELVES,), cwd=installed.parent))
    assert result == {shelf: shelf_texts(shelf) for shelf in SHELVES}
    assert all(result.values())


def test_every_module_of_the_checkout_is_in_the_wheel(installed: Path) -> None:
    def modules(root: Path) -> set[str]:
        files = (
            file for file in (root / "capfilt").rglob("*.*") if file.suffix in (".py", ".typed", ".j2", ".css", ".js")
        )
        return {str(file.relative_to(root)) for file in files}

    assert modules(site_packages(installed)) == modules(CHECKOUT)


def test_the_command_is_installed(installed: Path) -> None:
    script = (installed.parent / "capfilt").read_text()
    assert "from capfilt.cli import main" in script


def test_the_editable_checkout_finds_its_yaml_live_and_exposes_capfilt_alone(tmp_path: Path) -> None:
    result = json.loads(run(sys.executable, "-c", FIND_ALL % (SHELVES,), cwd=tmp_path))
    assert result == {shelf: shelf_texts(shelf) for shelf in SHELVES}
    names = ("capfilt", *SHELVES)
    probe = f"from importlib.util import find_spec; print([bool(find_spec(n)) for n in {names}])"
    assert run(sys.executable, "-c", probe, cwd=tmp_path).strip() == "[True, False, False]"


def version() -> str:
    scope: dict[str, str] = {}
    (line,) = [li for li in (CHECKOUT / "capfilt/__init__.py").read_text().splitlines() if li.startswith("__version__")]
    exec(line, scope)
    return scope["__version__"]
