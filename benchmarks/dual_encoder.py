"""A dual encoder of transformers on generated images, pruned by several methods, without and with recovery.

The dense model is trained by configs/shapes/dual_encoder.yaml from a folder without weights. Every cell is written as
soon as it is measured, and is not measured again; benchmarks/recovered.py describes the comparison.

    python benchmarks/dual_encoder.py --dense output/shapes-dual-encoder/best --data output/shapes/retrieval
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from dense_tasks import DenseTask
from quality_methods import Bench
from recovered import FULL, SEARCHED, Cell, Subject, cells, options, remembering, run
from upop.pruning.groups import Group
from upop.runs.devices import make_accelerator, to_device
from upop.runs.evaluation import evaluate
from upop.runs.loaders import SeededDataset, make_loader
from upop.settings import read_settings
from upop.tasks import find_task

_ROOT = Path(__file__).parents[1]
_STACKS = ("vision_model.encoder.layers", "text_model.encoder.layers")
_CALIBRATION = 16
"""Batches that a cut is chosen by."""
_TEACHERS = [*SEARCHED][2:]


def wanted(seeds: int) -> Iterator[Cell]:
    """Yield the cells of all methods, and those of other teachers at one size."""
    yield from cells(False, seeds)
    for seed in range(seeds):
        for method in _TEACHERS:
            yield {"method": method, "reduction": "4x", "recovery": FULL, "seed": seed}


def score(bench: Bench, gallery: Any, model: nn.Module) -> dict[str, float]:
    """Return the recalls among held-out images and their captions, in percent."""
    dense = bench.dense
    loader = DataLoader(
        SeededDataset(gallery, 0),
        batch_size=dense.settings.batch_size_test,
        collate_fn=dense.task.collate(dense.settings),
    )
    return evaluate(dense.accelerator, dense.task, dense.settings, model, dense.accelerator.prepare(loader))[0]


def read(arguments: argparse.Namespace) -> Subject:
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
    collate = loader.collate_fn
    bench = Bench(held, samples, remembering(lambda chosen: to_device(collate(chosen), accelerator.device)))
    whole: Any = task.dataset(settings, "test")
    gallery = whole.without(set(range(arguments.gallery, len(whole))))
    return Subject(
        bench,
        lambda small: score(bench, gallery, small),
        _counted,
        _STACKS,
        calibration=_CALIBRATION,
        lora_rate=arguments.lora_rate,
        towers=False,
    )


def _counted(batch: Mapping[str, Tensor], group: Group) -> Tensor | None:
    return batch["attention_mask"].flatten().bool() if group.modality == "text" else None


def main() -> None:
    """Measure what is missing, and write all of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dense", type=Path, required=True, help="folder of the dense model")
    parser.add_argument("--data", type=Path, required=True, help="what `upop data shapes --task retrieval` wrote")
    results = Path(__file__).parent / "results" / "dual_encoder_cpu.json"
    options(parser, Path("output/benchmarks/dual_encoder.jsonl"), results)
    parser.add_argument("--pool", type=int, default=4000, help="training samples to draw from")
    parser.add_argument("--gallery", type=int, default=500, help="held-out images that recall is of")
    parser.set_defaults(rate=5e-4, lora_rate=2e-3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    about = {"pool": arguments.pool, "gallery": arguments.gallery, "calibration": _CALIBRATION}
    run(lambda: read(arguments), [*wanted(arguments.seeds)], arguments, **about)


if __name__ == "__main__":
    main()
