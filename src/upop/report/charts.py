"""Charts of the HTML page: points in percent of the plot's width and height, and axis ticks.

The page's style sheet sets colours, line widths and fonts, so that charts stretch with the page and their text does
not. matplotlib fixes all of them when it draws (`figures.py`), so only its tick locator is used here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from matplotlib.ticker import MaxNLocator

Point = tuple[float, float]

_MOST_POINTS = 400
_LARGEST = 1e30  # larger values are not drawn
_LETTERS = 8.0  # height of a line of text, in percent of the plot
_USUAL, _FEW = 0.97, 30  # quantile that is never clipped; fewer points are never clipped
_SMOOTHED = 40  # a curve with more points gets a running mean, over windows of 1 / _SMOOTHED of it


@dataclass(frozen=True)
class Line:
    """A curve, or single points.

    Attributes:
        name: for the legend.
        style: class in the style sheet, for colour and dashes.
        points: (step, value), by step.
        dots: whether to mark every point.
        label: whether to print the last value next to it.
    """

    name: str
    style: str
    points: Sequence[Point]
    dots: bool = False
    label: bool = False


@dataclass(frozen=True)
class Drawn:
    """A line in SVG coordinates: percent of the plot, x from the left, y from the top.

    `end` is the y coordinate and the text of the last value's label.
    """

    name: str
    style: str
    path: str
    dots: tuple[tuple[float, float, str], ...]
    end: tuple[float, str] | None


@dataclass(frozen=True)
class Tick:
    """A tick of an axis: its position in percent from the left or the top, and its text."""

    at: float
    text: str


@dataclass(frozen=True)
class Band:
    """A phase of the run in the background of a plot: its left edge and width, in percent."""

    name: str
    left: float
    width: float


@dataclass(frozen=True)
class Chart:
    """A plot, ready to be drawn.

    Attributes:
        title: quantity and unit.
        lines: the curves.
        legend: whether to show a legend.
        x: ticks of the horizontal axis.
        y: ticks of the vertical axis.
        x_title: title of the horizontal axis.
        bands: phases of the run.
        summary: the curves in words, for screen readers.
    """

    title: str
    lines: tuple[Drawn, ...]
    legend: bool
    x: tuple[Tick, ...]
    y: tuple[Tick, ...]
    x_title: str
    bands: tuple[Band, ...] = ()
    summary: str = ""


@dataclass
class _Scale:
    low: float
    high: float
    ticks: list[float] = field(default_factory=list)

    def at(self, value: float) -> float:
        return round(100 * (value - self.low) / (self.high - self.low), 2)


def chart(
    title: str,
    lines: Iterable[Line],
    phases: Sequence[tuple[str, float, float]] = (),
    *,
    x_title: str = "training step",
    from_zero: bool = False,
    x_from_zero: bool = True,
    cut: bool = False,
) -> Chart | None:
    """Return a plot of all lines that have points; None if none has.

    Args:
        title: quantity and unit.
        lines: the curves; points that are not finite are left out.
        phases: (name, first step, last step), drawn in the background.
        x_title: title of the horizontal axis.
        from_zero: whether the vertical axis starts at 0.
        x_from_zero: whether the horizontal axis does.
        cut: whether to clip a few values far above all others; the title then says so.
    """
    drawn = []
    for line in lines:
        finite = [(x, y) for x, y in line.points if abs(x) < _LARGEST and abs(y) < _LARGEST]  # NaN is not
        if finite:
            drawn.append((line, thinned(finite, _MOST_POINTS)))
    if not drawn:
        return None
    xs = [x for _, points in drawn for x, _ in points]
    ys = [y for _, points in drawn for _, y in points]
    edge = _edge(ys) if cut else None
    if edge is not None:
        title += f"; up to {compact(max(ys))}, clipped at {compact(edge)}"
        drawn = [(line, [(x, min(y, edge)) for x, y in points]) for line, points in drawn]
        ys = [min(y, edge) for y in ys]
    across = _scale([*xs, *([0] if x_from_zero else []), *(end for _, _, end in phases)], tight=x_from_zero)
    up = _scale([*ys, 0.0] if from_zero else ys)
    return Chart(
        title=title,
        lines=_apart([_drawn(line, points, across, up) for line, points in drawn]),
        legend=len(drawn) > 1,
        x=tuple(Tick(across.at(value), compact(value)) for value in across.ticks),
        y=tuple(Tick(100 - up.at(value), compact(value)) for value in up.ticks),
        x_title=x_title,
        bands=tuple(Band(name, across.at(start), across.at(end) - across.at(start)) for name, start, end in phases),
        summary="; ".join(
            f"{line.name}: from {compact(points[0][1])} to {compact(points[-1][1])}" for line, points in drawn
        ),
    )


def with_mean(line: Line, mean_style: str) -> list[Line]:
    """Return a noisy line and its running mean; a line with few points is returned alone."""
    if len(line.points) <= _SMOOTHED:
        return [Line(line.name, mean_style, line.points, line.dots, line.label)]
    window = max(2, len(line.points) // _SMOOTHED)
    mean = []
    for place in range(len(line.points)):
        around = line.points[max(0, place - window) : place + window + 1]
        mean.append((line.points[place][0], sum(y for _, y in around) / len(around)))
    return [Line("every row", line.style, line.points), Line(f"mean of {2 * window + 1} rows", mean_style, mean)]


def thinned(points: Sequence[Point], most: int) -> list[Point]:
    """Return the points; if there are more than `most`, means of neighbours, and the last point."""
    if len(points) <= most:
        return list(points)
    size = math.ceil(len(points) / most)
    parts = [points[start : start + size] for start in range(0, len(points), size)]
    means = [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in parts]
    return [*means[:-1], points[-1]]


def compact(value: float) -> str:
    """Return a number for an axis: 0, 0.5, 12, 1,500, 20k, 3M, 2e-5."""
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:.3g}M"
    if size >= 1e4:
        return f"{value / 1e3:.3g}k"
    if size >= 1e3:
        return f"{value:,.0f}"
    if size < 1e-3:
        digits, _, exponent = f"{value:.1e}".partition("e")
        return f"{digits.removesuffix('.0')}e{int(exponent)}"
    return f"{value:.3g}"


def _apart(lines: list[Drawn]) -> tuple[Drawn, ...]:
    """Move the labels at the ends of lines apart, so that none overlap."""
    result = list(lines)
    lowest = -math.inf
    ends = [(line.end, place) for place, line in enumerate(lines) if line.end is not None]
    for (at, text), place in sorted(ends):
        lowest = max(at, lowest + _LETTERS)
        result[place] = replace(result[place], end=(round(lowest, 2), text))
    return tuple(result)


def _edge(values: Sequence[float]) -> float | None:
    """Return the value at which to clip a curve that starts far above its rest; None for other curves."""
    ordered = sorted(values)
    usual = ordered[int(_USUAL * (len(ordered) - 1))]
    return 1.25 * usual if len(ordered) >= _FEW and usual > 0 and ordered[-1] > 2.5 * usual else None


def _scale(values: Sequence[float], *, tight: bool = False) -> _Scale:
    low, high = min(values), max(values)
    if low == high:
        spread = abs(low) * 0.1 or 1.0
        low, high = low - spread, high + spread
    ticks = [float(value) for value in MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)]
    if not tight:
        low, high = min(low, ticks[0]), max(high, ticks[-1])
    margin = 1e-9 * (high - low)
    return _Scale(low, high, [value for value in ticks if low - margin <= value <= high + margin])


def _drawn(line: Line, points: Sequence[Point], across: _Scale, up: _Scale) -> Drawn:
    places = [(across.at(x), round(100 - up.at(y), 2)) for x, y in points]
    path = "M" + " L".join(f"{x} {y}" for x, y in places) if len(places) > 1 else ""
    dots = [
        (x, y, f"{line.name}: {compact(at)}, {value:.4g}") for (x, y), (at, value) in zip(places, points, strict=True)
    ]
    marked = tuple(dots) if line.dots or len(places) == 1 else ()
    end = (places[-1][1], f"{points[-1][1]:.4g}") if line.label else None
    return Drawn(line.name, line.style, path, marked, end)
