"""Quality of pruned models, by method: right after the cut, and after recovery of all weights or by LoRA.

The methods are those of benchmarks/real/methods.py and of quality_methods.py. All remove the same share of the
prunable parameters (whole layers: the nearest share) and recover for the same number of steps, on the same
batches, at the same rates. Only "upop, search" prunes within these steps, with the dense model as teacher.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import upop
from quality_methods import METHODS, Bench, Method, compress, retrain
from real.methods import WAYS, Seen, cut, kept_by, without_layers
from upop.files import write_json
from upop.machine import machine
from upop.pruning import count_macs, count_parameters, plan_by_magnitude
from upop.pruning.costs import channel_costs
from upop.pruning.groups import Group
from upop.reading import read_lines
from upop.runs.adapters import Adapters

REDUCTIONS = {"1.25x": 0.2, "1.5x": 1 / 3, "2x": 0.5, "4x": 0.75}
"""Times fewer prunable parameters -> the share of them that goes."""
NONE, FULL, LORA = "none", "full", "LoRA"
_ORDER = (
    ((("2x", "4x"), FULL), (("2x", "4x", "1.5x", "1.25x"), NONE)),
    ((("2x", "4x"), LORA),),
    ((("1.5x", "1.25x"), FULL), (("1.5x", "1.25x"), LORA)),
)
"""In which cells are measured, each part for all seeds before the next, so that those that say most come first."""
RANK = 16
DENSE, OURS, DEPTH, MAGNITUDE = "dense", "upop, one-shot", "depth by similarity", "magnitude"
SEARCHED: dict[str, Method] = {
    "upop, search": METHODS["upop"],
    "upop, search without teacher": METHODS["no teacher"],
    "upop, search, teacher of similarity": Method(teacher={"features": 0.0, "logits": 1.0}),
    "upop, search, teacher of both": Method(teacher={"logits": 1.0}),
}
"""Methods that choose within the steps of recovery."""
OTHERS = ("first-order, one cut", "Wanda, structured", "FLAP", "closed form")
"""Of `WAYS`."""
# Key-value groups are few and large; uniform or standardised scores may remove them from all layers.
_MLPS = ("Wanda, structured, MLPs alone", "FLAP, MLPs alone")
_LANGUAGE = ", language tower"
NAMES = ("method", "reduction", "recovery", "seed")
"""What a cell is known by."""

Cell = dict[str, Any]


def remembering(collate: Callable[[list[Any]], Any]) -> Callable[[list[Any]], Any]:
    """Return a function that makes a batch of the same samples once; the samples must live as long as it."""
    made: dict[tuple[int, ...], Any] = {}

    def remembered(samples: list[Any]) -> Any:
        key = tuple(map(id, samples))
        if key not in made:
            made[key] = collate(samples)
        return made[key]

    return remembered


class NotReachedError(Exception):
    """A method cannot take as much from the part that it cuts."""


@dataclass
class Subject:
    """A dense model, its data and its metrics.

    Attributes:
        bench: model and training batches.
        score: model -> figures on held-out samples.
        counted: as of `Seen.of`.
        stacks: names of lists of layers.
        calibration: batches that a cut is chosen by.
        lora_rate: highest learning rate of LoRA; that of all weights is the bench's own.
        towers: whether methods are also confined to the language tower.
    """

    bench: Bench
    score: Callable[[nn.Module], dict[str, float]]
    counted: Callable[[Any, Group], Tensor | None]
    stacks: Sequence[str]
    calibration: int
    lora_rate: float
    towers: bool
    _seen: dict[int, Seen] = field(default_factory=dict)

    @cached_property
    def groups(self) -> list[Group]:
        """Of the dense model."""
        return list(upop.find_groups(self.bench.dense.model))

    @cached_property
    def costs(self) -> dict[str, float]:
        """Parameters of a channel, by group."""
        return dict(channel_costs(self.bench.dense.model, self.groups, "params", None))

    def prunable(self, groups: Sequence[Group]) -> float:
        """Parameters of all channels of some groups."""
        return float(sum(self.costs[group.name] * group.size for group in groups))

    def batches(self, seed: int) -> list[Any]:
        """What a cut is chosen by."""
        return list(itertools.islice(self.bench.batches(seed), self.calibration))

    def seen(self, seed: int) -> Seen:
        """Statistics of the dense model on these batches."""
        if seed not in self._seen:
            model = copy.deepcopy(self.bench.dense.model).eval()
            stacks: list[Any] = [model.get_submodule(stack) for stack in self.stacks]
            layers = [layer for stack in stacks for layer in stack]
            loss = self.bench.dense.loss
            self._seen[seed] = Seen.of(model, self.groups, self.batches(seed), loss, self.counted, layers)
        return self._seen[seed]

    def cut(self, method: str, ratio: float, seed: int) -> nn.Module:
        """Return a copy of the dense model that was cut without training.

        Args:
            method: one of `methods`.
            ratio: share of the prunable parameters of the whole model that goes.
            seed: of the samples that are looked at.

        Raises:
            NotReachedError: the language tower alone has too few parameters.
        """
        torch.manual_seed(seed)
        dense = self.bench.dense.model
        way, groups = method.removesuffix(_LANGUAGE), self.groups
        if way != method:
            alone = way in WAYS and WAYS[way].mlp_alone
            groups = [each for each in groups if each.modality == "text" and (each.kind == "mlp" or not alone)]
            ratio *= self.prunable(self.groups) / self.prunable(groups)
            least = sum(self.costs[group.name] for group in groups) / self.prunable(groups)
            if ratio > 1 - least:
                raise NotReachedError(f"{ratio:.0%} of what it cuts, of which {1 - least:.0%} can go")
        if way == DEPTH:
            return without_layers(dense, self.stacks, self.seen(seed), ratio, self.prunable(groups))
        if way in WAYS:
            kept = kept_by(WAYS[way], dense, groups, self.costs, self.seen(seed), ratio)
            return cut(dense, groups, kept, self.seen(seed), WAYS[way].makes_up)
        model, example = copy.deepcopy(dense), self.bench.dense.example()
        names = None if groups is self.groups else [group.name for group in groups]
        if way == MAGNITUDE:
            return upop.shrink(model, plan_by_magnitude(model, ratio, example=example))
        upop.calibrate(model, self.batches(seed), ratio, loss=self.bench.dense.loss, include=names, example=example)
        return model

    def recover(self, model: nn.Module, steps: int, seed: int, recovery: str) -> nn.Module:
        """Train a model that was cut: all its weights, or adapters that are merged at the end."""
        if recovery == FULL:
            return retrain(self.bench, model, steps, seed)
        dense = self.bench.dense
        faster = replace(dense, settings=dense.settings.model_copy(update={"init_lr": self.lora_rate}))
        torch.manual_seed(seed)
        adapters = Adapters(model, RANK)
        retrain(replace(self.bench, dense=faster), model, steps, seed)
        adapters.merge()
        return model

    def measure(self, cell: Cell, steps: int) -> Cell:
        """Return the row of a cell."""
        method, recovery, seed = cell["method"], cell["recovery"], cell["seed"]
        ratio, begun = REDUCTIONS.get(cell["reduction"], 0.0), time.process_time()
        try:
            if method == DENSE:
                model = self.bench.dense.model
            elif method in SEARCHED:
                model = compress(self.bench, SEARCHED[method], ratio, steps, seed, "params").model
            else:
                model = self.cut(method, ratio, seed)
                if recovery != NONE:
                    model = self.recover(model, steps, seed, recovery)
        except NotReachedError as error:
            return {**cell, "unreached": str(error)}
        seconds = time.process_time() - begun
        return {
            **cell,
            "parameters": count_parameters(model),
            "macs": count_macs(model, self.bench.dense.example()),
            "seconds": round(seconds, 1),
            **{name: round(score, 3) for name, score in self.score(model).items()},
        }


def methods(towers: bool, recovery: str, *, core: bool = False) -> list[str]:
    """Return the methods that are compared.

    Args:
        towers: whether Wanda's and FLAP's scores are confined to the language tower, as published.
        recovery: `NONE`, `FULL` or `LORA`.
        core: without variants of ours, and without those for which all towers share one budget as well.
    """
    scored = [OTHERS[0], *(f"{each}{_LANGUAGE}" for each in (*_MLPS, *OTHERS[1:3]))] if towers else [*OTHERS[:3]]
    found = [*(["upop, search"] if recovery == FULL else []), OURS, scored[0], MAGNITUDE, DEPTH, *scored[1:]]
    if core:
        return found
    more = [*OTHERS[1:3], f"{OURS}{_LANGUAGE}"] if towers else []
    return [*found, *([[*SEARCHED][1]] if recovery == FULL else []), *more, OTHERS[3]]


def cells(towers: bool, seeds: int) -> Iterator[Cell]:
    """Yield the cells to measure, the most informative first."""
    yield {"method": DENSE, "reduction": "1x", "recovery": NONE, "seed": 0}
    for core, part, seed in itertools.product((True, False), _ORDER, range(seeds)):
        for reductions, recovery in part:
            known = methods(towers, recovery, core=True)
            chosen = known if core else [each for each in methods(towers, recovery) if each not in known]
            for reduction, method in itertools.product(reductions, chosen):
                yield {"method": method, "reduction": reduction, "recovery": recovery, "seed": seed}


def options(parser: argparse.ArgumentParser, rows: Path, out: Path) -> None:
    """Add the options of both benchmarks."""
    parser.add_argument("--rows", type=Path, default=rows, help="where cells are written as they are measured")
    parser.add_argument("--out", type=Path, default=out)
    parser.add_argument("--steps", type=int, default=60, help="of recovery, those of a search included")
    parser.add_argument("--rate", type=float, default=1e-3, help="highest learning rate of all weights")
    parser.add_argument("--lora-rate", type=float, default=5e-3, help="that of LoRA")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--most", type=int, help="measure so many cells and stop")


def run(read: Callable[[], Subject], wanted: Sequence[Cell], given: argparse.Namespace, **about: Any) -> None:
    """Measure the cells that are missing, and write all of them.

    Args:
        read: what reads the model, if a cell is missing.
        wanted: in this order.
        given: by `options`.
        about: of the measurement, for the file.
    """
    rows: list[Cell] = list(read_lines(given.rows)) if given.rows.is_file() else []
    known = {tuple(row[name] for name in NAMES) for row in rows}
    missing = [cell for cell in wanted if tuple(cell[name] for name in NAMES) not in known][: given.most]
    given.rows.parent.mkdir(parents=True, exist_ok=True)
    subject = read() if missing else None
    for cell in missing:
        assert subject is not None
        rows.append(subject.measure(cell, given.steps))
        with given.rows.open("a") as file:
            file.write(json.dumps(rows[-1]) + "\n")
        print(json.dumps(rows[-1]), flush=True)
    shared = {"steps": given.steps, "rate": given.rate, "lora_rate": given.lora_rate, "lora_rank": RANK}
    write_json(given.out, {"machine": machine(torch.device("cpu")), **shared, **about, "rows": rows})
