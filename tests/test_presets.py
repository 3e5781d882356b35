from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from capfilt import presets
from capfilt.errors import RecipeError

CHECKOUT = Path(__file__).parent.parent


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "pyproject.toml").touch()
    for name in ("models/blip/base", "models/blip/tiny", "pipelines/bootstrap/demo", "pipelines/plain"):
        file = tmp_path / f"{name}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"name: {name}\n")
    monkeypatch.setattr(presets, "CHECKOUT", tmp_path)
    monkeypatch.setattr(presets, "PACKED", tmp_path / "capfilt" / "_presets")
    return tmp_path


def test_names_and_find_agree(checkout: Path) -> None:
    assert presets.names("models") == ["blip/base", "blip/tiny"]
    assert presets.find("models", "blip/tiny") == checkout / "models/blip/tiny.yaml"


def test_within_is_tried_after_the_name_itself(checkout: Path) -> None:
    assert presets.find("pipelines", "demo", within="bootstrap") == checkout / "pipelines/bootstrap/demo.yaml"
    assert presets.find("pipelines", "plain", within="bootstrap") == checkout / "pipelines/plain.yaml"


def test_an_unknown_name_is_refused_with_the_nearest_and_all(checkout: Path) -> None:
    with pytest.raises(RecipeError, match=r"no preset 'blip/tny'.*mean 'blip/tiny'.*blip/base, blip/tiny"):
        presets.find("models", "blip/tny")
    with pytest.raises(RecipeError, match=r"mean 'bootstrap/demo'"):
        presets.find("pipelines", "demo")


@pytest.mark.parametrize("name", ["../models/blip/base", "/etc/passwd", "", "blip", "blip/base.yaml.yaml"])
def test_a_name_cannot_leave_its_shelf(checkout: Path, name: str) -> None:
    with pytest.raises(RecipeError):
        presets.find("pipelines", name)


def test_a_yaml_file_is_taken_as_it_is(checkout: Path) -> None:
    mine = checkout / "mine.yaml"
    mine.touch()
    assert presets.find("models", str(mine)) == mine
    with pytest.raises(RecipeError, match=r"there is no file .*absent\.yaml"):
        presets.find("models", checkout / "absent.yaml")


def test_the_wheel_s_own_shelf_comes_first(checkout: Path) -> None:
    packed = checkout / "capfilt/_presets/models/clip/tiny.yaml"
    packed.parent.mkdir(parents=True)
    packed.touch()
    assert presets.names("models") == ["clip/tiny"]


def test_an_unrelated_models_folder_beside_the_package_is_left_alone(checkout: Path) -> None:
    (checkout / "pyproject.toml").unlink()
    assert presets.names("models") == []


def test_the_checkout_s_yaml_is_found_live() -> None:
    on_disk = {str(file) for shelf in ("models", "pipelines") for file in (CHECKOUT / shelf).rglob("*.yaml")}
    found = {str(presets.find(shelf, n)) for shelf in ("models", "pipelines") for n in presets.names(shelf)}  # type: ignore[arg-type]
    assert on_disk == found
    assert on_disk


def test_the_shelves_hold_yaml_only() -> None:
    assert not [*(CHECKOUT / "models").rglob("*.py"), *(CHECKOUT / "pipelines").rglob("*.py")]


def test_only_the_standard_library_is_imported() -> None:
    code = (
        "import sys; from capfilt import presets;"
        "print({m.split('.')[0] for m in sys.modules} - set(sys.stdlib_module_names) - before)"
    )
    code = f"import sys; before = {{m.split('.')[0] for m in sys.modules}}; {code}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=CHECKOUT, check=True)
    assert done.stdout.strip() == "{'capfilt'}"
