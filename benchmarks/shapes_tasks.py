"""Every task on generated data: a small dense model from nothing, then 2x and 4x by the method and by magnitude.

Each task's dense model is trained, compressed by unified progressive pruning and by one cut of the smallest weights
(both get equally many training steps), and all models are measured side by side at the end. The table goes to the
terminal and, as JSON with the machine's description, to benchmarks/results/.

    python benchmarks/shapes_tasks.py caption vqa retrieval retrieval-clip
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from upop.checkpoints import load
from upop.cli.shapes import write_with_progress
from upop.report.results import results_table
from upop.settings import read_settings
from upop.tasks import TASKS, find_task
from upop.tasks.verbs import Metrics, compress, compressed_name, measure, train

RESULTS = Path(__file__).parent / "results"
DATA = {"retrieval-clip": "retrieval"}
"""The generated set of a task, where it is not called like the task."""
DENSE = {"init_lr": 1e-3, "warmup_steps": 100, "pretrained": None}
RATIOS = (0.5, 0.75)


def run(name: str, folder: Path, records: int, epochs: int, out: Path) -> None:
    """Train, compress and measure one task."""
    task = find_task(name)
    kind = DATA.get(name, name)
    config = Path("configs/shapes") / f"{name.replace('-', '_')}.yaml"
    data = write_with_progress(kind, folder / "data" / kind, seed=0, size=records)
    given: dict[str, Any] = {**data.settings, "device": "cpu"}

    def settings(**more: Any) -> Any:
        return read_settings(task.settings, config, given | more)

    dense = folder / name / "dense"
    models: dict[str, tuple[torch.nn.Module, Metrics]] = {}
    chosen = settings(**DENSE, max_epoch=epochs, output_dir=dense)
    measured = train(task, chosen)
    assert measured is not None
    models["dense"] = (load(dense / "best"), _metrics(measured.models[0].metrics))
    for method in ("upop", "magnitude"):
        for ratio in RATIOS:
            place = folder / name / f"{method}-{ratio:g}"
            chosen = settings(pretrained=str(dense / "best"), p=ratio, method=method, output_dir=place)
            found = compress(task, chosen)
            assert found is not None
            models[compressed_name(chosen)] = (load(place / "best"), _metrics(found.models[-1].metrics))
    together = measure(task, models, torch.device("cpu"), chosen.latency_batch)
    Console().print(results_table(together))
    together.write_json(out / f"shapes_{name}_cpu.json")


def _metrics(found: Any) -> Metrics:
    return {split: dict(values) for split, values in found.items()}


def main() -> None:
    """Run the tasks that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", choices=list(TASKS), default=[name for name in TASKS if name != "nlvr"])
    parser.add_argument("--records", type=int, default=60_000, help="training records of the generated data")
    parser.add_argument("--epochs", type=int, default=6, help="of training the dense model")
    parser.add_argument("--folder", type=Path, default=Path("output/benchmarks"), help="data and run folders")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    for name in arguments.tasks:
        run(name, arguments.folder, arguments.records, arguments.epochs, arguments.out)


if __name__ == "__main__":
    main()
