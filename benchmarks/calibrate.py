"""Pruning without training: `upop.calibrate` against single cuts of the same size, on generated data.

Dense models are those of `benchmarks/shapes_tasks.py` (run it first; NLVR's is in assets/). Every row removes the same
share of the prunable parameters, with the same batches of training data, and is evaluated without training. The
defaults of `upop.calibrate` were chosen on the validation splits (--split val); results are of the test splits.

    python benchmarks/calibrate.py nlvr classification segmentation retrieval-clip
"""

from __future__ import annotations

import argparse
import copy
import itertools
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dense_tasks import FOLDER, DenseTask, one_of
from upop import calibrate, count_parameters
from upop.files import write_json
from upop.machine import machine
from upop.pruning import plan_by_magnitude, shrink
from upop.runs.loaders import make_loader, to_device

RESULTS = Path(__file__).parent / "results"
ROWS: dict[str, dict[str, Any] | None] = {
    "magnitude": None,
    "first order, one cut": {"stages": 1, "correct": False, "rotate": False},
    "first order, stages": {"correct": False, "rotate": False},
    "one cut, corrected": {"stages": 1, "rotate": False},
    "calibrate, not rotated": {"rotate": False},
    "calibrate": {},
    "calibrate, no labels": {"labels": False},
}
"""What is compared: the options of `calibrate` that differ from its defaults; None is the cut by weight norm."""


def run(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the metric of a task's dense model and of every method, by ratio."""
    read = DenseTask.read(name, arguments.folder, device=arguments.device)
    task, model = read.task, read.model.eval()
    split = arguments.split if arguments.split in task.splits else "val"  # segmentation has one held-out split
    loader = make_loader(task, read.settings, "train")
    batches = [to_device(batch, read.accelerator.device) for batch in itertools.islice(loader, arguments.batches)]

    found: dict[str, Any] = {"metric": task.metric, "split": split}
    found |= {"dense": read.quality(model, split), "parameters": count_parameters(model)}
    for ratio in arguments.ratios:
        for row, options in ROWS.items():
            small, begun = copy.deepcopy(model), time.perf_counter()
            if options is None:
                shrink(small, plan_by_magnitude(small, ratio))
            else:
                more = {key: value for key, value in options.items() if key != "labels"}
                inputs = batches if options.get("labels", True) else [task.inputs(batch) for batch in batches]
                calibrate(small, inputs, ratio, loss=read.loss if inputs is batches else None, **more)
            seconds = time.perf_counter() - begun
            cell = {
                "quality": read.quality(small, split),
                "seconds": round(seconds, 1),
                "parameters": count_parameters(small),
            }
            found.setdefault(row, {})[f"{ratio:g}"] = cell
            print(f"{name} {ratio:g} {row}: {cell}", flush=True)
    return found


def show(results: dict[str, Any], ratios: list[float]) -> Table:
    """Return the table of all tasks."""
    columns = [f"{name} -{100 * ratio:g} %" for name in results for ratio in ratios]
    table = Table("", *columns, title="Without training", title_justify="left")
    table.add_row("dense", *(f"{found['dense']:.1f}" for found in results.values() for _ in ratios))
    for row in ROWS:
        table.add_row(
            row, *(f"{found[row][f'{ratio:g}']['quality']:.1f}" for found in results.values() for ratio in ratios)
        )
    return table


def main() -> None:
    """Measure the tasks that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ["nlvr", "classification", "segmentation", "retrieval-clip", "retrieval"]
    parser.add_argument("tasks", nargs="*", type=one_of(names), default=names[:2])
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.25, 0.5, 0.75])
    parser.add_argument("--batches", type=int, default=16)
    parser.add_argument("--split", choices=["val", "test"], default="test")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="data and run directories")
    parser.add_argument("--out", type=Path, default=RESULTS / "calibrate_cpu.json")
    arguments = parser.parse_args()
    results: dict[str, Any] = {}
    for name in arguments.tasks:
        results[name] = run(name, arguments)
        content = {"machine": machine(arguments.device), "batches": arguments.batches, "tasks": results}
        write_json(arguments.out, content)  # keep the measurements if a later task fails
    Console(width=200).print(show(results, arguments.ratios))


if __name__ == "__main__":
    main()
