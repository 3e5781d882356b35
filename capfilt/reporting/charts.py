"""Charts as inline SVG, from plain numbers: lines, histograms with a threshold, shares of a whole.

Colours come from the page by class, and no series differs by its colour alone: lines differ in dash and mark, areas in
hatching. All text is escaped.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

WIDTH, HEIGHT = 360, 210
LEFT, RIGHT, TOP, BOTTOM = 44, 14, 16, 28
STYLES = 6
"""Line styles that the page has: s0 is the dashed baseline."""
MAX_POINTS = 240
"""Points of a line that are drawn; a longer line is thinned to means."""

Point = tuple[float, float]


@dataclass(frozen=True)
class Chart:
    """A drawn chart: its title, its legend as (class, words), the SVG, and one sentence about it."""

    title: str
    svg: Markup
    legend: tuple[tuple[str, str], ...] = ()
    note: str = ""


@dataclass(frozen=True)
class Line:
    """One line of a chart; `style` is a number below STYLES."""

    label: str
    points: Sequence[Point]
    style: int = 1


@dataclass(frozen=True)
class Histogram:
    """Counts of texts by score in equal bins, one list for each layer; layers are what is known of the texts."""

    low: float
    high: float
    layers: Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class Frame:
    """The ranges of a chart's axes."""

    x: Point
    y: Point

    def position(self, x: float, y: float) -> Point:
        """The position of a point, in the SVG's units."""
        across = (x - self.x[0]) / ((self.x[1] - self.x[0]) or 1)
        up = (y - self.y[0]) / ((self.y[1] - self.y[0]) or 1)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)


def lines(title: str, series: Sequence[Line], x_label: str, note: str = "") -> Chart:
    """Lines over a shared x, for long series such as losses."""
    drawn = [Line(line.label, thin(line.points), line.style) for line in series if line.points]
    frame = _around([point for line in drawn for point in line.points])
    body = _axes(frame, x_label, ticks(*frame.x, 4))
    for line in drawn:
        body += _path(frame, line)
    summary = "; ".join(
        f"{line.label} from {_short(line.points[0][1])} to {_short(line.points[-1][1])}" for line in drawn
    )
    return Chart(
        title, _svg(f"{title}: {summary}", body), tuple((f"s{line.style}", line.label) for line in drawn), note
    )


def by_round(title: str, series: Sequence[Line], note: str = "") -> Chart:
    """A few points a line, one a round, each with its value; round 0's value is a dashed baseline."""
    drawn = [line for line in series if line.points]
    rounds = sorted({x for line in drawn for x, _ in line.points})
    values = [y for line in drawn for _, y in line.points]
    low, high = min(values), max(values)
    room = (high - low or abs(high) or 1) * 0.18
    frame = Frame((rounds[0] - 0.3, rounds[-1] + 0.3), (low - room, high + room))
    highest = {x: max(y for line in drawn for at, y in line.points if at == x) for x in rounds}
    body = _axes(frame, "round", rounds)
    for line in drawn:
        if line.points[0][0] == 0 and len(rounds) > 1:
            body += _rule(frame, line.points[0][1])
        body += _path(frame, line) + _marks(frame, line, highest)
    summary = "; ".join(f"{line.label} {', '.join(_short(y) for _, y in line.points)}" for line in drawn)
    return Chart(
        title, _svg(f"{title}, by round: {summary}", body), tuple((f"s{d.style}", d.label) for d in drawn), note
    )


def shares(title: str, bars: Sequence[tuple[str, float]], words: tuple[str, str], note: str = "") -> Chart:
    """Bars of full width, each split into a share (in [0, 1]) and the rest: kept and dropped."""
    step = (HEIGHT - TOP) / max(len(bars), 1)
    body = Markup("")
    for number, (label, share) in enumerate(bars):
        top, wide = TOP + number * step, WIDTH - 2 * RIGHT
        thick = min(18.0, step * 0.5)
        body += _text(RIGHT, top - 4 + 6, label, "start")
        body += _text(WIDTH - RIGHT, top + 2, f"{share:.1%} {words[0]}, {1 - share:.1%} {words[1]}", "end")
        body += _bar(RIGHT, top + 7, wide * share, thick, "kept") + _bar(
            RIGHT + wide * share, top + 7, wide * (1 - share), thick, "dropped"
        )
    summary = "; ".join(f"{label} {share:.1%} {words[0]}" for label, share in bars)
    return Chart(title, _svg(f"{title}: {summary}", body), (("kept", words[0]), ("dropped", words[1])), note)


def histogram(title: str, bins: Histogram, x_label: str, note: str = "", cuts: bool = True) -> Chart:
    """Layers on top of each other; with `cuts` also lines at the thresholds A and B, which the page's script moves."""
    total = [sum(counts) for counts in zip(*bins.layers.values(), strict=True)]
    frame = Frame((bins.low, bins.high), (0.0, float(max(total, default=0) or 1)))
    body = _axes(frame, x_label, ticks(bins.low, bins.high, 5), counts=True)
    wide = (frame.position(bins.high, 0)[0] - LEFT) / max(len(total), 1)
    floor = [0] * len(total)
    for layer, counts in bins.layers.items():
        for number, count in enumerate(counts):
            if count:
                top = frame.position(0, floor[number] + count)[1]
                tall = frame.position(0, floor[number])[1] - top
                body += _bar(LEFT + number * wide, top, max(wide - 0.6, 0.4), tall, layer)
            floor[number] += count
    for kind in ("cut-b", "cut") if cuts else ():
        line = Markup('<line class="{0}" x1="{1}" x2="{1}" y1="{2}" y2="{3}"/>')
        body += line.format(kind, LEFT, TOP - 6, HEIGHT - BOTTOM)
    summary = ", ".join(f"{sum(counts)} {layer}" for layer, counts in bins.layers.items())
    data = {"low": bins.low, "high": bins.high, "left": LEFT, "right": WIDTH - RIGHT}
    legend = tuple((layer, layer) for layer in bins.layers)
    return Chart(title, _svg(f"{title}: {summary}, by {x_label}", body, data), legend, note)


def thin(points: Sequence[Point]) -> list[Point]:
    """At most MAX_POINTS points, each the mean of a group of neighbours."""
    size = math.ceil(len(points) / MAX_POINTS)
    if size <= 1:
        return list(points)
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]


def ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers between two numbers, roughly `about` of them."""
    span = high - low
    if not span > 0:
        return [low]
    rough = span / about
    power = 10 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(k * step, 10) for k in range(first, math.floor(high / step + 1e-9) + 1)]


def _around(points: Sequence[Point]) -> Frame:
    xs, ys = [x for x, _ in points], [y for _, y in points]
    room = (max(ys) - min(ys) or abs(max(ys)) or 1) * 0.06
    return Frame((min(xs), max(xs)), (min(ys) - room, max(ys) + room))


def _axes(frame: Frame, x_label: str, xs: Sequence[float], counts: bool = False) -> Markup:
    body = Markup("")
    for y in ticks(max(frame.y[0], 0.0) if frame.y[1] > 0 else frame.y[0], frame.y[1], 4):
        height = frame.position(0, y)[1]
        body += Markup('<line class="grid" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>').format(
            LEFT, WIDTH - RIGHT, height, height
        )
        body += _text(LEFT - 6, height + 3.5, _short(y), "end")
    for x in xs:
        body += _text(frame.position(x, 0)[0], HEIGHT - BOTTOM + 13, _short(x), "middle")
    body += _text(WIDTH - RIGHT, HEIGHT - 2, x_label, "end")
    return body + (_text(LEFT, 9, "texts", "start") if counts else Markup(""))


def _path(frame: Frame, line: Line) -> Markup:
    places = " ".join("{:.1f},{:.1f}".format(*frame.position(x, y)) for x, y in line.points)
    return Markup('<polyline class="line s{}" points="{}"/>').format(line.style, places)


def _rule(frame: Frame, y: float) -> Markup:
    return Markup('<line class="rule" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>').format(
        LEFT, WIDTH - RIGHT, *[frame.position(0, y)[1]] * 2
    )


def _marks(frame: Frame, line: Line, highest: Mapping[float, float]) -> Markup:
    """A mark and a value at each point: round, square, or a diamond, by style; the highest value stands above."""
    body = Markup("")
    for x, y in line.points:
        across, up = frame.position(x, y)
        body += Markup('<path class="mark s{}" d="{}"/>').format(line.style, _shape(line.style, across, up))
        body += _text(across, up - 8 if y == highest[x] else up + 16, _short(y), "middle", "value")
    return body


def _shape(style: int, x: float, y: float) -> str:
    if style % 3 == 1:
        return f"M{x - 4:.1f},{y:.1f}a4,4 0 1,0 8,0a4,4 0 1,0 -8,0z"
    if style % 3 == 2:
        return f"M{x - 3.6:.1f},{y - 3.6:.1f}h7.2v7.2h-7.2z"
    return f"M{x:.1f},{y - 5:.1f}l5,5l-5,5l-5,-5z"


def _bar(x: float, y: float, width: float, height: float, kind: str) -> Markup:
    return Markup('<rect class="area {}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"/>').format(
        kind, x, y, max(width, 0), max(height, 0)
    )


def _text(x: float, y: float, words: str, anchor: str, kind: str = "tick") -> Markup:
    return Markup('<text class="{}" x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(kind, x, y, anchor, words)


def _svg(alt: str, body: Markup, data: Mapping[str, float] | None = None) -> Markup:
    extra = Markup("").join(Markup(' data-{}="{}"').format(name, value) for name, value in (data or {}).items())
    return Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}"{}>{}</svg>').format(
        WIDTH, HEIGHT, alt, extra, body
    )


def _short(value: float) -> str:
    """A number in few characters: 12,000 -> 12k, 0.25 -> 0.25."""
    if abs(value) >= 1_000_000:
        return f"{value / 1e6:.3g}M"
    if abs(value) >= 10_000:
        return f"{value / 1e3:.3g}k"
    if abs(value) >= 100 or value == int(value):
        return f"{value:.0f}"
    return f"{value:.3g}"
