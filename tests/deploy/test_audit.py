from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def audit(*words: object, path: str = "") -> subprocess.CompletedProcess[str]:
    line = [sys.executable, ROOT / "deploy/audit.py", *words]
    return subprocess.run(list(map(str, line)), env={"PATH": path}, capture_output=True, text=True, check=False)


def record(**more: Any) -> dict[str, Any]:
    package = {"ecosystem": "PyPI", "name": "Some_Thing"}
    ranges = [{"type": "ECOSYSTEM", "events": [{"introduced": "1.2"}, {"fixed": "2.0"}]}]
    return {"id": "OSV-1", "summary": "opens the door", "affected": [{"package": package, "ranges": ranges}], **more}


@pytest.mark.parametrize(
    ("version", "is_known"), [("1.1", False), ("1.2", True), ("1.10", True), ("2.0", False), ("2.0rc1", True)]
)
def test_a_pinned_version_is_looked_for_in_the_records(tmp_path: Path, version: str, is_known: bool) -> None:
    (tmp_path / "constraints.txt").write_text(f"# a comment\nother==1.5\nsome-thing=={version}  # pinned\n")
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        archive.writestr("OSV-1.json", json.dumps(record()))
    done = audit("--constraints", tmp_path / "constraints.txt", "--advisories", tmp_path / "all.zip")
    assert done.returncode == int(is_known), done.stderr
    answer = f"some-thing {version}: OSV-1 opens the door" if is_known else "2 packages, no known vulnerability"
    assert done.stdout.strip() == answer


def test_versions_may_be_listed_and_records_withdrawn(tmp_path: Path) -> None:
    listed = {"package": {"ecosystem": "PyPI", "name": "some-thing"}, "versions": ["3.0"]}
    other = {"package": {"ecosystem": "npm", "name": "some-thing"}, "versions": ["3.0"]}
    (tmp_path / "constraints.txt").write_text("some-thing==3.0\n")
    words = ("--constraints", tmp_path / "constraints.txt", "--advisories", tmp_path / "records.json")
    for result, code in ((record(affected=[listed]), 1), (record(affected=[other]), 0)):
        (tmp_path / "records.json").write_text(json.dumps([result]))
        assert audit(*words).returncode == code
    (tmp_path / "records.json").write_text(json.dumps(record(affected=[listed], withdrawn="2026-01-01T00:00:00Z")))
    assert audit(*words).returncode == 0


def test_what_is_tested_can_be_audited(tmp_path: Path) -> None:
    """Every line of constraints.txt is a pin that the audit can read."""
    (tmp_path / "records.json").write_text("[]")
    done = audit("--advisories", tmp_path / "records.json")
    assert (done.returncode, done.stderr) == (0, "")
    assert int(done.stdout.split()[0]) > 100


def test_without_network_it_says_that_nothing_was_checked(tmp_path: Path) -> None:
    program = tmp_path / "pip-audit"
    program.write_text("#!/bin/sh\necho 'requests.exceptions.ConnectionError: Failed to resolve pypi.org'\nexit 1\n")
    program.chmod(0o755)
    if Path(sys.executable).with_name("pip-audit").exists():
        pytest.skip("pip-audit is installed beside this Python, and would be asked")
    done = audit(path=f"{tmp_path}:/bin:/usr/bin")
    assert (done.returncode, done.stdout.split(":")[0]) == (0, "skipped")
    assert "reaches no service" in done.stdout
    assert "not installed" in audit(path="/nowhere").stdout
