"""The summaries of deduplications and decontaminations as their pages read them; a run folder may come from others."""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, Field, FiniteFloat, ValidationError

from capfilt.errors import RunError
from capfilt.index.near import Near
from capfilt.printable import short_repr

Number = Annotated[int, Field(ge=0, lt=2**63, strict=True)]
Text = Annotated[str, Field(strict=True)]
M = TypeVar("M", bound=BaseModel)


class Groups(BaseModel):
    """Of near pictures."""

    count: Number
    largest: Number
    sizes: dict[str, Number]


class Deduplicated(BaseModel):
    """What `summary.json` says of a deduplication."""

    pictures: Number
    kept: Number
    dropped: Number
    share: FiniteFloat
    groups: Groups


class Deduplicating(BaseModel):
    """What the plan says of it."""

    by: tuple[Near, ...]
    keep: Text
    scope: Text


class HeldOutSet(BaseModel):
    """What was found of a held-out set."""

    pictures: Number
    in_pool: Number
    samples: dict[str, Number]


class Tested(BaseModel):
    """What the self-test says of a kind of nearness."""

    pictures: Number
    confused: FiniteFloat
    recall: dict[str, FiniteFloat]


class Samples(BaseModel):
    """Of the pool."""

    num_in: Number = Field(alias="in")
    dropped: Number


class Decontaminated(BaseModel):
    """What `summary.json` says of a decontamination."""

    by: Text
    samples: Samples
    sets: dict[str, HeldOutSet]
    self_test: dict[str, Tested]
    problems: dict[str, Text]


def check(kind: type[M], tree: Any, where: object, command: str) -> M:
    """A record as its command writes it; what else is in it is passed over. RunError for one that is none."""
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = short_repr(".".join(map(str, first["loc"])))
        raise RunError(
            f"{where} is no record of a {command}: {place}: {first['msg']}; run its command again."
        ) from None
