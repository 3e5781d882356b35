from __future__ import annotations

import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capfilt.errors import RunError
from capfilt.runs.tally import Tally

COUNTS = st.dictionaries(st.sampled_from(["in", "kept", "dropped", "failed"]), st.integers(0, 9)).map(Counter)
TALLIES = st.builds(
    Tally,
    samples=COUNTS,
    texts=st.fixed_dictionaries({"in": COUNTS, "kept": COUNTS, "dropped": COUNTS}),
    failed=COUNTS,
)


def good() -> Tally:
    return Tally(
        samples=Counter({"in": 10, "kept": 6, "dropped": 3, "failed": 1}),
        texts={
            "in": Counter(web=9, synthetic=9),
            "kept": Counter(web=4, synthetic=7),
            "dropped": Counter({"web: itm": 3, "web: short": 2, "synthetic: itm": 2}),
        },
        failed=Counter({"image: truncated": 1}),
    )


def test_a_good_tally_balances() -> None:
    assert not good().imbalance()
    assert not Tally.zero().imbalance()


def test_losing_one_sample_is_noticed() -> None:
    tally = good()
    tally.samples["kept"] -= 1
    assert tally.imbalance() == "samples: 10 in, but 5 kept + 3 dropped + 1 failed"


def test_a_failure_without_reason_is_noticed() -> None:
    tally = good()
    tally.failed.clear()
    assert tally.imbalance() == "samples: 1 failed, but 0 reasons"


def test_a_synthetic_text_does_not_make_up_for_a_web_text() -> None:
    tally = good()
    tally.texts["kept"].update(web=-1, synthetic=1)
    assert tally.imbalance() == "synthetic texts: 9 in, but 8 kept + 2 dropped"


def test_members_balance_where_they_were_counted() -> None:
    tally = good()
    assert "members" not in tally.to_json()
    tally.members.update({"in": 9, "used": 6, "carried": 2, "a folder": 1})
    assert not tally.imbalance()
    assert (tally + tally).members == {"in": 18, "used": 12, "carried": 4, "a folder": 2}
    assert Tally.from_json(json.loads(json.dumps(tally.to_json()))) == tally
    tally.members["used"] -= 1
    assert tally.imbalance() == "members: 9 in, but 8 used, carried or skipped"


def test_negative_and_unknown_counters_are_noticed() -> None:
    assert "negative" in Tally(samples=Counter({"kept": 1, "dropped": -1})).imbalance()
    assert "unknown" in Tally(samples=Counter({"inn": 1})).imbalance()


def test_adding_adds_everything_and_changes_nothing() -> None:
    a, b = good(), good()
    total = a + b
    assert total.samples == Counter({"in": 20, "kept": 12, "dropped": 6, "failed": 2})
    assert total.texts["dropped"]["web: itm"] == 6
    assert total.failed == Counter({"image: truncated": 2})
    assert a == b == good()


def test_adding_does_not_hide_a_negative_count() -> None:
    assert (Tally(samples=Counter({"kept": -1})) + Tally.zero()).imbalance()


@given(st.lists(TALLIES, max_size=4))
def test_tallies_add_in_any_order(tallies: list[Tally]) -> None:
    assert sum(tallies, Tally.zero()) == sum(reversed(tallies), Tally.zero())


@given(TALLIES)
def test_json_gives_it_back(tally: Tally) -> None:
    assert Tally.from_json(json.loads(json.dumps(tally.to_json()))) == tally


@pytest.mark.parametrize("bad", [{}, {"samples": 3}, None, {"samples": {"in": "3"}, "texts": {}, "failed": {}}])
def test_what_is_no_tally_is_refused(bad: object) -> None:
    with pytest.raises(RunError, match="no tally"):
        Tally.from_json(bad)  # type: ignore[arg-type]
