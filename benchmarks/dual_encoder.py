"""A dual encoder of transformers on generated images: one-shot and with recovery, by several methods.

The dense model is trained by configs/shapes/dual_encoder.yaml from a folder without weights. Every cell of the table
is a row of a file, and cells that are there are not measured again: a benchmark that was stopped goes on.

    python benchmarks/dual_encoder.py --dense output/shapes-dual-encoder/best --data output/shapes/retrieval
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

import upop
from dense_tasks import DenseTask
from quality_methods import METHODS, Bench, Method, compress
from upop.files import write_json
from upop.machine import machine
from upop.pruning import count_macs, count_parameters, plan_by_magnitude
from upop.reading import read_lines
from upop.runs.devices import make_accelerator, to_device
from upop.runs.evaluation import evaluate
from upop.runs.loaders import SeededDataset, make_loader
from upop.settings import read_settings
from upop.tasks import find_task

_ROOT = Path(__file__).parents[1]
REDUCTIONS = {"1.25x": 0.2, "1.5x": 1 / 3, "2x": 0.5, "4x": 0.75}
"""Times fewer prunable parameters -> the share of them that goes."""
RECOVERY: dict[str, Method] = {
    "upop": METHODS["upop"],
    "L2": METHODS["L2"],
    "Taylor": METHODS["Taylor"],
    "upop, teacher of similarity": Method(teacher={"features": 0.0, "logits": 1.0}),
    "upop, teacher of both": Method(teacher={"logits": 1.0}),
    "upop, no teacher": METHODS["no teacher"],
}
_BATCHES = 16  # that a cut without training looks at


def _one_shot(name: str, bench: Bench, ratio: float, seed: int) -> nn.Module:
    """Return a copy of the dense model that was cut without training."""
    torch.manual_seed(seed)
    model, loss = copy.deepcopy(bench.dense.model), bench.dense.loss
    batches = list(itertools.islice(bench.batches(seed), _BATCHES))
    if name == "L2":
        upop.shrink(model, plan_by_magnitude(model, ratio, example=bench.dense.example()))
    elif name == "Taylor":
        upop.calibrate(model, batches, ratio, loss=loss, stages=1, correct=False, example=bench.dense.example())
    else:
        upop.calibrate(model, batches, ratio, loss=loss, example=bench.dense.example())
    return model


ONE_SHOT: dict[str, Callable[[Bench, float, int], nn.Module]] = {
    name: lambda bench, ratio, seed, name=name: _one_shot(name, bench, ratio, seed)  # type: ignore[misc]
    for name in ("upop", "L2", "Taylor")
}


def cells(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield what is to be measured, what says most first."""
    yield {"method": "dense", "reduction": "1x", "steps": 0, "seed": 0}
    for seed in range(arguments.seeds):
        for reductions in (("4x", "2x"), ("1.5x", "1.25x")):
            for steps, reduction, method in itertools.product((0, arguments.steps), reductions, ONE_SHOT):
                yield {"method": method, "reduction": reduction, "steps": steps, "seed": seed}
            if reductions[0] == "4x":
                for method in [*RECOVERY][3:]:
                    yield {"method": method, "reduction": "4x", "steps": arguments.steps, "seed": seed}


def measure(cell: dict[str, Any], bench: Bench, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the row of a cell."""
    dense, ratio = bench.dense, REDUCTIONS.get(cell["reduction"], 0.0)
    begun = time.process_time()
    if cell["method"] == "dense":
        model = dense.model
    elif cell["steps"] == 0:
        model = ONE_SHOT[cell["method"]](bench, ratio, cell["seed"])
    else:
        model = compress(bench, RECOVERY[cell["method"]], ratio, cell["steps"], cell["seed"], "params").model
    seconds = time.process_time() - begun
    whole: Any = dense.task.dataset(dense.settings, "test")
    gallery = whole.without(set(range(arguments.gallery, len(whole))))
    loader = dense.accelerator.prepare(
        DataLoader(
            SeededDataset(gallery, 0),
            batch_size=dense.settings.batch_size_test,
            collate_fn=dense.task.collate(dense.settings),
        )
    )
    scores = evaluate(dense.accelerator, dense.task, dense.settings, model, loader)[0]
    return {
        **cell,
        "parameters": count_parameters(model),
        "macs": count_macs(model, dense.example()),
        "seconds": round(seconds, 1),
        **{name: round(score, 2) for name, score in scores.items()},
    }


def read(arguments: argparse.Namespace) -> Bench:
    """Return the dense model with batches of training samples, which are processed once."""
    places = {
        split: str(arguments.data / "annotation" / f"coco_karpathy_{split}.json") for split in ("train", "val", "test")
    }
    given = {
        "data": places["train"],
        "val_data": places["val"],
        "test_data": places["test"],
        "image_root": arguments.data / "images" / "coco",
        "pretrained": str(arguments.dense),
        "device": "cpu",
        "num_workers": 0,
        "init_lr": arguments.rate,
    }
    task = find_task("dual-encoder")
    settings = read_settings(task.settings, _ROOT / "configs" / "shapes" / "dual_encoder.yaml", given)
    accelerator = make_accelerator(settings)
    model = task.load(Path(str(settings.pretrained)), settings).train()
    loader = make_loader(task, settings, "train")
    dataset: Any = loader.dataset
    numbers = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))
    samples = [dataset[number] for number in numbers[: arguments.pool].tolist()]
    assert loader.collate_fn is not None
    held = DenseTask(task, settings, accelerator, model, arguments.dense)
    return Bench(held, samples, lambda chosen: to_device(loader.collate_fn(chosen), accelerator.device))


def main() -> None:
    """Measure what is missing, and write all of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dense", type=Path, required=True, help="folder of the dense model")
    parser.add_argument("--data", type=Path, required=True, help="what `upop data shapes --task retrieval` wrote")
    parser.add_argument("--rows", type=Path, default=Path("output/benchmarks/dual_encoder.jsonl"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "dual_encoder_cpu.json")
    parser.add_argument("--steps", type=int, default=150, help="of recovery, those of the search included")
    parser.add_argument("--rate", type=float, default=5e-4, help="highest learning rate of recovery")
    parser.add_argument("--pool", type=int, default=8000, help="training samples to draw from")
    parser.add_argument("--gallery", type=int, default=500, help="held-out images that recall is of")
    parser.add_argument("--seeds", type=int, default=1)
    arguments = parser.parse_args()
    rows: list[Any] = list(read_lines(arguments.rows)) if arguments.rows.is_file() else []
    names = ("method", "reduction", "steps", "seed")
    known = {tuple(row[name] for name in names) for row in rows}
    bench: Bench | None = None
    arguments.rows.parent.mkdir(parents=True, exist_ok=True)
    for cell in cells(arguments):
        if tuple(cell[name] for name in names) in known:
            continue
        bench = bench or read(arguments)
        row = measure(cell, bench, arguments)
        rows.append(row)
        with arguments.rows.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)
    write_json(
        arguments.out,
        {
            "machine": machine(torch.device("cpu")),
            "rate": arguments.rate,
            "gallery": arguments.gallery,
            "rows": rows,
        },
    )


if __name__ == "__main__":
    main()
