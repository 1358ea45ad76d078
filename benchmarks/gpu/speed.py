"""How much faster cut models are on this device, and what a search costs beside plain fine-tuning."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from gpu.models import Model
from gpu.sections import Measurement
from random_cut import compressed
from upop.distillation import distill
from upop.pruning import Pruner, count_macs

LATENCY_SAYS = """Forward passes in bfloat16; both models of a row take turns, and times are medians. *Ideal* is the
ratio of the multiply-adds, *realised* the speed-up as a share of that; kept sizes are multiples of what is said."""
STEPS_SAY = """Training steps under bfloat16 autocast with AdamW, in turns with plain fine-tuning of the dense model.
*Search* is the default's step (stages, correction), with a *teacher* that is the dense model or without; *cut* is a
step after the cut. *Whole stage* is of all steps of a stage, its end with the correction included, *of plain* of the
median step. Peak memory is what the allocator held at most in one step, the weights of both included."""
ROUNDINGS = (1, 8, 16, 64)


def latencies(
    models: Mapping[str, Model], batches: tuple[int, ...], repeats: int, device: torch.device, compiled: bool
) -> Iterator[Measurement]:
    """Yield, for every model, batch and variant, what times it beside the dense model."""
    for name, model in models.items():
        for batch in batches:
            for ratio in (0.5, 0.75):
                for rounding in ROUNDINGS:
                    yield (
                        {"model": name, "batch": batch, "mode": "compiled" if compiled else "eager"}
                        | {"smaller": f"{1 / (1 - ratio):.0f}x", "multiple of": rounding},
                        partial(latency, model, batch, ratio, rounding, repeats, device, compiled),
                    )


@torch.inference_mode()
def latency(
    model: Model, batch: int, ratio: float, rounding: int, repeats: int, device: torch.device, compiled: bool
) -> dict[str, float]:
    """Return milliseconds of the dense and the cut model, and what the cut gained."""
    torch.manual_seed(0)
    dense = model.build().eval()
    with torch.inference_mode(False):
        small = compressed(dense, ratio, rounding).eval()
    macs = [count_macs(each, model.batch(1, torch.device("cpu"))) for each in (dense, small)]
    inputs = model.batch(batch, device, torch.bfloat16)
    both: list[Any] = [each.to(device, torch.bfloat16) for each in (dense, small)]
    if compiled:
        both = [torch.compile(each, dynamic=False) for each in both]
    dense_time, small_time = map(median, alternately([partial(each, **inputs) for each in both], repeats, device))
    speed_up, ideal = dense_time / small_time, macs[0] / macs[1]
    return {
        "dense (ms)": 1000 * dense_time,
        "cut (ms)": 1000 * small_time,
        "speed-up": speed_up,
        "ideal": ideal,
        "realised": speed_up / ideal,
    }


def steps(model: Model, batch: int, repeats: int, device: torch.device) -> Iterator[Measurement]:
    """Yield, for every kind of training step, what times it beside a plain one."""
    for kind in ("plain", "search", "search with teacher", "teacher alone", "cut 2x", "cut 4x"):
        yield (
            {"model": model.name, "batch": batch, "step": kind},
            partial(step, model, batch, kind, repeats, device),
        )


def step(model: Model, batch: int, kind: str, repeats: int, device: torch.device) -> dict[str, float]:
    """Return the time and peak memory of a kind of step, and their ratios to those of a plain step."""
    torch.manual_seed(0)
    inputs = model.batch(batch, device)
    labels = torch.randint(model.labels, (batch,), device=device)
    plain = _Training(model.build().to(device), inputs, labels)
    other = _Training(_cut(model.build(), kind).to(device), inputs, labels)
    other.attach(kind, stage=repeats)
    peaks = [_peak(each.step, device) for each in (plain, other)]
    plain_times, times = alternately([plain.step, other.step], repeats, device)
    found = {"ms": 1000 * median(times), "of plain": median(times) / median(plain_times)}
    found["of plain, whole stage"] = sum(times) / sum(plain_times)
    if peaks[0]:
        found |= {"peak (GiB)": peaks[1] / 2**30, "peak of plain": peaks[1] / peaks[0]}
    return found


def _cut(model: nn.Module, kind: str) -> nn.Module:
    return compressed(model, {"cut 2x": 0.5, "cut 4x": 0.75}[kind], 8) if kind.startswith("cut") else model


class _Training:
    """A model, its optimizer and one batch."""

    def __init__(self, model: nn.Module, inputs: dict[str, Tensor], labels: Tensor) -> None:
        self._model, self._inputs, self._labels = model.train(), inputs, labels
        self._optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
        self._pruner: Pruner | None = None
        self._taught: Any = None

    def attach(self, kind: str, stage: int) -> None:
        """Attach what a kind of step needs: a search in the middle of its eight stages, of so many steps each."""
        if "teacher" in kind:
            self._taught = distill(self._model, teacher=copy.deepcopy(self._model))
        if kind.startswith("search"):
            self._pruner = Pruner(self._model, ratio=0.5, steps=8 * stage)
            self._pruner.load_state_dict(self._pruner.state_dict() | {"steps_done": 2 * stage})

    def step(self) -> None:
        """Take one step."""
        with torch.autocast(self._labels.device.type, torch.bfloat16):
            loss = nn.functional.cross_entropy(self._model(**self._inputs), self._labels)
        if self._taught is not None:
            loss = loss + self._taught.loss()
        loss.backward()
        if self._pruner is not None:
            self._pruner.step()
        self._optimizer.step()
        self._optimizer.zero_grad()


def _peak(run: Callable[[], Any], device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    run()
    torch.cuda.reset_peak_memory_stats(device)
    run()
    return torch.cuda.max_memory_allocated(device)


def alternately(runs: list[Callable[[], Any]], repeats: int, device: torch.device) -> list[list[float]]:
    """Return the seconds of each, which take turns; the first turn is not counted."""
    seconds: list[list[float]] = [[] for _ in runs]
    for turn in range(repeats + 1):
        for run, times in zip(runs, seconds, strict=True):
            wait(device)
            start = time.perf_counter()
            run()
            wait(device)
            if turn:
                times.append(time.perf_counter() - start)
    return seconds


def wait(device: torch.device) -> None:
    """Wait until the device has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
