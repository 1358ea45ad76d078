"""How well a profile predicts latency: predicted and measured milliseconds of cut models.

Every model is profiled (`upop.profiling`), cut at random to a share of its channels that varies by layer, and
timed in turn with the dense model; the fastest pass of each counts. An error is
|predicted - measured| / measured. Time is that of the processor, with one thread, which other programs disturb little
(`--clock wall` for an idle machine); the results record the load. Existing rows are kept.

    taskset -c 1 python benchmarks/latency_predicted.py --models deit-s --batches 1 16 --runtimes eager onnxruntime
    taskset -c 1 python benchmarks/latency_predicted.py --models deit-s --batches 1 --runtimes eager --target 0.25

With --target, cuts are those that `upop.calibrate` plans for this share of the latency, with depth and without;
"realised" is the speed-up that is measured over the one that was planned.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import os
import random
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import upop
from latency import MODELS
from upop.defaults import RUNTIMES
from upop.errors import SettingError
from upop.files import write_json
from upop.machine import machine
from upop.profiling import in_runtime, profile_model
from upop.pruning.known import know_as
from upop.pruning.latency import Latency
from upop.report.latency import Clock, measure_latency

RESULTS = Path(__file__).parent / "results"
SHARES = (0.5, 0.25)
"""Of the channels that a layer keeps on average: 2x and 4x."""


def plan_of(model: nn.Module, share: float, inputs: Any, seed: int) -> dict[str, range]:
    """Return what each group keeps: around a share of its channels, from half of it to half more."""
    draw = random.Random(seed)
    sizes = {group.name: group.size for group in upop.find_groups(model, inputs)}
    kept = {name: min(size, max(1, round(size * draw.uniform(0.5, 1.5) * share))) for name, size in sizes.items()}
    return {name: range(count) for name, count in kept.items()}


CLOCKS = {"processor": time.process_time, "wall": time.perf_counter}


def measure(name: str, batch: int, runtime: str, points: int, repeats: int, clock: Clock) -> dict[str, Any]:
    """Return predicted and measured milliseconds of a model's cuts."""
    torch.manual_seed(0)
    model, make = MODELS[name]()
    inputs = make(batch)
    profile = profile_model(model.eval(), inputs, runtime=runtime, points=points, repeats=repeats, clock=clock)
    latency = Latency(profile, upop.find_groups(model, inputs))
    rows = []
    for share in SHARES:
        plan = plan_of(model, share, inputs, seed=1)
        cut = copy.deepcopy(model)
        know_as(cut, model)
        upop.shrink(cut, plan, verify=False)
        both = {"dense": in_runtime(inputs, runtime, model), "cut": in_runtime(inputs, runtime, cut)}
        took = measure_latency(both, inputs, repeats=2 * repeats, warmup=min(3, repeats), clock=clock, summary=min)
        predicted = latency.at({group: len(kept) for group, kept in plan.items()})
        measured = took["cut"] * profile.dense / took["dense"]  # the dense model has drifted as much
        rows.append(
            {"kept": share, "predicted_ms": predicted, "measured_ms": measured, "error": abs(predicted / measured - 1)}
        )
    return {"model": name, "batch": batch, "runtime": runtime, "dense_ms": profile.dense, "cuts": rows}


def realise(
    name: str, batch: int, runtime: str, share: float, points: int, repeats: int, clock: Clock
) -> dict[str, Any]:
    """Return the realised share of the speed-up that plans for a latency target predict."""
    torch.manual_seed(0)
    model, make = MODELS[name]()
    inputs = make(batch)
    profile = profile_model(model.eval(), inputs, runtime=runtime, points=points, repeats=repeats, clock=clock)
    groups = upop.find_groups(model, inputs)
    rows: list[dict[str, Any]] = []
    for depth in (False, True):
        cut = copy.deepcopy(model)
        know_as(cut, model)
        plan: dict[str, Any] = {"target": {"latency": share}, "profile": profile, "depth": depth, "example": inputs}
        try:
            found = upop.calibrate(cut, [make(2)], loss=_loss, stages=1, correct=False, verify=False, **plan)
        except SettingError as error:
            rows.append({"depth": depth, "refused": str(error)})
            continue
        both = {"dense": in_runtime(inputs, runtime, model), "cut": in_runtime(inputs, runtime, cut.eval())}
        took = measure_latency(both, inputs, repeats=2 * repeats, warmup=min(3, repeats), clock=clock, summary=min)
        predicted = profile.dense / Latency(profile, groups).at({each: len(kept) for each, kept in found.items()})
        measured = took["dense"] / took["cut"]
        rows.append({"depth": depth, "predicted": predicted, "measured": measured, "realised": measured / predicted})
    return {
        "model": name,
        "batch": batch,
        "runtime": runtime,
        "target": share,
        "dense_ms": profile.dense,
        "plans": rows,
    }


def _loss(model: nn.Module, inputs: Any) -> Tensor:
    made = model(**inputs)
    outputs = getattr(made, "logits", made)
    return torch.stack(
        [each.float().square().mean() for each in (outputs if isinstance(outputs, tuple) else (outputs,))]
    ).sum()


def main() -> None:
    """Measure, and write what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--runtimes", nargs="+", choices=RUNTIMES, default=["eager", "onnxruntime"])
    parser.add_argument("--points", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path, default=RESULTS / "latency_predicted_cpu.json")
    parser.add_argument("--target", type=float, help="measure plans for this share of the latency, not random cuts")
    parser.add_argument("--clock", choices=CLOCKS, default="processor")
    given = parser.parse_args()
    torch.set_num_threads(1)
    held = json.loads(given.out.read_text())["rows"] if given.out.is_file() else []
    done = {(row["model"], row["batch"], row["runtime"], row.get("target")): row for row in held}
    for case in itertools.product(given.models, given.batches, given.runtimes, [given.target]):
        if case in done:
            continue
        before = os.getloadavg()[0]
        how = (given.points, given.repeats, CLOCKS[given.clock])
        row = measure(*case[:3], *how) if given.target is None else realise(*case, *how)
        done[case] = {**row, "clock": given.clock, "load": [before, os.getloadavg()[0]]}
        errors = [cut["error"] for each in done.values() for cut in each.get("cuts", ())]
        found = {"machine": machine(torch.device("cpu")), "median_error": statistics.median(errors)}
        write_json(given.out, found | {"rows": list(done.values())})
        print(done[case], flush=True)


if __name__ == "__main__":
    main()
