"""How good small models are with fewer weights, with fewer tokens, and with both on one budget of multiply-adds.

Five generated tasks at 112 pixels (benchmarks/tokens_tasks.py), cut to a half, a third and a quarter of their
multiply-adds, then trained for as many steps, taught by the dense model:

- weights: `upop.calibrate`;
- tokens: `upop.merge_tokens` alone; "tokens, cross" has CrossGET's cross tokens, which lead the merging and learn by
  the cross loss (BLIP: every layer of the image tower and of the text layers that look; CLIP: as published);
- both: `upop.calibrate_with_tokens`, which shares the budget by the loss on held-out batches; "both, cross" has the
  same share, and cross tokens.

The seeds decide which samples calibrate, their order in training, and all draws; shares are decided for the first seed.
Every cell is a line in FOLDER/cells.jsonl as soon as it is measured, and is not measured again. `--latency` then times
the models of the first seed side by side, and `--table` writes and prints the tables.

    python benchmarks/tokens_quality.py --folder /tmp/tokens
    python benchmarks/tokens_quality.py --folder /tmp/tokens --latency --table
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import nn

import upop
from dense_tasks import one_of
from tokens_tasks import BATCH, KINDS, PATCH, PIXELS, SHOWN, Bench
from upop.checkpoints import load
from upop.cli.shapes import score_captions_of_shapes
from upop.errors import SettingError
from upop.files import write_json
from upop.machine import machine
from upop.models.blip_cross import add_cross_tokens
from upop.models.crossget import CrossGetClip
from upop.tokens.budget import Goal, best_of, find_shares, goal_of, merge_share
from upop.tokens.encoders import removed_tokens

RESULT = Path(__file__).parent / "results" / "tokens_quality_cpu.json"
FACTORS = (3.0, 4.0, 2.0)
"""In the order in which they are measured."""
ARMS = ("weights", "tokens", "both", "tokens, cross", "both, cross")
RANKING, HELD_OUT = 4, 6
"""Batches that rank, and that compare shares."""


def cells(tasks: Sequence[str], seeds: int) -> Iterator[tuple[str, str, float, int]]:
    """Yield task, arm, factor and seed of what is to be measured, such that those that say most come first."""
    plain = [arm for arm in ARMS if "cross" not in arm]
    crossed = [arm for arm in ARMS if "cross" in arm]
    for seed in range(seeds):
        for arms, factors in (
            (plain, FACTORS[:2]),
            (crossed, FACTORS[:1]),
            (plain, FACTORS[2:]),
            (crossed, FACTORS[1:]),
        ):
            for task, factor, arm in itertools.product(tasks, factors, arms):
                if task != "classification" or arm in plain:
                    yield task, arm, factor, seed


class Cells:
    """What was measured, a line each."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "cells.jsonl"
        lines = self.file.read_text().splitlines() if self.file.is_file() else []
        self.rows: list[dict[str, Any]] = [json.loads(line) for line in lines if line.endswith("}")]

    def find(self, **wanted: Any) -> dict[str, Any] | None:
        """Return the row with these values."""
        return next((row for row in self.rows if all(row.get(key) == value for key, value in wanted.items())), None)

    def add(self, row: dict[str, Any]) -> None:
        """Append a row."""
        self.rows.append(row)
        with self.file.open("a") as file:
            file.write(json.dumps(row) + "\n")


def share_of(bench: Bench, arm: str, goal: Goal, factor: float, known: Cells) -> tuple[float, dict[str, Any]]:
    """Return which share of the multiply-adds to remove comes from tokens, and how that was found."""
    if not arm.startswith("both"):
        return (0.0 if arm == "weights" else 1.0), {}
    row = known.find(task=bench.name, arm="both", factor=factor, seed=0)
    if row is not None:
        return row["share"], {}
    ranking, held = calibration(bench, 0)
    found = find_shares(bench.dense, ranking, held, goal, loss=bench.loss)
    return best_of(found, goal).share, {"losses": {f"{each.share:g}": each.loss for each in found}}


def calibration(bench: Bench, seed: int) -> tuple[list[Any], list[Any]]:
    """Return the batches that rank, and those that compare shares."""
    batches = list(itertools.islice(bench.batches(1000 + seed), RANKING + HELD_OUT))
    return batches[:RANKING], batches[RANKING:]


def cut(bench: Bench, arm: str, goal: Goal, share: float, seed: int) -> tuple[nn.Module, Any]:
    """Return the model on its budget, and the settings to train it with."""
    model, settings = copy.deepcopy(bench.dense), bench.settings
    if "cross" in arm and isinstance(model, CrossGetClip):
        model, settings = with_cross_tokens(model, bench, goal, share), settings.model_copy(update={"reduce": "ours"})
    else:
        if "cross" in arm:
            add_cross_tokens(model)
            settings = settings.model_copy(update={"cross": 1.0})
        if share:
            merge_share(model, goal, share)
    if upop.count_macs(model, goal.example) > goal.macs:
        ranking = calibration(bench, seed)[0]
        upop.calibrate(model, ranking, target=goal.of_weights, loss=bench.loss, example=goal.example)
    return model, settings


def with_cross_tokens(model: CrossGetClip, bench: Bench, goal: Goal, share: float) -> CrossGetClip:
    """Return a CLIP with cross tokens that removes the fewest image tokens that save a share of the budget."""
    crossed = CrossGetClip(model.config.model_copy(update={"cross": True, "rv": 0, "rl": 0})).eval()
    crossed.load_state_dict(model.state_dict(), strict=False)
    most = goal.dense - share * (goal.dense - goal.macs)
    for removed in range(1, (PIXELS // PATCH) ** 2 // 2 + 1):
        crossed.set_removed(removed, 0)
        if upop.count_macs(crossed, goal.example) <= most:
            return crossed
    raise SettingError(f"Image tokens alone do not bring {bench.name} to {most:,.0f} multiply-adds.")


def measure(bench: Bench, arm: str, factor: float, seed: int, steps: int, known: Cells) -> dict[str, Any]:
    """Return the row of a cell."""
    torch.manual_seed(seed)
    row: dict[str, Any] = {"task": bench.name, "arm": arm, "factor": factor, "seed": seed, "metric": bench.metric}
    example, began = bench.example(), time.process_time()
    goal = goal_of(bench.dense, {"macs": 1 / factor}, example)
    try:
        share, described = share_of(bench, arm, goal, factor, known)
        model, settings = cut(bench, arm, goal, share, seed)
    except SettingError as error:
        return {**row, "refused": str(error)}
    macs = upop.count_macs(model, example)
    if macs > 1.01 * goal.macs:
        return {**row, "refused": f"{macs:,} multiply-adds are left of {goal.dense:,}"}
    row |= {"share": share, **described, "removed": removed_of(model), "macs": macs, "of": goal.dense}
    if not seed:
        row["before"] = round(bench.quality(model)[bench.metric], 2)
    bench.train(model, steps, bench.kind.rate / 2, seed, bench.dense, settings)
    row["quality"] = round(bench.quality(model)[bench.metric], 2)
    row["seconds"] = round(time.process_time() - began, 1)
    if not seed:
        upop.save(model, bench.folder / "models" / f"{bench.name}-{arm.replace(', ', '-')}-{factor:g}x")
    return row


def removed_of(model: nn.Module) -> list[int]:
    """Return how many tokens every layer of the image tower removes."""
    if isinstance(model, CrossGetClip) and model.config.cross:
        return [model.config.rv]
    return (removed_tokens(model) or [[]])[0]


# Latency.


def latency(folder: Path, tasks: Sequence[str], rounds: int) -> dict[str, Any]:
    """Return milliseconds per sample of every saved model, batch 1 and 16: the least of rounds in which all take turns.

    Processor time of one thread is counted, which other programs disturb little.
    """
    found: dict[str, Any] = {}
    for task in tasks:
        bench = Bench(task, folder)
        models = {"dense": bench.dense}
        for path in sorted((folder / "models").glob(f"{task}-*x")):
            models[path.name.removeprefix(f"{task}-").replace("-cross", ", cross").replace("-", "/")] = load(
                path
            ).eval()
        for batch in (1, 16):
            inputs = bench.example(batch)
            taken: dict[str, list[float]] = {name: [] for name in models}
            with torch.inference_mode():
                for _ in range(rounds):
                    for name, model in models.items():
                        began = time.process_time()
                        model(**inputs)
                        taken[name].append(time.process_time() - began)
            least = {name: 1000 * min(times) / batch for name, times in taken.items()}
            found.setdefault(task, {})[str(batch)] = least
            print(f"{task}, batch {batch}: " + ", ".join(f"{name} {value:.2f} ms" for name, value in least.items()))
    return found


# Tables.


def summary(rows: Sequence[dict[str, Any]], times: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a group per task, factor and arm: mean and standard deviation over seeds, and measured speed."""
    groups = []
    for task, factor, arm in itertools.product(KINDS, sorted(FACTORS), ARMS):
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
        group |= {"share": good[0]["share"], "removed": good[0]["removed"]}
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
    spread = max(best["std"] or 0.0, other["std"] or 0.0)
    lead = round(best["mean"] - other["mean"], 2)
    return {"both": best["arm"], "single": other["arm"], "lead": lead, "spread": spread, "ahead": lead > spread}


def at_speed(groups: Sequence[dict[str, Any]], task: str, factor: float, batch: str) -> dict[str, float]:
    """Return what each way reaches at the measured speed of `both` of a factor, between its neighbouring factors.

    Quality is a straight line over the logarithm of the speed between two factors; the dense model is the first point.
    A way that is never as fast has no figure.
    """
    mine = [group for group in groups if group["task"] == task and group.get("faster", {}).get(batch)]
    speed = next((g["faster"][batch] for g in mine if (g["arm"], g.get("factor")) == ("both", factor)), None)
    found: dict[str, float] = {}
    for arm in ARMS if speed else ():
        points = sorted((math.log(g["faster"][batch]), g["mean"]) for g in mine if g["arm"] == arm)
        dense = next((group["mean"] for group in groups if group["task"] == task and group["arm"] == "dense"), None)
        points = ([(0.0, dense)] if dense is not None else []) + points
        for (slow, one), (fast, other) in itertools.pairwise(points):
            if slow <= math.log(speed) <= fast + 1e-9 and fast > slow:
                found[arm] = round(one + (other - one) * (math.log(speed) - slow) / (fast - slow), 2)
    return found


def table(groups: Sequence[dict[str, Any]]) -> str:
    """Return the Markdown of the figures at equal multiply-adds."""
    lines = ["| task | multiply-adds | " + " | ".join(ARMS) + " | both is ahead by |", "| --- | --- |" + " ---: |" * 6]
    for task, factor in itertools.product(KINDS, sorted(FACTORS)):
        column = {g["arm"]: g for g in groups if (g["task"], g.get("factor")) == (task, factor)}
        if not column:
            continue
        figures = []
        for arm in ARMS:
            group = column.get(arm, {})
            spread = f" ± {group['std']:.1f}" if group.get("std") is not None else ""
            figures.append(f"{group['mean']:.1f}{spread}" if "mean" in group else "out of reach" if group else "-")
        lead = ahead(groups, task, factor)
        said = "-" if lead is None else f"{lead['lead']:+.1f}"
        lines.append(f"| {SHOWN.get(task, task)} | 1/{factor:g} | {' | '.join(figures)} | {said} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure what is not measured yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", type=one_of([*KINDS]), default=[*KINDS])
    parser.add_argument("--folder", type=Path, required=True, help="data, dense models and cells")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--recovery", type=int, default=30, help="training steps after a cut")
    parser.add_argument("--latency", action="store_true", help="time the models of the first seed")
    parser.add_argument("--rounds", type=int, default=10, help="of timing")
    parser.add_argument("--table", action="store_true", help="measure no cells")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    score_captions_of_shapes()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    known, benches = Cells(arguments.folder), dict[str, Bench]()
    for task, arm, factor, seed in [] if arguments.table else cells(arguments.tasks, arguments.seeds):
        if known.find(task=task, arm=arm, factor=factor, seed=seed):
            continue
        if task not in benches:
            bench = benches[task] = Bench(task, arguments.folder)
            if not known.find(task=task, arm="dense"):
                known.add({"task": task, "arm": "dense", "quality": round(bench.quality(bench.dense)[bench.metric], 2)})
        known.add(measure(benches[task], arm, factor, seed, arguments.recovery, known))
        print(known.rows[-1], flush=True)
    file = arguments.folder / "latency.json"
    if arguments.latency:
        write_json(file, latency(arguments.folder, arguments.tasks, arguments.rounds))
    times = json.loads(file.read_text()) if file.is_file() else {}
    dense = [{**row, "mean": row["quality"]} for row in known.rows if row["arm"] == "dense"]
    groups = [*dense, *summary(known.rows, times)]
    content = {
        "machine": machine(),
        "pixels": PIXELS,
        "batch": BATCH,
        "recovery": arguments.recovery,
        "groups": groups,
        "ahead": {f"{t}/{f:g}": ahead(groups, t, f) for t, f in itertools.product(KINDS, sorted(FACTORS))},
        "at_speed": {
            f"{t}/{f:g}/{b}": at_speed(groups, t, f, b)
            for t, f, b in itertools.product(KINDS, sorted(FACTORS), ("1", "16"))
        },
        "milliseconds": times,
    }
    write_json(RESULT, content)
    print(table(groups))


if __name__ == "__main__":
    main()
