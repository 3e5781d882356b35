"""Every preset of pipelines/select/ is read and applied to a small table; what it keeps is worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest

from capfilt import config as configs
from capfilt import presets
from capfilt.data.annotations import Annotation
from capfilt.data.policy import PolicyConfig
from tests.data.policy.conftest import MakeRun, row
from tests.data.policy.test_pool import kept, resolved

ROWS: list[tuple[Annotation, dict[str, float | None]]] = [
    # An image with a good web text.
    (row("synthetic", 0, key="a", text="a dog on a beach", itm=0.9, itc=0.4),
     {"clip-l14": 0.30, "clip-rn50x64": 0.2, "clip-b32": 0.30}),
    (row("synthetic", 1, key="a", text="a dog that runs", itm=0.6, itc=0.3),
     {"clip-l14": 0.28, "clip-rn50x64": 0.4, "clip-b32": 0.20}),
    (row("web", 0, key="a", text="our dog at the beach last summer", itm=0.7, itc=0.35),
     {"clip-l14": 0.29, "clip-b32": 0.29, "sieve": 0.7}),
    # One whose web text is a file name.
    (row("synthetic", 0, key="b", text="a red house", itm=0.8, itc=0.3),
     {"clip-l14": 0.33, "clip-rn50x64": 0.3, "clip-b32": 0.28}),
    (row("synthetic", 1, key="b", text="a house a house a house", itm=0.5, itc=0.2),
     {"clip-l14": 0.10, "clip-rn50x64": 0.1, "clip-b32": 0.10}),
    (row("web", 0, key="b", text="IMG_0042", itm=0.001, itc=0.0), {"clip-l14": 0.05, "clip-b32": 0.05, "sieve": 0.0}),
    # One whose web text is German, and which is small and long.
    (row("synthetic", 0, key="c", text="two people in a street", itm=0.4, itc=0.1),
     {"clip-l14": 0.10, "clip-rn50x64": 0.2, "clip-b32": 0.10}),
    (row("synthetic", 1, key="c", text="people", itm=0.002, itc=0.05),
     {"clip-l14": 0.12, "clip-rn50x64": 0.3, "clip-b32": 0.12}),
    (row("web", 0, key="c", text="zwei Menschen auf einer Straße in der Stadt", itm=0.55, itc=0.2),
     {"clip-l14": 0.20, "clip-b32": 0.31, "sieve": 0.2}),
]  # fmt: skip
SIDES = {"a": {"side": 480.0, "aspect": 1.5}, "b": {"side": 400.0, "aspect": 1.0}, "c": {"side": 199.0, "aspect": 3.5}}
NAMES = ("clip-l14", "clip-rn50x64", "clip-b32", "sieve", "side", "aspect")

KEPT = {
    "blip": ["a synthetic 0", "a synthetic 1", "a web 0", "b synthetic 0", "b synthetic 1", "c web 0"],
    "blip2-two": ["a synthetic 0", "a web 0", "b synthetic 0", "b synthetic 1", "c synthetic 0", "c web 0"],
    "cc12m-texts": ["a synthetic 0", "a synthetic 1", "a web 0"],  # one repetition of four words is 0.2 or more
    "data-juicer-itm": [
        "a synthetic 0", "a synthetic 1", "a web 0", "b synthetic 0", "b synthetic 1", "c synthetic 0", "c web 0",
    ],
    "datacomp-basic": ["a web 0"],
    "datacomp-clip-top-30": ["a web 0"],  # 0.3 of three
    "laion-2b": ["a web 0"],
    "laion-coco": ["a synthetic 1", "b synthetic 0", "c synthetic 1"],
    "nguyen": ["a web 0", "b synthetic 0"],
    "sieve": ["a web 0"],
}  # fmt: skip


@pytest.mark.parametrize(
    "name", [name.removeprefix("select/") for name in presets.names("pipelines") if name.startswith("select/")]
)
def test_a_recipe_keeps_what_its_paper_says(make_run: MakeRun, name: str) -> None:
    policy = configs.read(presets.find("pipelines", name, within="select"), PolicyConfig)
    policy.rules.check()
    further = {score: [{**SIDES[one.key], **more}.get(score) for one, more in ROWS] for score in NAMES}
    run = make_run([[one for one, _ in ROWS[:3]], [one for one, _ in ROWS[3:]]], further)
    rule = resolved(run, **policy.model_dump()).rule
    assert set(policy.used_scores) <= {*further}
    fields = [(each.key, each.source, each.candidate) for each in kept(run, rule)]
    assert [" ".join(map(str, each)) for each in fields] == KEPT[name]


def test_laion_coco_shortlists_before_it_ranks(make_run: MakeRun) -> None:
    """Of three captions the two best by one score; of these the best by another, though the third is better by it."""
    rows = [row("synthetic", number, text=f"text {number}") for number in range(3)]
    run = make_run([rows], {"clip-a": [0.3, 0.2, 0.1], "clip-b": [0.1, 0.2, 0.9]})
    fields: dict[str, Any] = {"top_k": 1, "rank": "clip-b", "shortlist": {"clip-a": 2}}
    assert [each.candidate for each in kept(run, resolved(run, **fields).rule)] == [1]
    assert [each.candidate for each in kept(run, resolved(run, **fields | {"shortlist": {}}).rule)] == [2]
