"""Whether a package that capfilt is tested with has a known vulnerability: `make audit`.

    python deploy/audit.py                        # asks pip-audit, which asks the network
    python deploy/audit.py --advisories all.zip   # without network: OSV records in a zip, a folder or one JSON file

OSV's records of PyPI are https://osv-vulnerabilities.storage.googleapis.com/PyPI/all.zip. Leaves with 1 where a
vulnerability is known, with 0 where none is, and with 0 and a reason where nothing could be asked.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

UNREACHED = ("ConnectionError", "Failed to resolve", "Max retries", "timed out", "Could not connect", "ServiceError")
"""What pip-audit says where there is no network."""


def pinned(constraints: Path) -> dict[str, Version]:
    """The versions of a file of constraints by name."""
    lines = (line.partition("#")[0].strip() for line in constraints.read_text().splitlines())
    wanted = [Requirement(line) for line in lines if line]
    return {canonicalize_name(each.name): Version(str(each.specifier).removeprefix("==")) for each in wanted}


def records(where: Path) -> Iterator[Mapping[str, Any]]:
    """The OSV records of a zip, a folder or a file of JSON, one of them or a list."""
    if where.is_dir():
        texts = (path.read_bytes() for path in sorted(where.glob("*.json")))
    elif zipfile.is_zipfile(where):
        archive = zipfile.ZipFile(where)
        texts = (archive.read(name) for name in sorted(archive.namelist()) if name.endswith(".json"))
    else:
        texts = (text for text in [where.read_bytes()])
    for text in texts:
        found = json.loads(text)
        yield from found if isinstance(found, list) else [found]


def affects(affected: Mapping[str, Any], version: Version) -> bool:
    """Whether a version is among those that a record calls affected."""
    if str(version) in affected.get("versions", ()):
        return True
    return any(within(r["events"], version) for r in affected.get("ranges", ()) if r["type"] == "ECOSYSTEM")


def within(events: list[Mapping[str, str]], version: Version) -> bool:
    """Whether the last event at or below a version brought the vulnerability in."""
    inside = False
    for event in sorted(events, key=lambda event: parsed(next(iter(event.values())))):
        ((kind, at),) = event.items()
        if parsed(at) < version or (parsed(at) == version and kind != "last_affected"):
            inside = kind == "introduced"
    return inside


def parsed(text: str) -> Version:
    """A version of a record; "0" is before all others, and so is what is no version."""
    try:
        return Version(text if text != "0" else "0.dev0")
    except InvalidVersion:
        return Version("0.dev0")


def known(pins: Mapping[str, Version], where: Path) -> list[str]:
    """A line for each pinned version that a record names."""
    found = set()
    for record in records(where):
        for affected in record.get("affected", ()) if "withdrawn" not in record else ():
            package = affected.get("package", {})
            name = canonicalize_name(package.get("name", ""))
            if package.get("ecosystem") == "PyPI" and name in pins and affects(affected, pins[name]):
                found.add(f"{name} {pins[name]}: {record['id']} {record.get('summary', '')}".rstrip())
    return sorted(found)


def main() -> int:
    """Audit the constraints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--advisories", type=Path, help="OSV records on this machine, instead of the network")
    parser.add_argument("--constraints", type=Path, default=Path(__file__).parents[1] / "constraints.txt")
    words = parser.parse_args()
    if words.advisories is not None:
        pins = pinned(words.constraints)
        lines = known(pins, words.advisories)
        sys.stdout.write("".join(f"{line}\n" for line in lines) or f"{len(pins)} packages, no known vulnerability\n")
        return int(bool(lines))
    program = shutil.which("pip-audit", path=str(Path(sys.executable).parent)) or shutil.which("pip-audit")
    if program is None:
        sys.stdout.write("skipped: pip-audit is not installed; `pip install pip-audit`, or give ADVISORIES=FILE\n")
        return 0
    done = subprocess.run(
        [program, "--requirement", words.constraints, "--no-deps", "--disable-pip", "--progress-spinner", "off"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    if done.returncode and any(sign in done.stdout for sign in UNREACHED):
        sys.stdout.write("skipped: pip-audit reaches no service; without network, give ADVISORIES=FILE\n")
        return 0
    sys.stdout.write(done.stdout)
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
