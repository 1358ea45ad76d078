"""Curves: where points and numbers lie, what is thinned, and what is cut."""

from __future__ import annotations

import itertools
import math

import pytest

from upop.report.charts import Line, chart, compact, thinned, with_mean


def test_points_lie_in_percent_of_the_plot() -> None:
    line = Line("a", "ink", [(0, 0.0), (50, 10.0), (100, 5.0)], dots=True, label=True)
    found = chart("a title", [line], [("search", 0, 40), ("retrain", 40, 100)])
    assert found is not None
    (drawn,) = found.lines
    assert drawn.path == "M0.0 100.0 L50.0 0.0 L100.0 50.0"
    assert drawn.dots[1] == (50.0, 0.0, "a: 50, 10")
    assert drawn.end == (50.0, "5")
    assert [(tick.at, tick.text) for tick in found.y] == [
        (100.0, "0"),
        (80.0, "2"),
        (60.0, "4"),
        (40.0, "6"),
        (20.0, "8"),
        (0.0, "10"),
    ]
    assert [(band.name, band.left, band.width) for band in found.bands] == [("search", 0, 40), ("retrain", 40, 60)]
    assert not found.legend
    assert found.summary == "a: from 0 to 5"


def test_nothing_to_draw_is_no_plot_and_what_is_not_finite_is_left_out() -> None:
    assert chart("t", [Line("a", "ink", [])]) is None
    assert chart("t", [Line("a", "ink", [(1, math.nan), (2, math.inf)])]) is None
    found = chart("t", [Line("a", "ink", [(1, 1.0), (2, math.nan), (3, 3.0)])])
    assert found is not None
    assert found.lines[0].path.count(" L") == 1


def test_one_point_and_a_flat_line_are_drawn() -> None:
    found = chart("t", [Line("a", "ink", [(7, 2.0)]), Line("b", "ink", [(0, 2.0), (7, 2.0)])])
    assert found is not None
    one, flat = found.lines
    assert not one.path
    assert len(one.dots) == 1
    assert flat.path
    assert found.legend


def test_values_at_the_ends_do_not_lie_over_each_other() -> None:
    lines = [Line(str(value), "ink", [(0, 0.0), (1, value)], label=True) for value in (9.0, 9.1, 5.0)]
    found = chart("t", lines)
    assert found is not None
    places = sorted(line.end[0] for line in found.lines if line.end is not None)
    assert all(second - first >= 8 for first, second in itertools.pairwise(places))
    assert {line.end[1] for line in found.lines if line.end is not None} == {"9", "9.1", "5"}


def test_a_loss_that_begins_far_above_is_cut_and_this_is_said() -> None:
    points = [(step, 100.0 if step == 0 else 2.0 + step / 1000) for step in range(200)]
    whole, cut = chart("loss", [Line("a", "ink", points)]), chart("loss", [Line("a", "ink", points)], cut=True)
    assert whole is not None
    assert cut is not None
    assert whole.title == "loss"
    assert cut.title == "loss; up to 100, clipped at 2.74"
    assert cut.y[0].text == "2"
    steady = chart("loss", [Line("a", "ink", points[1:])], cut=True)
    assert steady is not None
    assert steady.title == "loss"


def test_many_points_become_means_of_neighbours_and_the_last_stays() -> None:
    points = [(float(step), float(step % 2)) for step in range(10_001)]
    found = thinned(points, 400)
    assert len(found) <= 400
    assert found[-1] == points[-1]
    assert all(0.4 < value < 0.6 for _, value in found[:-1])
    assert thinned(points[:5], 400) == points[:5]


def test_a_noisy_line_gets_its_mean() -> None:
    noisy = Line("loss", "faint", [(step, 1.0 + (-1) ** step) for step in range(400)])
    every, mean = with_mean(noisy, "ink")
    assert every.points == noisy.points
    assert all(abs(value - 1) < 0.1 for _, value in mean.points)
    (alone,) = with_mean(Line("loss", "faint", noisy.points[:10]), "ink")
    assert (alone.name, alone.style) == ("loss", "ink")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.5, "0.5"),
        (12.34, "12.3"),
        (1500, "1,500"),
        (20_000, "20k"),
        (3e6, "3M"),
        (2e-5, "2e-5"),
        (2.5e-4, "2.5e-4"),
        (-4, "-4"),
    ],
)
def test_numbers_beside_plots_are_short(value: float, text: str) -> None:
    assert compact(value) == text
