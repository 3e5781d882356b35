"""What makes a sample of a pool a suspect: equal bytes, near hashes, near vectors, an equal text."""

from __future__ import annotations

from typing import Literal, get_args

from pydantic import Field

from capfilt.config import Config
from capfilt.data.embeddings import Kind
from capfilt.errors import UsageError
from capfilt.index.near import Near, parse_near

MIN_WORDS = 6
"""Words from which an equal text counts. "A man riding a wave on a surfboard" has 8, and COCO has it several times:
equality of texts accuses, and does not prove."""
KINDS = ("sha256", "phash:BITS", "text[:WORDS]", "vector|copy|itc|clip:COSINE")


class Criteria(Config):
    """The ways in which a sample may be contaminated; any of them is enough."""

    near: tuple[Near, ...] = ()
    """Of pictures."""
    vectors: Kind | Literal["vector"] = "vector"
    """What the vectors must be, where they are compared; "vector": of whatever kind the pool has."""
    words: int | None = Field(default=None, ge=1)
    """Words that an equal text must have to count; None: texts are not compared."""

    @classmethod
    def parse(cls, text: str) -> Criteria:
        """Read `sha256,phash:6,copy:0.604,text:6`. UsageError for anything else."""
        words: int | None = None
        kind: str = "vector"
        of_pictures = []
        for part in (part.strip() for part in text.split(",")):
            name, _, number = part.partition(":")
            if name == "text":
                if words is not None or (number and (not number.isdecimal() or not int(number))):
                    raise UsageError(f"--by {text}: write text, or text:WORDS with the words that it must have, once.")
                words = int(number) if number else MIN_WORDS
            elif name in get_args(Kind):
                kind = name
                of_pictures.append(f"vector:{number}")
            else:
                of_pictures.append(part)
        near = parse_near(",".join(of_pictures)) if of_pictures else ()
        return cls.model_validate({"near": near, "vectors": kind, "words": words})

    def within(self, kind: str) -> float | None:
        """The largest distance of a kind of nearness; None where it is not asked for."""
        return next((near.within for near in self.near if near.kind == kind), None)

    @property
    def compares_pixels(self) -> bool:
        """Whether pictures are compared by more than their bytes."""
        return self.within("phash") is not None or self.within("vector") is not None

    @property
    def texts_alone(self) -> Criteria:
        return Criteria(words=self.words)

    def __str__(self) -> str:
        shown = [str(near).replace("vector", self.vectors) for near in self.near]
        return ",".join([*shown, *([f"text:{self.words}"] if self.words else [])])
