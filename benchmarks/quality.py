"""Quality of compressed models, by method: at equal size, and with equally many training steps.

Small dense models of generated tasks (those of `benchmarks/shapes_tasks.py`; NLVR's is in assets/) are compressed by
UPop's default, the published recipe, and other pruning methods. Sizes are equal in parameters or, in a second
set of tables, in multiply-adds; steps are equal, whatever they are used for. There is one dense model per task; the
seeds decide the order of the training samples and all draws.

    python benchmarks/quality.py --workers 2             # continues where it was stopped; then the tables
    python benchmarks/quality.py --levers --split val    # what was tried instead of the default
    python benchmarks/quality.py --parts --split val     # what is pruned: heads, neurons, branches, the residual width
    python benchmarks/quality.py --table                 # only the tables of existing cells

Every cell is written to FOLDER/quality_cells.jsonl as soon as it is measured, and is not measured again. Choices were
made on validation splits (--split val), results are of the test splits; VQA's test set, which has no answers, is
replaced by the validation split of a set of another seed. Captioning and VQA score the first 500 samples.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from dense_tasks import FOLDER, one_of, prepare
from quality_methods import DEFAULT, LEVERS, METHODS, PARTS, Bench, compress
from quality_tables import aggregate, figure, tables
from quality_torch_pruning import UnsupportedError
from upop import count_macs, count_parameters
from upop.cli.shapes import score_captions_of_shapes
from upop.errors import SettingError
from upop.files import write_json, write_text
from upop.machine import machine
from upop.pruning.json_text import parse_json
from upop.report.figures import save_figure

RESULTS = Path(__file__).parent / "results"
TASKS = ("classification", "vqa", "nlvr", "caption", "retrieval-clip")
RATIOS = {"4x": 0.75, "2x": 0.5, "3x": 2 / 3, "10x": 0.9}
"""The share of the prunable cost (of all parameters, if the cost is "model") that goes, in measuring order."""
SETS = {"methods": METHODS, "levers": LEVERS, "parts": PARTS}
_DEFAULT_COSTS = {"methods": ["params", "macs"], "levers": ["params"], "parts": ["params", "model"]}
GENERATING = ("caption", "vqa")
"""Tasks whose evaluation takes long; on these --test-samples holds."""
ONE_MODALITY = ("classification",)
_EVALUATION = 60
"""What an evaluation and the reading of data take, in training steps; for estimates of the time left."""


@dataclass(frozen=True)
class Cell:
    """One compression to be measured.

    Attributes:
        task: name.
        method: name in METHODS or LEVERS, or "dense".
        reduction: name in RATIOS; "1x" of the dense model.
        budget: training steps in all.
        cost: what is equal: "params" or "macs"; "model" counts all parameters of the model.
        seed: of order and draws.
        split: "val" or "test".
        batch: samples per step.
        pool: training samples to draw from.
        scored: most samples of the split that are scored; None is all.
    """

    task: str
    method: str
    reduction: str
    budget: int
    cost: str
    seed: int
    split: str
    batch: int
    pool: int
    scored: int | None


def cells_of(arguments: argparse.Namespace) -> list[Cell]:
    """Return the cells that the command line asks for, the most informative first."""
    middle = arguments.middle
    methods = SETS[arguments.what]
    names = arguments.methods or [*methods]
    levers = arguments.what == "levers"
    budgets = [middle] if levers else sorted(arguments.steps, key=lambda steps: (steps != middle, -steps))
    reductions = arguments.reductions or (["4x"] if levers else [*RATIOS])

    def cell(task: str, method: str, reduction: str, budget: int, cost: str, seed: int) -> Cell:
        scored = arguments.test_samples if task in GENERATING else None
        given = (arguments.split, arguments.batch, arguments.pool, scored)
        return Cell(task, method, reduction, budget, cost, seed, *given)

    cells = [cell(task, "dense", "1x", 0, "params", 0) for task in arguments.tasks]
    for seed, reduction, cost in itertools.product(range(arguments.seeds), reductions, arguments.costs):
        for budget, task, name in itertools.product([middle] if cost == "macs" else budgets, arguments.tasks, names):
            needless = methods[name].per_modality and task in ONE_MODALITY
            # A method with a cost of its own belongs into one table, at its true size.
            if not needless and (methods[name].cost is None or cost == "params"):
                cells.append(cell(task, name, reduction, budget, cost, seed))
    return cells


class Store:
    """Rows of measured cells in a file of JSON lines."""

    def __init__(self, path: Path) -> None:
        self.path = path
        text = path.read_text() if path.is_file() else ""
        # A line that was cut off when the machine stopped is measured again.
        whole = text[: text.rfind("\n") + 1]
        try:
            self.rows: list[dict[str, Any]] = [parse_json(line) for line in whole.splitlines()]
            self.missing([])
        except (ValueError, KeyError, TypeError) as error:
            raise SettingError(f"{path} holds no measured cells ({error!r}). Name another --folder.") from error
        if text and not whole:
            raise SettingError(f"{path} holds no measured cells. Name another --folder.")
        if whole != text:
            write_text(path, whole, replace=True)

    def missing(self, cells: Sequence[Cell]) -> list[Cell]:
        """Return the cells that have no row."""
        known = {Cell(**{name: row[name] for name in Cell.__dataclass_fields__}) for row in self.rows}
        return [cell for cell in cells if cell not in known]

    def add(self, row: dict[str, Any]) -> None:
        """Append a row."""
        self.rows.append(row)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")


_benches: dict[tuple[Any, ...], Bench] = {}


def measure(cell: Cell, folder: Path, device: str) -> dict[str, Any]:
    """Return the row of a cell; a task's data is read once by every process."""
    key = cell.task, cell.pool, cell.batch, cell.scored, folder, device
    if key not in _benches:
        options = {"folder": folder, "most": cell.scored, "device": device}
        _benches[key] = Bench.read(cell.task, cell.pool, cell.batch, **options)
    bench = _benches[key]
    dense = bench.dense
    row: dict[str, Any] = {**asdict(cell), "metric": dense.task.metric}
    model = dense.model
    if cell.method != "dense":
        method = next(found[cell.method] for found in SETS.values() if cell.method in found)
        try:
            made = compress(bench, method, RATIOS[cell.reduction], cell.budget, cell.seed, cell.cost)  # type: ignore[arg-type]
        except UnsupportedError as error:
            return {**row, "unsupported": str(error)}
        model = made.model
        row |= {"before_cut": made.first, "seconds": round(made.seconds, 2), "rates": made.rates}
    return {
        **row,
        "quality": round(dense.quality(model, cell.split), 4),
        "parameters": count_parameters(model),
        "macs": count_macs(model, dense.task.example(model, 1)),
    }


def measured(cells: Sequence[Cell], arguments: argparse.Namespace) -> Iterator[tuple[Cell, dict[str, Any] | Exception]]:
    """Measure cells, in this process or in several of one thread each, and yield each as it is done."""
    options = arguments.folder, arguments.device
    if arguments.workers == 1:
        for cell in cells:
            try:
                yield cell, measure(cell, *options)
            except Exception as error:  # the other cells are still worth measuring
                yield cell, error
        return
    pool = ProcessPoolExecutor(arguments.workers, multiprocessing.get_context("spawn"), torch.set_num_threads, (1,))
    try:
        waiting = {pool.submit(measure, cell, *options): cell for cell in cells}
        for future in as_completed(waiting):
            failed = future.exception()
            yield waiting[future], failed if isinstance(failed, Exception) else future.result()
    finally:  # Ctrl-C leaves after the cells that are under way
        pool.shutdown(cancel_futures=True)


def run(arguments: argparse.Namespace, store: Store) -> int:
    """Measure what is missing; return how many cells failed."""
    for name in arguments.tasks:
        prepare(name, arguments.folder)
    todo = store.missing(cells_of(arguments))
    total, done, begun, failed = sum(map(_work, todo)), 0, time.monotonic(), 0
    for number, (cell, row) in enumerate(measured(todo, arguments), 1):
        done += _work(cell)
        left = (total - done) * (time.monotonic() - begun) / done
        name = f"{cell.task} {cell.reduction} {cell.budget} steps, {cell.method}, seed {cell.seed}, {cell.cost}"
        if isinstance(row, Exception):
            failed += 1
            said = f"failed: {type(row).__name__}: {row}"
        else:
            store.add(row)
            said = row.get("unsupported") or f"{row['quality']:.2f}"
        print(f"[{number}/{len(todo)}, {left / 60:.0f} min left] {name}: {said}", flush=True)
    return failed


def _work(cell: Cell) -> int:
    return cell.budget + _EVALUATION


def _relevant(rows: Iterable[dict[str, Any]], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the rows that belong into the tables: all of this split and setup, whatever part was asked for now."""
    names = {"dense", *SETS[arguments.what]}
    setup = arguments.split, arguments.batch, arguments.pool
    return [
        row
        for row in rows
        if row["method"] in names
        and row["cost"] in ("params", *_DEFAULT_COSTS[arguments.what])
        and (row["split"], row["batch"], row["pool"]) == setup
        and row["scored"] in (None, arguments.test_samples)
    ]


def main(given: Sequence[str] | None = None) -> None:
    """Measure, and show the tables."""
    score_captions_of_shapes()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", type=one_of(TASKS), default=[*TASKS], help=f"of {', '.join(TASKS)}")
    names = "; ".join(f"{'' if what == 'methods' else f'with --{what} '}of {', '.join(SETS[what])}" for what in SETS)
    parser.add_argument("--methods", nargs="+", metavar="METHOD", help=names.replace("%", "%%"))
    other = parser.add_mutually_exclusive_group()
    other.add_argument(
        "--levers", dest="what", action="store_const", const="levers", default="methods", help="variants of the default"
    )
    other.add_argument("--parts", dest="what", action="store_const", const="parts", help="what may go")
    parser.add_argument("--reductions", nargs="+", choices=[*RATIOS], help="default: all; 4x of levers")
    parser.add_argument("--costs", nargs="+", choices=["params", "macs", "model"], help="what is equal")
    parser.add_argument("--steps", type=int, nargs="+", default=[30, 100, 300], help="the budgets")
    parser.add_argument(
        "--middle", type=int, help="the budget of levers, GMACs and the figure; default: the middle one of --steps"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--split", choices=["val", "test"], default="test")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--pool", type=int, default=10_000, help="training samples that are read and kept")
    parser.add_argument("--test-samples", type=int, default=500, help="of captioning and VQA")
    parser.add_argument("--workers", type=int, default=1, help="processes, of one thread each")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--table", action="store_true", help="measure nothing, show what is there")
    parser.add_argument("--figure", type=Path, help="a PNG of quality against size at the middle budget")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="data, dense models and the store of cells")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of quality[_levers|_parts][_val]_cpu.json")
    arguments = parser.parse_args(given)
    arguments.middle = arguments.middle or sorted(arguments.steps)[len(arguments.steps) // 2]
    arguments.costs = arguments.costs or _DEFAULT_COSTS[arguments.what]
    unknown = [name for name in arguments.methods or () if name not in SETS[arguments.what]]
    if unknown:
        parser.error(f"--methods does not take {unknown[0]!r} of these sets: {names}")
    torch.set_num_threads(1)
    store = Store(arguments.folder / "quality_cells.jsonl")
    failed = 0 if arguments.table else run(arguments, store)
    methods = [*SETS[arguments.what]]
    groups = aggregate(_relevant(store.rows, arguments))
    order = ["dense", *methods]
    groups.sort(
        key=lambda g: (g["cost"], g["budget"], g["reduction"], TASKS.index(g["task"]), order.index(g["method"]))
    )
    place = "cpu" if arguments.device == "cpu" else "gpu"
    parts = [
        "quality",
        *([] if arguments.what == "methods" else [arguments.what]),
        *(["val"] if arguments.split == "val" else []),
        place,
    ]
    content = {
        "machine": machine(arguments.device),
        "split": arguments.split,
        "batch": arguments.batch,
        "pool": arguments.pool,
        "test_records": dict.fromkeys(GENERATING, arguments.test_samples),
        "groups": groups,
    }
    write_json(arguments.out / f"{'_'.join(filter(None, parts))}.json", content)
    console = Console(width=190)
    for table in tables(groups, methods, DEFAULT):
        console.print(table)
    if arguments.figure:
        # One of another size in every point only fills the image.
        drawn = [name for name in methods if SETS[arguments.what][name].cost is None]
        save_figure(figure(groups, drawn, arguments.middle), arguments.figure)
    if failed:
        raise SystemExit(f"{failed} cells failed; the same command tries them again.")


if __name__ == "__main__":
    main()
