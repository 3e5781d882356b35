"""What `--by` may say."""

from __future__ import annotations

import pytest

from capfilt.errors import UsageError
from capfilt.index.near import parse_near


def test_kinds_and_their_radius() -> None:
    sha256, phash, vector = parse_near("sha256,phash:3, vector:0.95")
    assert (sha256.kind, phash.kind, vector.kind) == ("sha256", "phash", "vector")
    assert (sha256.within, phash.within, vector.within) == (0, 3, pytest.approx(0.05))
    assert [str(near) for near in (sha256, phash, vector)] == ["sha256", "phash:3", "vector:0.95"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("phash:13", "at most 12 may differ"),
        ("phash:-1", "at most 12 may differ"),
        ("phash:2.5", "is not known"),
        ("vector:1", "at which none would go"),
        ("vector:0.2", "one picture would stand for all"),
        ("vector:nan", "is not known"),
        ("vector", "is not known"),
        ("md5", "write sha256, phash:BITS or vector:COSINE"),
        ("phash:3,phash:4", "named twice"),
        ("", "is not known"),
    ],
)
def test_what_keeps_everything_or_one_is_refused(text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        parse_near(text)
