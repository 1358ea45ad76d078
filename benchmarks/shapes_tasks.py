"""Every task on generated data: a small dense model, then 2x and 4x by the method and by magnitude.

Each task's dense model is trained, compressed by unified progressive pruning and by one cut of the smallest weights
(both get equally many training steps, on the same smaller set), and all models are measured side by side at the end.
The table goes to the terminal and, as JSON with the machine's description, to benchmarks/results/. Finished runs
are not repeated: a stopped benchmark continues with the next one.

    python benchmarks/shapes_tasks.py caption vqa retrieval retrieval-clip
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from dense_tasks import FOLDER, one_of, settings_of
from upop.checkpoints import load
from upop.cli.shapes import score_captions_of_shapes
from upop.report.results import results_table
from upop.runs.run import Metrics, measure
from upop.runs.task import Task
from upop.runs.verbs import compress, compressed_name, train

RESULTS = Path(__file__).parent / "results"
DENSE: dict[str, dict[str, Any]] = {
    "caption": {"init_lr": 1e-3, "max_epoch": 5},
    "classification": {"init_lr": 1e-3, "max_epoch": 5},
    "vqa": {"init_lr": 1e-3, "max_epoch": 2, "pretrained": "assets/shapes-nlvr"},
    "retrieval": {"init_lr": 5e-4, "max_epoch": 2, "pretrained": "assets/shapes-nlvr"},
    "retrieval-clip": {"init_lr": 5e-4, "max_epoch": 3},
    "segmentation": {"init_lr": 1.5e-3, "max_epoch": 3},
}
"""How the dense models are trained: from nothing, or from the towers of the demo's model, which can already look."""
RATIOS = (0.5, 0.75)


def run(name: str, arguments: argparse.Namespace) -> None:
    """Train, compress and measure one task."""
    folder = arguments.folder / name
    common = {"device": "cpu", "resume": "auto"}
    more = {**common, "warmup_steps": 100, **DENSE[name], "output_dir": folder / "dense"}
    _rows(train, *settings_of(name, arguments.folder, arguments.samples, **more))
    # The end of the schedule, not the best epoch of a rising learning curve: the dense model is fully trained.
    dense = folder / "dense" / "last"
    models: dict[str, tuple[torch.nn.Module, Metrics]] = {}
    for method in ("upop", "magnitude"):
        for ratio in RATIOS:
            place = folder / f"{method}-{ratio:g}"
            more = {**common, "pretrained": str(dense), "p": ratio, "method": method, "output_dir": place}
            task, chosen = settings_of(name, arguments.folder, arguments.compress_samples, **more)
            before, after = _rows(compress, task, chosen)
            whole, small = load(dense), load(place / "best")
            models.setdefault("dense", (whole, before["metrics"]))
            models[compressed_name(chosen, whole, small)] = (small, after["metrics"])
    together = measure(task, models, torch.device("cpu"), chosen.latency_batch)
    Console().print(results_table(together))
    together.write_json(arguments.out / f"shapes_{name}_cpu.json")


def _rows(verb: Callable[[Task[Any], Any], Any], task: Task[Any], settings: Any) -> list[dict[str, Any]]:
    """Return the models in a run's results; a run that has ended before is not run again."""
    results: Path = settings.output_dir / "results.json"
    if not results.is_file():
        verb(task, settings)
    rows: list[dict[str, Any]] = json.loads(results.read_text())["models"]
    return rows


def main() -> None:
    """Run the tasks that the command line names."""
    score_captions_of_shapes()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", type=one_of([*DENSE]), default=[*DENSE])
    parser.add_argument("--samples", type=int, default=60_000, help="to train the dense model on")
    parser.add_argument("--compress-samples", type=int, default=20_000, help="to compress it on")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="data and run directories")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    for name in arguments.tasks:
        run(name, arguments)


if __name__ == "__main__":
    main()
