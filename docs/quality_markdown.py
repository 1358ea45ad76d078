"""The tables of quality by method, from the files of `benchmarks/quality.py`: headings and rows of text.

Cells that were not measured show "-". In every column the best of equal size is bold.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, mode
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

from quality_tables import ahead, of_equal_size, size_text
from upop.report.results import number

Group = Mapping[str, Any]
Shown = tuple[list[str], list[list[str]]]
"""Headings and rows."""

DEFAULT = "upop"
TASKS = {
    "classification": "classification, acc@1",
    "vqa": "question answering, accuracy",
    "nlvr": "visual reasoning, accuracy",
    "caption": "captioning, BLEU-4",
    "retrieval-clip": "retrieval, mean recall",
}
METHODS = {
    DEFAULT: "upop, the default",
    "no rotation": "upop without rotation",
    "reference": "reference, as published",
    "reference 36:1": "reference, costs 36 : 1",
    "no teacher": "upop without teacher",
    "no progress": "upop, one cut",
    "per modality": "upop, budgets per modality",
    "L2": "L2, cut first",
    "Taylor": "Taylor, cut first",
    "Torch-Pruning L2": "Torch-Pruning, L2",
    "Torch-Pruning Taylor": "Torch-Pruning, Taylor",
}
_VARIANTS = {
    "no rotation": "without rotation",
    "no teacher": "without teacher",
    "no progress": "one cut",
    "per modality": "budgets per modality",
}
"""What the variants of the default are called in the cells of the leads."""
_ABSENT = "-"
_AHEAD = {
    False: f"*{DEFAULT}, lead over the best other method*",
    True: f"*{DEFAULT}, lead over its best variant*",
}


def short(content: Mapping[str, Any], reductions: Sequence[str]) -> Shown:
    """Return the table of all methods at equal parameters and the middle budget, without sizes and times."""
    budget = middle(content)
    groups = [group for group in content["groups"] if group["cost"] == "params"]
    rows = [["dense", *(_quality(_one(groups, task, "dense")) for task in TASKS)]]
    for reduction in reductions:
        chosen = [group for group in groups if (group["budget"], group["reduction"]) == (budget, reduction)]
        for method, title in METHODS.items():
            cells = [_cell(chosen, task, method, "") for task in TASKS]
            rows.append([f"{reduction}: {title}", *cells])
        rows += [[f"{reduction}: {title}", *leads] for title, leads in _leads(chosen)]
    return [f"{budget} steps, {seeds(groups, budget)}", *TASKS.values()], rows


def whole(content: Mapping[str, Any], cost: str) -> list[tuple[str, Shown]]:
    """Return a titled table for every budget and reduction of one cost ("params" or "macs"), with sizes and times."""
    _refuse_unknown(content, METHODS)
    size = "macs" if cost == "macs" else "parameters"
    groups = [group for group in content["groups"] if group["cost"] == cost]
    dense = [group for group in content["groups"] if group["method"] == "dense"]
    keys = {(group["budget"], group["reduction"]) for group in groups if group["method"] != "dense"}
    found = []
    for budget, reduction in sorted(keys, key=lambda key: (key[0], float(key[1][:-1]))):
        chosen = [group for group in groups if (group["budget"], group["reduction"]) == (budget, reduction)]
        rows = [["dense", "", *(_quality(_one(dense, task, "dense"), size) for task in TASKS)]]
        for method, title in METHODS.items():
            own = [group for group in chosen if group["method"] == method]
            if own:
                rows.append([title, _steps(own, budget), *(_cell(chosen, task, method, size) for task in TASKS)])
        rows += [[title, "", *leads] for title, leads in _leads(chosen)]
        title = f"{reduction}, {budget} steps, {seeds(chosen, budget)}"
        found.append((title, (["", "steps", *TASKS.values()], rows)))
    return found


def levers(content: Mapping[str, Any]) -> Shown:
    """Return the table of what was tried in place of the default, with the time beside the default without teacher."""
    groups = [group for group in content["groups"] if "mean" in group and group["method"] != "dense"]
    usual = mode(group["budget"] for group in groups)
    tasks = {name: title for name, title in TASKS.items() if any(group["task"] == name for group in groups)}
    plain = [group for group in groups if (group["method"], group["budget"]) == ("no teacher", usual)]
    rows = []
    for method, budget in dict.fromkeys((group["method"], group["budget"]) for group in groups):
        own = [group for group in groups if (group["method"], group["budget"]) == (method, budget)]
        beside = {group["task"]: _one(plain, group["task"], "no teacher") for group in own}
        times = [group["seconds"] / found["seconds"] for group in own if (found := beside[group["task"]]) is not None]
        title = _LEVERS.get(method, method) + (f", {budget} steps" if budget != usual else "")
        cells = [_quality(_one(own, task, method)) for task in tasks]
        rows.append([title, *cells, _counts(own), f"{mean(times):.2f}" if times else _ABSENT])
    reduction = ", ".join(sorted({group["reduction"] for group in groups}))
    return [f"{reduction}, {usual} steps, validation", *tasks.values(), "seeds", "time"], rows


_LEVERS = {DEFAULT: "upop, the default", "no teacher": "the default without teacher"}


def sketch(content: Mapping[str, Any]) -> Shown:
    """Return the table of what an earlier sketch of the search said."""
    headings = [f"{content['reduction']}, {content['split']}", "steps", "classification", "visual reasoning"]
    rows = [
        [
            row["name"] + ("" if row.get("seeds") != 1 else " (one seed)"),
            str(row["steps"]),
            *(f"{row[task]:.1f}" if row.get(task) is not None else _ABSENT for task in ("classification", "nlvr")),
        ]
        for row in content["rows"]
    ]
    return headings, rows


def middle(content: Mapping[str, Any]) -> int:
    """Return the middle one of the budgets of a file, in steps."""
    budgets = sorted({group["budget"] for group in content["groups"] if group["method"] != "dense"})
    return int(budgets[len(budgets) // 2])


def seeds(groups: Sequence[Group], budget: int) -> str:
    """Return how many seeds the groups of a budget are means of."""
    own = [group for group in groups if group["budget"] == budget and "n" in group]
    counts = _counts(own)
    return f"{counts} seed{'' if counts == '1' else 's'}" if own else "nothing measured"


def _counts(groups: Sequence[Group]) -> str:
    counts = sorted({group["n"] for group in groups})
    return " to ".join(str(count) for count in dict.fromkeys((counts[0], counts[-1])))


def _one(groups: Sequence[Group], task: str, method: str) -> Group | None:
    return next((group for group in groups if (group["task"], group["method"]) == (task, method)), None)


def _cell(groups: Sequence[Group], task: str, method: str, size: str) -> str:
    """Return a method's cell among all groups of one budget, reduction and cost."""
    column = [group for group in groups if group["task"] == task]
    group, fair = _one(column, task, method), of_equal_size(column, DEFAULT)
    text = _quality(group)
    if group is None or "mean" not in group:
        return text
    if group in fair and group["mean"] == max(other["mean"] for other in fair):
        text = f"**{text}**"
    if not size:
        return text if group in fair else f"{text} ({size_text(group['parameters'])})"
    time = f", {number(group['seconds'])} s" if "seconds" in group else ""  # of one machine only
    return f"{text} ({size_text(group[size])}{time})"


def _quality(group: Group | None, size: str = "") -> str:
    if group is None or "mean" not in group:
        return _ABSENT
    text = f"{group['mean']:.1f}" + (f" ± {group['std']:.1f}" if group["std"] is not None else "")
    return f"{text} ({size_text(group[size])})" if size else text


def _steps(groups: Sequence[Group], budget: int) -> str:
    first = max((group["before_cut"] for group in groups if "before_cut" in group), default=None)
    return _ABSENT if first is None else f"{first} + {budget - first}"


def _leads(groups: Sequence[Group]) -> list[tuple[str, list[str]]]:
    columns = [[group for group in groups if group["task"] == task] for task in TASKS]
    return [(title, [_lead(column, variants) for column in columns]) for variants, title in _AHEAD.items()]


def _lead(column: Sequence[Group], variants: bool) -> str:
    found = ahead(column, DEFAULT, variants=variants)
    if found is None:
        return _ABSENT
    other, lead, spread = found
    spreads = f", spread {spread:.1f}" if any(group.get("std") is not None for group in column) else ""
    return f"{lead:+.1f} ({_VARIANTS.get(other, other)}{spreads})"


def _refuse_unknown(content: Mapping[str, Any], methods: Mapping[str, str]) -> None:
    unknown = {group["method"] for group in content["groups"]} - {*methods, "dense"}
    assert not unknown, f"the file has methods that the tables do not know: {sorted(unknown)}"
