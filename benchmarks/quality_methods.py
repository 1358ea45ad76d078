"""The ways to compress that benchmarks/quality.py compares: each takes a dense model and a number of training steps.

All methods see the same batches in the same order, train with the same optimizer and the same highest rate, and take
the same number of steps in all; a step whose gradients are taken for scores alone counts like any other.
"""

from __future__ import annotations

import copy
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

import upop
from dense_tasks import DenseTask
from quality_torch_pruning import UnsupportedError, plan_by_torch_pruning
from upop import count_parameters
from upop.errors import SettingError
from upop.pruning import plan_by_magnitude
from upop.pruning.costs import channel_costs
from upop.pruning.errors import StepError
from upop.runs.devices import to_device
from upop.runs.loaders import make_loader

Cost = Literal["params", "macs", "reference", "model"]
Cut = Literal["search", "magnitude", "taylor", "calibrate", "torch-pruning l2", "torch-pruning taylor"]

_FEWEST = 16
"""Steps of a search, unless that is more than a third of all steps."""
_WARM_UP = 0.05
"""Of all steps of a schedule."""


@dataclass(frozen=True)
class Method:
    """How and when a model is pruned.

    Attributes:
        cut: "search" cuts during training; all others cut at the start, after a few steps for gradients if they
            need them.
        share: of all steps that the search takes.
        pruner: options of `upop.Pruner` that differ from its defaults.
        stages: of the search (the `interval` follows), or of `upop.calibrate`; None is the default.
        updates: of soft masks in a whole search; None leaves `stages` to say it.
        two_phases: a constant rate in the search and a falling one afterwards, instead of one schedule over both.
        per_modality: a budget of its own for each modality, the same share of each.
        normalised: scores of each step come from gradients of norm 1, so that all steps weigh the same.
        teacher: options of `upop.distill`, with the dense model as teacher in all steps. None has no teacher.
        fading: the weight of the distillation loss falls to zero over all steps.
        cost: counts this instead of the cost that the table is about.
        kinds: of the groups that are searched; None searches all.
    """

    cut: Cut = "search"
    share: float = 0.1
    pruner: Mapping[str, Any] = field(default_factory=dict)
    stages: int | None = None
    updates: int | None = None
    two_phases: bool = False
    per_modality: bool = False
    normalised: bool = False
    teacher: Mapping[str, Any] | None = None
    fading: bool = False
    cost: Cost | None = None
    kinds: tuple[str, ...] | None = None


_PUBLISHED = {"progress": "soft", "importance": "signed"}
DEFAULT = "upop"
_TAUGHT = Method(teacher={})
_STILL = {"rotate": False}
METHODS: dict[str, Method] = {
    DEFAULT: _TAUGHT,
    "no rotation": Method(teacher={}, pruner=_STILL),
    "reference": Method(share=0.5, pruner=_PUBLISHED, updates=20, two_phases=True),
    "reference 36:1": Method(share=0.5, pruner=_PUBLISHED, updates=20, two_phases=True, cost="reference"),
    "no teacher": Method(pruner=_STILL),
    "no progress": Method(stages=1, teacher={}, pruner=_STILL),
    "per modality": Method(per_modality=True, teacher={}, pruner=_STILL),
    "L2": Method("magnitude"),
    "Taylor": Method("taylor"),
    "Torch-Pruning L2": Method("torch-pruning l2"),
    "Torch-Pruning Taylor": Method("torch-pruning taylor"),
}
"""What the tables compare; all variants of the default leave heads as they are. "reference" is the published recipe
with true costs, so that sizes are equal; 36:1 are the published ones, where an attention channel counts as 36 MLP
channels."""
LEVERS: dict[str, Method] = {
    DEFAULT: _TAUGHT,
    "teacher, features 1": Method(teacher={"features": 1.0}),
    "teacher, features 20": Method(teacher={"features": 20.0}),
    "teacher, logits": Method(teacher={"features": 0.0, "logits": 1.0}),
    "teacher, both": Method(teacher={"logits": 1.0}),
    "teacher, fading": Method(teacher={}, fading=True),
    "no teacher": Method(),
    "score squared": Method(pruner={"importance": "squared"}),
    "score signed": Method(pruner={"importance": "signed", "progress": "stages"}),
    "soft masks": Method(pruner={"importance": "absolute", "progress": "soft"}, updates=20),
    "scores normalised per step": Method(normalised=True),
    "no correction": Method(pruner={"correct": False}),
    "no correction, 1 stage": Method(pruner={"correct": False}, stages=1),
    "1 stage": Method(stages=1),
    "2 stages": Method(stages=2),
    "4 stages": Method(stages=4),
    "16 stages": Method(stages=16),
    "search 5 %": Method(share=0.05),
    "search 25 %": Method(share=0.25),
    "search 50 %": Method(share=0.5),
    "two phases": Method(two_phases=True),
    "two phases, search 25 %": Method(two_phases=True, share=0.25),
    "cost in GMACs": Method(cost="macs"),
    "calibrate first": Method("calibrate", stages=8),
}
"""The default, and what was tried in its place; all that is not about the teacher is tried without one."""
PARTS: dict[str, Method] = {
    DEFAULT: _TAUGHT,
    "attention alone": Method(teacher={}, kinds=("attention",)),
    "MLPs alone": Method(teacher={}, kinds=("mlp",)),
    "depth": Method(teacher={}, pruner={"depth": True}),
    "width": Method(teacher={}, pruner={"width": True}),
    "width alone": Method(teacher={}, pruner={"width": True}, kinds=("residual",)),
    "depth and width": Method(teacher={}, pruner={"depth": True, "width": True}),
    "taught, 16 stages": Method(teacher={}, stages=16),
    "taught, search 25 %": Method(teacher={}, share=0.25),
    "depth, search 25 %": Method(teacher={}, share=0.25, pruner={"depth": True}),
}
"""What may go, and how long the search for it takes; all have the teacher."""


@dataclass(frozen=True)
class Compressed:
    """The result of a method.

    Attributes:
        model: the small one.
        seconds: of the whole compression: processor time on a CPU, time that passed elsewhere.
        first: steps before the cut was complete.
        rates: the rate of the first step, the highest one, and that of the last step.
    """

    model: nn.Module
    seconds: float
    first: int
    rates: tuple[float, float, float]


@dataclass
class Bench:
    """A dense model, and batches of training samples, which are read once and shuffled by every seed."""

    dense: DenseTask
    samples: list[Any]
    collate: Callable[[list[Any]], Mapping[str, Any]]

    @classmethod
    def read(cls, name: str, pool: int, batch: int, **options: Any) -> Bench:
        """Read a task with `pool` of its training samples, which the same draw chooses whatever the seed of a cell."""
        dense = DenseTask.read(name, batch_size_train=batch, **options)
        loader = make_loader(dense.task, dense.settings, "train")
        numbers = torch.randperm(len(loader.dataset), generator=torch.Generator().manual_seed(0))  # type: ignore[arg-type]
        collate = loader.collate_fn
        assert collate is not None
        return cls(dense, [loader.dataset[number] for number in numbers[:pool].tolist()], collate)

    def batches(self, seed: int) -> Iterator[dict[str, Any]]:
        """Go through the samples again and again, each time in a new order that `seed` decides."""
        draws = torch.Generator().manual_seed(seed)
        size = min(self.dense.settings.batch_size_train, len(self.samples))
        while True:
            for numbers in torch.randperm(len(self.samples), generator=draws).split(size):
                if len(numbers) == size:
                    batch = self.collate([self.samples[number] for number in numbers.tolist()])
                    yield to_device(batch, self.dense.accelerator.device)


def search_steps(steps: int, share: float) -> int:
    """Return how many of all steps a search takes: its share, at least 16, and a third at most unless asked for more.

    So a short training is not only search.
    """
    return min(max(_FEWEST, round(share * steps)), max(1, steps // 3, round(share * steps)))


def schedule(steps: int, highest: float, warm_up: int) -> Callable[[int], float]:
    """Return the rate of every step: up to `highest` within the warm-up, then along a cosine towards 0."""

    def rate(step: int) -> float:
        return highest * min(1.0, (step + 1) / max(1, warm_up)) * (1 + math.cos(math.pi * step / steps)) / 2

    return rate


def compress(bench: Bench, method: Method, ratio: float, steps: int, seed: int, cost: Cost) -> Compressed:
    """Compress a copy of the dense model by one method.

    Args:
        bench: model and data.
        method: how.
        ratio: share to remove: of the prunable cost, or of all parameters if the cost is "model".
        steps: in all, at least 3.
        seed: of the order of the samples and of all draws.
        cost: what a channel costs, unless the method says another one.

    Raises:
        UnsupportedError: the method cannot cut this model.
    """
    torch.manual_seed(seed)
    dense = bench.dense
    model, batches = copy.deepcopy(dense.model).train(), bench.batches(seed)
    clock = time.process_time if dense.accelerator.device.type == "cpu" else time.perf_counter
    begun = clock()
    budget: dict[str, Any] = {"cost": method.cost or cost}
    if budget["cost"] == "macs":
        budget["example"] = dense.example()
    elif budget["cost"] == "model":
        budget = {"target": {"params": round(1 - ratio, 4)}}
    elif method.kinds or method.pruner.get("depth") or method.pruner.get("width"):
        # Of the same size as a cut of heads and neurons only: a ratio of other groups removes other numbers of
        # parameters.
        budget = {"target": {"params": _left(model, ratio)}}
    run = _Run(bench, model, batches, steps, method)
    if method.cut == "search":
        first = search_steps(steps, method.share)
        run.search(first, None if "target" in budget else ratio, budget)
    else:
        first = run.cut_at_start(ratio, budget)
    run.train(first, steps)
    if run.teacher is not None:
        run.teacher.remove()
    rates = tuple(run.rate(step) for step in range(steps))
    return Compressed(model, clock() - begun, first, (rates[0], max(rates), rates[-1]))


def _left(model: nn.Module, ratio: float) -> int:
    """Return the number of parameters of a model that lost a share of its heads and neurons."""
    groups = upop.find_groups(model)
    costs = channel_costs(model, groups, "params")
    return round(count_parameters(model) - ratio * sum(costs[group.name] * group.size for group in groups))


def retrain(bench: Bench, model: nn.Module, steps: int, seed: int) -> nn.Module:
    """Train a model that was cut already, in place, by the schedule of `compress`.

    Args:
        bench: data, and the settings of the optimizer.
        model: to be trained.
        steps: in all.
        seed: of the order of the samples and of all draws.
    """
    torch.manual_seed(seed)
    _Run(bench, model.train(), bench.batches(seed), steps, Method()).train(0, steps)
    return model


@dataclass
class _Run:
    """One compression under way."""

    bench: Bench
    model: nn.Module
    batches: Iterator[dict[str, Any]]
    steps: int
    method: Method

    def __post_init__(self) -> None:
        highest = self.bench.dense.settings.init_lr
        if self.method.two_phases:
            first = search_steps(self.steps, self.method.share)
            falling = schedule(self.steps - first, highest, 0)
            self.rate: Callable[[int], float] = lambda step: highest if step < first else falling(step - first)
        else:
            self.rate = schedule(self.steps, highest, round(_WARM_UP * self.steps))
        self.teacher: Any = None
        if self.method.teacher is not None:
            self.teacher = upop.distill(self.model, copy.deepcopy(self.bench.dense.model), **self.method.teacher)

    def search(self, steps: int, ratio: float | None, budget: Mapping[str, Any]) -> None:
        """Train for so many steps while searching, then cut."""
        method = self.method
        groups = upop.find_groups(self.model, width=bool(method.pruner.get("width")))
        options = {**budget, **method.pruner}
        parts = method.updates or method.stages
        if parts:
            options["interval"] = max(1, -(-steps // parts))
        modalities = sorted({group.modality for group in groups}) if method.per_modality else [None]
        pruners = []
        for modality in modalities:
            own = [group for group in groups if modality in (None, group.modality)]
            names = [group.name for group in own if method.kinds is None or group.kind in method.kinds]
            try:
                pruners.append(upop.Pruner(self.model, ratio, steps, include=names, **options))
            except SettingError as error:  # no part keeps so few channels
                raise UnsupportedError(str(error)) from error
        self.train(0, steps, pruners)
        kept = {name: channels for pruner in pruners for name, channels in pruner.plan().items()}
        for pruner in pruners:
            pruner.remove()
        upop.shrink(self.model, kept)

    def cut_at_start(self, ratio: float, budget: Mapping[str, Any]) -> int:
        """Cut before training; return how many steps' gradients it took."""
        cut, count = self.method.cut, min(16, max(1, self.steps // 10))
        loss = self.bench.dense.loss
        if cut == "magnitude":
            upop.shrink(self.model, plan_by_magnitude(self.model, ratio, **budget))
            return 0
        if cut == "taylor":
            # Raw first-order terms: standardised as in the published search they rank worse (docs/log.md).
            batches = list(itertools.islice(self.batches, count))
            upop.calibrate(self.model, batches, ratio, loss=loss, stages=1, correct=False, rotate=False, **budget)
            return count
        if cut == "calibrate":
            # Every stage goes through all batches, so they are few.
            stages = min(self.method.stages or 8, self.steps // 2)
            batches = list(itertools.islice(self.batches, max(1, count // stages)))
            upop.calibrate(self.model, batches, ratio, loss=loss, stages=stages, **budget)
            return stages * len(batches)
        passes = 0 if cut == "torch-pruning l2" else count
        for _ in range(passes):
            loss(self.model, next(self.batches)).backward()
        options = {"example": self.bench.dense.example(), **budget}
        plan = plan_by_torch_pruning(self.model, ratio, by_gradient=passes > 0, **options)
        self.model.zero_grad()
        upop.shrink(self.model, plan)
        return passes

    def train(self, begin: int, end: int, pruners: list[upop.Pruner] | None = None) -> None:
        """Take the steps from `begin` to `end` (exclusive) with a fresh optimizer."""
        dense = self.bench.dense
        optimizer = dense.task.optimizer(self.model, dense.settings)
        for step in range(begin, end):
            for group in optimizer.param_groups:
                group["lr"] = self.rate(step)
            loss: Tensor = dense.loss(self.model, next(self.batches))
            if self.teacher is not None:
                loss = loss + (1 - step / self.steps if self.method.fading else 1) * self._lesson()
            optimizer.zero_grad()
            loss.backward()
            if pruners:
                self._score(pruners)
            nn.utils.clip_grad_norm_(self.model.parameters(), dense.settings.clip_grad)
            optimizer.step()

    def _score(self, pruners: Iterable[upop.Pruner]) -> None:
        gradients = [weight.grad for weight in self.model.parameters() if weight.grad is not None]
        norm = nn.utils.get_total_norm(gradients) if self.method.normalised else None
        if norm is not None:
            torch._foreach_div_(gradients, norm)
        for pruner in pruners:
            pruner.step()
        if norm is not None:
            torch._foreach_mul_(gradients, norm)

    def _lesson(self) -> Tensor:
        try:
            described: Tensor = self.teacher.loss()
        except StepError as error:  # some models return no logits
            raise UnsupportedError(str(error)) from error
        return described
