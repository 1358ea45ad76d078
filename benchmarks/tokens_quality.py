"""Quality of small models with fewer weights, fewer tokens, and both under one budget of multiply-adds.

Five generated tasks at 112 pixels (benchmarks/tokens_tasks.py), cut to a half, a third and a quarter of their
multiply-adds, then trained for equally many steps, with the dense model as teacher:

- weights: `upop.calibrate`;
- tokens: `upop.merge_tokens` as far as possible, and weights only where that is not enough; "tokens, cross" has
  CrossGET's cross tokens, which guide the merging and learn by the cross loss (BLIP: every layer of the image tower and
  of the text layers with cross-attention; CLIP: as published);
- both: `upop.calibrate_with_tokens`, which splits the budget by the loss on held-out batches; "both, cross" has the
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
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import upop
from dense_tasks import one_of
from tokens_tables import ARMS, FACTORS, ahead, at_speed, summary, table
from tokens_tasks import BATCH, KINDS, PATCH, PIXELS, Bench
from upop.checkpoints import load
from upop.cli.shapes import score_captions_of_shapes
from upop.errors import SettingError
from upop.files import write_json
from upop.machine import machine
from upop.models.blip_cross import add_cross_tokens
from upop.models.crossget import CrossGetClip
from upop.pruning.carried import plan_of
from upop.tokens.budget import Goal, best_of, find_shares, goal_of, merge_share
from upop.tokens.encoders import removed_tokens

RESULT = Path(__file__).parent / "results" / "tokens_quality_cpu.json"
RANKING, HELD_OUT = 4, 6
"""Batches that rank, and that compare shares."""


def cells(tasks: Sequence[str], seeds: int, factors: Sequence[float]) -> Iterator[tuple[str, str, float, int]]:
    """Yield task, arm, factor and seed of the cells to measure, the most informative first."""
    plain = [arm for arm in ARMS if "cross" not in arm]
    crossed = [arm for arm in ARMS if "cross" in arm]
    for seed, arms in itertools.product(range(seeds), (plain, crossed)):
        for factor, task, arm in itertools.product(factors, tasks, arms):
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
    row["cut"] = plan_of(model) is not None
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


def main() -> None:
    """Measure what is not measured yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", type=one_of([*KINDS]), default=[*KINDS])
    parser.add_argument("--folder", type=Path, required=True, help="data, dense models and cells")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--factors", type=float, nargs="+", default=FACTORS, choices=FACTORS)
    parser.add_argument("--recovery", type=int, default=30, help="training steps after a cut")
    parser.add_argument("--latency", action="store_true", help="time the models of the first seed")
    parser.add_argument("--rounds", type=int, default=10, help="of timing")
    parser.add_argument("--table", action="store_true", help="measure no cells")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    score_captions_of_shapes()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    known, benches = Cells(arguments.folder), dict[str, Bench]()
    for task, arm, factor, seed in (
        [] if arguments.table else cells(arguments.tasks, arguments.seeds, arguments.factors)
    ):
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
