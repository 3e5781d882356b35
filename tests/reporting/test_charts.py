from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capfilt.reporting import charts
from capfilt.reporting.charts import Chart, Frame, Histogram, Line

HOSTILE = '"><script>alert(1)</script>&'


def parsed(chart: Chart) -> ET.Element:
    """An SVG that is well-formed, which text that was not escaped would not be."""
    return ET.fromstring(str(chart.svg))


def every() -> list[Chart]:
    return [
        charts.lines(HOSTILE, [Line(HOSTILE, [(1, 2.0), (2, 1.0)])], HOSTILE),
        charts.by_round(HOSTILE, [Line(HOSTILE, [(0, 20.0), (1, 25.0)])]),
        charts.shares(HOSTILE, [(HOSTILE, 0.25)], ("kept", HOSTILE)),
        charts.histogram(HOSTILE, Histogram(0, 1, {HOSTILE: [1, 2], "right": [0, 3]}), HOSTILE),
    ]


@pytest.mark.parametrize("chart", every(), ids=["lines", "by_round", "shares", "histogram"])
def test_a_chart_has_a_text_for_those_who_do_not_see_it_and_escapes_what_it_says(chart: Chart) -> None:
    svg = parsed(chart)
    assert svg.get("role") == "img"
    assert HOSTILE in svg.get("aria-label", "")
    assert not svg.findall(".//script")


def test_the_values_of_a_line_are_where_the_axes_say() -> None:
    frame = Frame((0, 10), (0, 1))
    assert frame.position(0, 0) == (charts.LEFT, charts.HEIGHT - charts.BOTTOM)
    assert frame.position(10, 1) == (charts.WIDTH - charts.RIGHT, charts.TOP)


def test_round_zero_is_the_baseline() -> None:
    beaten = parsed(charts.by_round("TR@1", [Line("TR@1", [(0, 19.5), (1, 21.6), (2, 30.6)])]))
    (rule,) = [line for line in beaten.findall("line") if line.get("class") == "rule"]
    (first, *_) = [mark for mark in beaten.findall("path") if "mark" in mark.get("class", "")]
    assert rule.get("y1") == re.match(r"M[\d.]+,([\d.]+)", first.get("d", ""))[1]  # type: ignore[index]
    assert [text.text for text in beaten.findall("text") if text.get("class") == "value"] == ["19.5", "21.6", "30.6"]
    alone = parsed(charts.by_round("TR@1", [Line("TR@1", [(1, 21.6), (2, 30.6)])]))
    assert not [line for line in alone.findall("line") if line.get("class") == "rule"]


def test_the_bars_of_a_histogram_stand_on_each_other_and_add_up() -> None:
    svg = parsed(charts.histogram("h", Histogram(0, 1, {"wrong": [4, 0], "right": [4, 8]}), "itm"))
    bars = [
        (bar.get("class"), *(float(bar.get(name, "nan")) for name in ("y", "height"))) for bar in svg.findall("rect")
    ]
    floor = charts.HEIGHT - charts.BOTTOM
    tall = floor - charts.TOP  # the height of 8 texts
    assert bars == [
        ("area wrong", pytest.approx(floor - tall / 2), pytest.approx(tall / 2)),
        ("area right", pytest.approx(charts.TOP), pytest.approx(tall / 2)),
        ("area right", pytest.approx(charts.TOP), pytest.approx(tall)),
    ]
    assert (svg.get("data-low"), svg.get("data-high")) == ("0", "1")


def test_a_long_line_is_thinned_to_means() -> None:
    points = [(float(x), float(x % 2)) for x in range(10_000)]
    thinned = charts.thin(points)
    assert len(thinned) <= charts.MAX_POINTS
    assert all(y == pytest.approx(0.5, abs=0.02) for _, y in thinned)
    assert charts.thin(points[:5]) == points[:5]


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6), st.integers(2, 8))
def test_ticks_are_few_round_and_inside(low: float, span: float, about: int) -> None:
    found = charts.ticks(low, low + span, about)
    slack = 1e-6 * (abs(low) + span)
    assert len(found) <= about + 2
    assert all(low - slack <= tick <= low + span + slack for tick in found)
    assert sorted(found) == found


def test_equal_values_have_a_place_too() -> None:
    for chart in (
        charts.lines("flat", [Line("flat", [(1, 0.0)])], "step"),
        charts.by_round("flat", [Line("flat", [(0, 0.0), (1, 0.0)])]),
    ):
        parsed(chart)
        assert "nan" not in str(chart.svg)
