"""How well milliseconds are told from a profile: what is predicted of cut models beside what is then measured.

Every model is profiled (`upop.profiling`), cut at random to a share of its channels, layer by layer another one, and
measured beside the dense one, which takes turns with it. An error is |predicted - measured| / measured. What the
machine was doing beside stands in the results: above a load of about half of the cores they say little.

    python benchmarks/latency_predicted.py --models deit-s --batches 1 16 --runtimes eager onnxruntime
"""

from __future__ import annotations

import argparse
import copy
import os
import random
import statistics
from pathlib import Path
from typing import Any

import torch
from torch import nn

import upop
from latency import MODELS
from upop.files import write_json
from upop.machine import machine
from upop.profiling import RUNTIMES, in_runtime, profile_model
from upop.pruning.known import know_as
from upop.pruning.latency import Latency
from upop.report.latency import measure_latency

RESULTS = Path(__file__).parent / "results"
SHARES = (0.5, 0.25)
"""Of the channels that a layer keeps on average: 2x and 4x."""


def plan_of(model: nn.Module, share: float, inputs: Any, seed: int) -> dict[str, range]:
    """Return what each group keeps: around a share of its channels, from half of it to half more."""
    draw = random.Random(seed)
    sizes = {group.name: group.size for group in upop.find_groups(model, inputs)}
    kept = {name: min(size, max(1, round(size * draw.uniform(0.5, 1.5) * share))) for name, size in sizes.items()}
    return {name: range(count) for name, count in kept.items()}


def measure(name: str, batch: int, runtime: str, points: int, repeats: int) -> dict[str, Any]:
    """Return predicted and measured milliseconds of a model's cuts."""
    torch.manual_seed(0)
    model, make = MODELS[name]()
    inputs = make(batch)
    profile = profile_model(model.eval(), inputs, runtime=runtime, points=points, repeats=repeats)
    latency = Latency(profile, upop.find_groups(model, inputs))
    rows = []
    for share in SHARES:
        plan = plan_of(model, share, inputs, seed=1)
        cut = copy.deepcopy(model)
        know_as(cut, model)
        upop.shrink(cut, plan, verify=False)
        both = {"dense": in_runtime(inputs, runtime, model), "cut": in_runtime(inputs, runtime, cut)}
        took = measure_latency(both, inputs, repeats=2 * repeats)
        predicted = latency.at({group: len(kept) for group, kept in plan.items()})
        measured = took["cut"] * profile.dense / took["dense"]  # the dense model has drifted as much
        rows.append(
            {"kept": share, "predicted_ms": predicted, "measured_ms": measured, "error": abs(predicted / measured - 1)}
        )
    return {"model": name, "batch": batch, "runtime": runtime, "dense_ms": profile.dense, "cuts": rows}


def main() -> None:
    """Measure, and write what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--runtimes", nargs="+", choices=RUNTIMES, default=["eager", "onnxruntime"])
    parser.add_argument("--points", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path, default=RESULTS / "latency_predicted_cpu.json")
    given = parser.parse_args()
    cases = [(name, batch, runtime) for name in given.models for batch in given.batches for runtime in given.runtimes]
    rows, before = [], os.getloadavg()[0]
    for name, batch, runtime in cases:
        rows.append(measure(name, batch, runtime, given.points, given.repeats))
        errors = [cut["error"] for row in rows for cut in row["cuts"]]
        about = {"load": [before, os.getloadavg()[0]], "threads": torch.get_num_threads()}
        found = {"machine": machine(torch.device("cpu")) | about, "median_error": statistics.median(errors)}
        write_json(given.out, found | {"rows": rows})
        print(rows[-1])


if __name__ == "__main__":
    main()
