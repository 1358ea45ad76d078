"""The tables of benchmarks/tokens_quality.py: means and spreads, at equal multiply-adds and at equal measured speed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from statistics import mean, stdev
from typing import Any

ARMS = ("weights", "tokens", "both", "tokens, cross", "both, cross")
FACTORS = (3.0, 4.0, 2.0)
"""In the order in which they are measured."""
SHOWN = {
    "classification": "classification",
    "nlvr": "visual reasoning",
    "caption": "captioning",
    "vqa": "VQA",
    "retrieval-crossget": "CLIP retrieval",
}


def summary(rows: Sequence[dict[str, Any]], times: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a group per task, factor and arm: mean and standard deviation over seeds, and measured speed."""
    groups = []
    for task, factor, arm in itertools.product(SHOWN, sorted(FACTORS), ARMS):
        mine = [row for row in rows if (row["task"], row.get("factor"), row["arm"]) == (task, factor, arm)]
        good = [row for row in mine if "quality" in row]
        if not mine:
            continue
        group: dict[str, Any] = {"task": task, "factor": factor, "arm": arm, "metric": mine[0]["metric"]}
        if not good:
            groups.append({**group, "refused": mine[0]["refused"]})
            continue
        values = [row["quality"] for row in good]
        group |= {"mean": round(mean(values), 2), "std": round(stdev(values), 2) if len(values) > 1 else None}
        group |= {"seeds": len(values), "values": values, "before": good[0].get("before")}
        group |= {"share": good[0]["share"], "removed": good[0]["removed"], "cut": good[0]["cut"]}
        group["macs"] = round(mean(row["macs"] / row["of"] for row in good), 4)
        timed = times.get(task, {})
        group["faster"] = {
            batch: round(each["dense"] / each[f"{arm}/{factor:g}x"], 3)
            for batch, each in timed.items()
            if f"{arm}/{factor:g}x" in each
        }
        groups.append(group)
    return groups


def ahead(groups: Sequence[dict[str, Any]], task: str, factor: float) -> dict[str, Any] | None:
    """Return how far the better `both` is ahead of the better single one at equal multiply-adds, and the spread."""
    column = [group for group in groups if (group["task"], group.get("factor")) == (task, factor) and "mean" in group]
    both = [group for group in column if group["arm"].startswith("both")]
    single = [group for group in column if not group["arm"].startswith("both")]
    if not both or not single:
        return None
    best, other = (max(each, key=lambda group: group["mean"]) for each in (both, single))
    lead = round(best["mean"] - other["mean"], 2)
    spread = None if best["std"] is None or other["std"] is None else max(best["std"], other["std"])
    known = None if spread is None else lead > spread  # a single seed says nothing of it
    return {"both": best["arm"], "single": other["arm"], "lead": lead, "spread": spread, "ahead": known}


def at_speed(groups: Sequence[dict[str, Any]], task: str, factor: float, batch: str) -> dict[str, float]:
    """Return what each way reaches at the measured speed of `both` of a factor, between its neighbouring factors.

    Quality is a straight line over the logarithm of the speed between two factors; the dense model is the first point.
    A method that is never as fast has no figure.
    """
    mine = [group for group in groups if group["task"] == task and (group.get("faster") or {}).get(batch)]
    speed: float | None = next(
        (g["faster"][batch] for g in mine if (g["arm"], g.get("factor")) == ("both", factor)), None
    )
    found: dict[str, float] = {}
    if not speed:
        return found
    for arm in ARMS:
        points = sorted((math.log(g["faster"][batch]), g["mean"]) for g in mine if g["arm"] == arm)
        dense = next((group["mean"] for group in groups if group["task"] == task and group["arm"] == "dense"), None)
        points = ([(0.0, dense)] if dense is not None else []) + points
        for (slow, one), (fast, other) in itertools.pairwise(points):
            if slow <= math.log(speed) <= fast + 1e-9 and fast > slow:
                found[arm] = round(one + (other - one) * (math.log(speed) - slow) / (fast - slow), 2)
    return found


def table(groups: Sequence[dict[str, Any]]) -> str:
    """Return Markdown: quality at equal multiply-adds, the speed of that (batch 1 and 16), and who is ahead."""
    headings = ["task (dense)", "multiply-adds", *ARMS, "both is ahead by"]
    lines = [headings, ["---", "---", *["---:"] * (len(ARMS) + 1)]]
    for task, factor in itertools.product(SHOWN, sorted(FACTORS)):
        column = {g["arm"]: g for g in groups if (g["task"], g.get("factor")) == (task, factor)}
        dense = next((g["mean"] for g in groups if (g["task"], g["arm"]) == (task, "dense")), None)
        if column and dense is not None:
            lead = ahead(groups, task, factor)
            said = "-" if lead is None else f"{lead['lead']:+.1f}"
            figures = [_figure(column.get(arm)) for arm in ARMS]
            lines.append([f"{SHOWN[task]} ({dense:.1f})", f"1/{factor:g}", *figures, said])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _figure(group: dict[str, Any] | None) -> str:
    if group is None or "mean" not in group:
        return "-" if group is None else "out of reach"
    spread = "" if group["std"] is None else f" ± {group['std']:.1f}"
    speeds = ", ".join(f"{speed:.1f}x" for speed in group["faster"].values())
    also = "*" if group["arm"].startswith("tokens") and group["cut"] else ""  # merging is not enough
    return f"{group['mean']:.1f}{also}{spread}" + (f" ({speeds})" if speeds else "")
