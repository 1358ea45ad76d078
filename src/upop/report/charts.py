"""Curves as the page draws them: points in percent of the plot's width and height, and round numbers along its sides.

Colours, widths and letters are the page's: a plot stretches with it, and its letters do not. matplotlib, which draws
the figures that are files (`figures.py`), fixes all three when it draws; only its ticks serve here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from matplotlib.ticker import MaxNLocator

Point = tuple[float, float]

_MOST_POINTS = 400
_LARGEST = 1e30  # what diverged further than this is not drawn
_LETTERS = 8.0  # height of a line of letters, in percent of the plot
_USUAL, _FEW = 0.97, 30  # that share of the values is not cut off, and nothing where there are fewer
_SMOOTHED = 40  # a curve of more points is drawn with its running mean over so many parts of it


@dataclass(frozen=True)
class Line:
    """A curve, or single points.

    Attributes:
        name: for the legend.
        style: class of the page's style sheet: its colour and dashes.
        points: (step, value), by step.
        dots: whether every point is marked.
        label: whether the last value is written beside it.
    """

    name: str
    style: str
    points: Sequence[Point]
    dots: bool = False
    label: bool = False


@dataclass(frozen=True)
class Drawn:
    """A line in percent of the plot: x from the left, y from the top, as SVG wants them.

    `end` is the last value, with its place from the top.
    """

    name: str
    style: str
    path: str
    dots: tuple[tuple[float, float, str], ...]
    end: tuple[float, str] | None


@dataclass(frozen=True)
class Tick:
    """A round number beside a plot: where, in percent from the left or from the top, and how it is written."""

    at: float
    text: str


@dataclass(frozen=True)
class Band:
    """A phase of the run behind a plot: from where to where, in percent from the left."""

    name: str
    left: float
    width: float


@dataclass(frozen=True)
class Chart:
    """A plot, ready to be drawn.

    Attributes:
        title: what is drawn, with its group.
        lines: the curves.
        legend: whether there are several names to tell apart.
        x: numbers below.
        y: numbers on the left.
        x_title: what the numbers below are.
        bands: phases of the run.
        summary: the same in words, for those who do not see it.
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
        title: what is drawn, with its group.
        lines: the curves; points that are not finite are left out.
        phases: (name, first step, last step), drawn behind them.
        x_title: what the numbers below are.
        from_zero: whether the numbers on the left begin with 0.
        x_from_zero: whether those below do.
        cut: whether a few values far above all others are drawn at the upper edge, which the title then says.
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
        title += f"; up to {compact(max(ys))}, cut at {compact(edge)}"
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
    """Return a noisy line with its running mean, which bears its name; alone where it has few points."""
    if len(line.points) <= _SMOOTHED:
        return [Line(line.name, mean_style, line.points, line.dots, line.label)]
    window = max(2, len(line.points) // _SMOOTHED)
    mean = []
    for place in range(len(line.points)):
        around = line.points[max(0, place - window) : place + window + 1]
        mean.append((line.points[place][0], sum(y for _, y in around) / len(around)))
    return [Line("every row", line.style, line.points), Line(f"mean of {2 * window + 1} rows", mean_style, mean)]


def thinned(points: Sequence[Point], most: int) -> list[Point]:
    """Return the points, or, where there are more than `most`, means of neighbours, and the last one as it is."""
    if len(points) <= most:
        return list(points)
    size = math.ceil(len(points) / most)
    parts = [points[start : start + size] for start in range(0, len(points), size)]
    means = [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in parts]
    return [*means[:-1], points[-1]]


def compact(value: float) -> str:
    """Return a number as an axis shows it: 0, 0.5, 12, 1,500, 20k, 3M, 2e-5."""
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
    """Move the values at the ends of lines apart, so that none lies over another."""
    result = list(lines)
    lowest = -math.inf
    ends = [(line.end, place) for place, line in enumerate(lines) if line.end is not None]
    for (at, text), place in sorted(ends):
        lowest = max(at, lowest + _LETTERS)
        result[place] = replace(result[place], end=(round(lowest, 2), text))
    return tuple(result)


def _edge(values: Sequence[float]) -> float | None:
    """Return where to cut a curve that begins far above all the rest of it; None where it does not."""
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
