"""The tables and the figure of benchmarks/quality.py: means and spreads over seeds, and the leads of the default."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from statistics import mean, stdev
from typing import Any

from matplotlib.figure import Figure
from rich.console import Group
from rich.table import Table
from rich.text import Text

from upop.report.results import number

SHOWN = {"retrieval-clip": "retrieval"}
"""How a task is called, where that is not its name."""
_GROUP = ("split", "cost", "budget", "reduction", "task", "method")
VARIANTS = ("no rotation", "no teacher", "no progress", "per modality")
"""Methods that differ from the default in one part; leads over them and over other methods are separate."""
_SAME = 1.02
"""Sizes may differ by so much and still count as equal."""
_EQUAL = {"params": "parameters", "macs": "GMACs", "model": "parameters of the whole model"}
_COLOURS = (
    *("#0072B2", "#D55E00", "#E69F00", "#009E73", "#CC79A7"),
    *("#56B4E9", "#444444", "#8a8a8a", "#B0B000", "#332288"),
)


def aggregate(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return one group per split, cost, budget, reduction, task and method, with figures over its seeds.

    `std` is the unbiased standard deviation, None of a single seed. Seconds, parameters and multiply-adds are means.
    A group that no seed could be measured for says why ("unsupported").
    """
    found: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in _GROUP), []).append(row)
    groups = []
    for key, members in found.items():
        group: dict[str, Any] = {**dict(zip(_GROUP, key, strict=True)), "metric": members[0]["metric"]}
        good = [row for row in members if "unsupported" not in row]
        if good:
            values = [row["quality"] for row in good]
            group |= {"mean": round(mean(values), 3), "std": round(stdev(values), 3) if len(values) > 1 else None}
            group |= {"n": len(values), "parameters": round(mean(row["parameters"] for row in good))}
            group["macs"] = round(mean(row["macs"] for row in good))
            for name in ("before_cut", "rates"):
                if name in good[0]:
                    group[name] = good[0][name]
            if "seconds" in good[0]:
                group["seconds"] = round(mean(row["seconds"] for row in good), 2)
        else:
            group["unsupported"] = members[0]["unsupported"]
        groups.append(group)
    return groups


def ahead(
    groups: Sequence[Mapping[str, Any]], default: str, *, variants: bool = False
) -> tuple[str, float, float] | None:
    """Return how far the default is ahead of the best other method of one column: its name, the lead, the spread.

    The lead is a difference of means, negative where the other is ahead. The spread is the larger one of the two
    standard deviations. Methods whose size is not equal are left out. None where there is nothing to compare.

    Args:
        groups: of one task, cost, budget and reduction.
        default: the method to look at.
        variants: compare it with the variants of itself instead of other methods.
    """
    fair = of_equal_size(groups, default)
    mine = next((group for group in fair if group["method"] == default), None)
    others = [group for group in fair if group["method"] != default and (group["method"] in VARIANTS) == variants]
    if mine is None or not others:
        return None
    best = max(others, key=lambda group: group["mean"])
    spread = max(mine["std"] or 0.0, best["std"] or 0.0)
    return best["method"], mine["mean"] - best["mean"], spread


def of_equal_size(groups: Sequence[Mapping[str, Any]], default: str) -> list[Mapping[str, Any]]:
    """Return those groups of one column that are as large as the default, or as the smallest where it is missing."""
    there = [group for group in groups if "mean" in group and group["method"] != "dense"]
    if not there:
        return []
    size = "macs" if there[0]["cost"] == "macs" else "parameters"
    norm = next((group[size] for group in there if group["method"] == default), min(group[size] for group in there))
    return [group for group in there if norm / _SAME <= group[size] <= norm * _SAME]


def tables(groups: Sequence[Mapping[str, Any]], methods: Sequence[str], default: str) -> list[Group]:
    """Return a table of methods and tasks for every cost, budget and reduction that was measured.

    The best method of equal size is bold in every column; lines below give the leads of the default, and why
    cells are empty.
    """
    names = [*dict.fromkeys(group["task"] for group in groups)]
    dense = {group["task"]: group for group in groups if group["method"] == "dense"}
    keys = {(g["cost"], g["budget"], g["reduction"]) for g in groups if g["method"] != "dense"}
    result = []
    for cost, budget, reduction in sorted(keys, key=lambda key: (key[0] != "params", key[1], int(key[2][:-1]))):
        chosen = [g for g in groups if (g["cost"], g["budget"], g["reduction"]) == (cost, budget, reduction)]
        columns = {task: [group for group in chosen if group["task"] == task] for task in names}
        size = "macs" if cost == "macs" else "parameters"
        headers = [_header(task, columns[task] or [dense.get(task, {})], dense.get(task), size) for task in names]
        title = f"{reduction} at equal {_EQUAL[cost]}, {budget} steps"
        table = Table("", *headers)
        best = {
            task: max((g["mean"] for g in of_equal_size(column, default)), default=None)
            for task, column in columns.items()
        }
        for method in methods:
            row = {task: next((g for g in column if g["method"] == method), None) for task, column in columns.items()}
            if any(row.values()):
                fair = {task: row[task] in of_equal_size(column, default) for task, column in columns.items()}
                table.add_row(method, *(_text(row[task], size, best[task] if fair[task] else None) for task in names))
        below = "\n".join([*_leads(columns, default), *_reasons(chosen)])
        result.append(Group(f"\n{title}", table, Text(below)))
    return result


def _header(task: str, groups: Sequence[Mapping[str, Any]], dense: Mapping[str, Any] | None, size: str) -> str:
    text = f"{SHOWN.get(task, task)}, {groups[0].get('metric', '')}"
    return text + (f"\ndense {dense['mean']:.1f}, {size_text(dense[size])}" if dense and "mean" in dense else "")


def _text(group: Mapping[str, Any] | None, size: str, best: float | None) -> str:
    if group is None:
        return ""
    if "mean" not in group:
        return "-"
    text = f"{group['mean']:.1f}" + (f" ± {group['std']:.1f}" if group["std"] is not None else "")
    text = f"[bold]{text}[/bold]" if group["mean"] == best else text
    return f"{text}  {size_text(group[size])}, {number(group['seconds'])} s"


def size_text(count: float) -> str:
    """Return a number of parameters or multiply-adds in thousands or millions."""
    return f"{count / 1e6:.2f} M" if count >= 1e6 else f"{count / 1e3:.0f} k"


def _leads(columns: Mapping[str, Sequence[Mapping[str, Any]]], default: str) -> list[str]:
    lines = []
    for (task, column), variants in itertools.product(columns.items(), (False, True)):
        found = ahead(column, default, variants=variants)
        if found is not None:
            other, lead, spread = found
            verdict = "ahead" if lead > spread else "behind" if -lead > spread else "within the spread"
            seeds = min(group["n"] for group in column if group["method"] in (default, other))
            shown = f"spread {spread:.1f}" if seeds > 1 else "one seed"
            lines.append(f"{SHOWN.get(task, task)}: {default} {lead:+.1f} against {other} ({shown}): {verdict}")
    return lines


def _reasons(groups: Sequence[Mapping[str, Any]]) -> list[str]:
    return [f"{g['method']}, {SHOWN.get(g['task'], g['task'])}: {g['unsupported']}" for g in groups if "mean" not in g]


def figure(groups: Sequence[Mapping[str, Any]], methods: Sequence[str], budget: int) -> Figure:
    """Draw quality against the remaining share of parameters: a panel per task, a line per method, bars of one std.

    Args:
        groups: of `aggregate`, those of equal parameters are drawn.
        methods: in the order of the legend.
        budget: training steps.
    """
    names = [*dict.fromkeys(group["task"] for group in groups)]
    columns = min(3, len(names))
    lines = -(-len(names) // columns)
    drawn = Figure(figsize=(3.3 * columns, 2.7 * lines + 0.7), layout="constrained")
    panels = drawn.subplots(lines, columns, squeeze=False).flatten()
    for panel in panels[len(names) :]:
        panel.set_axis_off()
    for panel, task in zip(panels, names, strict=False):
        own = [group for group in groups if group["task"] == task and group["cost"] == "params" and "mean" in group]
        dense = next((group for group in own if group["method"] == "dense"), None)
        whole = dense["parameters"] if dense else 1
        if dense:
            panel.axhline(dense["mean"], color="#222222", linestyle=":", linewidth=1, label="dense")
        for colour, method in zip(_COLOURS, methods, strict=False):
            points = sorted(
                (100 * group["parameters"] / whole, group["mean"], group["std"] or 0.0)
                for group in own
                if group["method"] == method and group["budget"] == budget
            )
            if points:
                sizes, values, spreads = zip(*points, strict=True)
                first = method == methods[0]
                style = {"linewidth": 2.2 if first else 1.1, "marker": "o", "markersize": 3.5, "capsize": 2}
                panel.errorbar(sizes, values, spreads, color=colour, label=method, zorder=3 if first else 2, **style)
        panel.set_title(f"{SHOWN.get(task, task)}, {budget} steps", fontsize=9)
        panel.set_xlabel("parameters left (%)", fontsize=8)
        panel.set_ylabel(own[0]["metric"] if own else "", fontsize=8)
        panel.tick_params(labelsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    shown = {
        label: handle for panel in panels for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    if shown:
        drawn.legend(shown.values(), shown, loc="outside lower center", ncols=5, frameon=False, fontsize=8)
    return drawn
