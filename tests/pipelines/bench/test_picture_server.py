from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest


def test_it_serves_until_its_input_ends_and_leaves_ctrl_c_to_who_measures(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.jpg").write_bytes(name.encode())
    words = [sys.executable, "-m", "capfilt.pipelines.bench.picture_server", str(tmp_path)]
    pipe = subprocess.PIPE
    with subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdin
        assert process.stdout
        url = f"http://127.0.0.1:{int(process.stdout.readline())}"
        assert [urlopen(f"{url}/{number}").read() for number in range(3)] == [b"a", b"b", b"a"]
        with pytest.raises(HTTPError, match="404"):
            urlopen(f"{url}/robots.txt")
        process.send_signal(signal.SIGINT)
        assert urlopen(f"{url}/1").read() == b"b"
        _, said = process.communicate(timeout=100)
        assert (process.returncode, said) == (0, "")
