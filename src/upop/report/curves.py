"""The charts of a page: metrics, kept channels, loss and learning rate, of one run or several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from upop.report.charts import Chart, Line, Point, chart, with_mean
from upop.report.results import NO_PERCENT, Results
from upop.report.run import Run

_ABOUT = frozenset({"phase", "epoch", "step", "split", "average", "seconds"})  # all other keys of a row are metrics
_MOST_METRICS = 2
_RUN_STYLES = 6
_MODALITIES = ("vision", "text")


def run_charts(run: Run) -> list[Chart]:
    """Return the charts of a run, without empty ones."""
    phases = _phases(run.rows)
    trained, searched = _trained(run), [row for row in _trained(run) if row["phase"] == "search" and "ratio" in row]
    loss = Line("loss", "faint", _points(trained, "loss"))
    charts = [
        chart(_metric_title(run), _metric_lines(run), phases),
        chart("Kept during the search (%)", _kept_lines(searched), _phases(searched), from_zero=True),
        chart("Training loss", with_mean(loss, "ink"), phases, cut=True),
        chart("Learning rate", [Line("learning rate", "ink", _points(trained, "lr"))], phases, from_zero=True),
    ]
    return [each for each in charts if each is not None]


def comparison_charts(runs: Sequence[Run], names: Sequence[str]) -> list[Chart]:
    """Return the charts of several runs, and charts of metric over size.

    Args:
        runs: the runs.
        names: for the legend.
    """
    styles = [f"run{place % _RUN_STYLES}" for place in range(len(runs))]
    named = list(zip(names, styles, runs, strict=True))
    metric = next((name for run in runs for name in _metrics(run)), "")
    evaluated = [Line(name, style, _evaluated(run, metric), dots=True) for name, style, run in named]
    losses = [
        replace(with_mean(Line(name, style, _points(_trained(run), "loss")), style)[-1], name=name)
        for name, style, run in named
    ]
    kept = [
        Line(f"{name}, {modality}", f"{style}{' second' * (number > 0)}", points)
        for name, style, run in named
        for number, (modality, points) in enumerate(_kept(_trained(run)).items())
    ]
    charts = [
        *(_sizes(named, column, title) for column, title in (("parameters", "parameters (M)"), ("gmacs", "GMACs"))),
        chart(f"{metric} during training (%)", evaluated),
        chart("Training loss, running mean", losses, cut=True),
        chart("Kept during the search (%)", kept, from_zero=True),
    ]
    return [each for each in charts if each is not None]


def _sizes(named: Sequence[tuple[str, str, Run]], column: str, title: str) -> Chart | None:
    """Return a chart of every model's metric over its size, on the last split that all runs have."""
    finished = [(name, style, run.results) for name, style, run in named if run.results is not None]
    shared = [
        (split, metric)
        for split in (finished[0][2].models[-1].metrics if finished else ())
        for metric in finished[0][2].shown
        if all(metric in results.models[-1].metrics.get(split, {}) for _, _, results in finished)
    ]
    if not shared:
        return None
    split = shared[-1][0]
    metric = next(metric for at, metric in shared if at == split)
    scale = 1e6 if column == "parameters" else 1.0
    lines = []
    for name, style, results in finished:
        points = [
            (getattr(model, column) / scale, model.metrics[split][metric])
            for model in results.models
            if metric in model.metrics.get(split, {})
        ]
        lines.append(Line(name, style, sorted(points), dots=True))
    return chart(f"{split} {metric} (%) over {title}", lines, x_title=title)


def _metric_title(run: Run) -> str:
    splits = list(dict.fromkeys(str(row["split"]) for row in run.rows if "split" in row))
    return f"On the {' and '.join(splits)} split (%)"


def _metric_lines(run: Run) -> list[Line]:
    lines: list[Line] = []
    for place, metric in enumerate(_metrics(run)[:_MOST_METRICS]):
        style = f"metric{place}"
        points = _evaluated(run, metric)
        lines.append(Line(metric, style, points, dots=True, label=True))
        average = [
            (float(row["step"]), float(row["average"][metric])) for row in run.rows if metric in row.get("average", {})
        ]
        lines.append(Line(f"{metric}, averaged weights", f"{style} second", average, dots=True))
        dense = _dense(run.results, run, metric)
        if dense is not None and points:
            lines.append(Line(f"{metric}, dense model", f"{style} baseline", [(0.0, dense), (points[-1][0], dense)]))
    return lines


def _metrics(run: Run) -> list[str]:
    """Return the metrics of evaluations during training: those in the results table, or the first one."""
    names = [name for row in run.rows if "split" in row for name in row if name not in _ABOUT]
    names += [name for row in run.rows for name in row.get("average", {})]
    found = dict.fromkeys(name for name in names if name not in NO_PERCENT)  # one scale for all
    shown = run.results.shown if run.results is not None else ()
    return [*(name for name in shown if name in found), *(name for name in found if name not in shown)][
        : max(1, sum(name in found for name in shown))
    ]


def _dense(results: Results | None, run: Run, metric: str) -> float | None:
    """Return the dense model's metric on the split evaluated during training; None for a dense run."""
    if results is None or len(results.models) < 2:
        return None
    splits = [str(row["split"]) for row in run.rows if "split" in row]
    return results.dense.metrics.get(splits[-1], {}).get(metric) if splits else None


def _evaluated(run: Run, metric: str) -> list[Point]:
    return _points([row for row in run.rows if "split" in row], metric)


def _trained(run: Run) -> list[Mapping[str, Any]]:
    return [row for row in run.rows if "loss" in row and "split" not in row]  # evaluations may have a loss too


def _kept_lines(searched: Sequence[Mapping[str, Any]]) -> list[Line]:
    target = [(float(row["step"]), 100 * (1 - float(row["ratio"]))) for row in searched]
    lines = [Line("target for all groups", "ink baseline", target)]
    for modality, points in _kept(searched).items():
        style = modality if modality in _MODALITIES else "other"
        lines.append(Line(modality, style, points, label=True))
    return lines


def _kept(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Point]]:
    modalities = dict.fromkeys(name for row in rows for name in row.get("kept", {}))
    return {
        modality: [
            (float(row["step"]), 100 * float(row["kept"][modality])) for row in rows if modality in row.get("kept", {})
        ]
        for modality in modalities
    }


def _points(rows: Sequence[Mapping[str, Any]], name: str) -> list[Point]:
    return [(float(row["step"]), float(row[name])) for row in rows if isinstance(row.get(name), int | float)]


def _phases(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, float, float]]:
    """Return every phase with its first and last step; each begins where the one before ended."""
    phases: list[tuple[str, float, float]] = []
    start = 0.0
    for phase in dict.fromkeys(str(row["phase"]) for row in rows):
        end = float(max(row["step"] for row in rows if row["phase"] == phase))
        phases.append((phase, start, end))
        start = end
    return phases
