"""Cost of a search step relative to a plain training step: time and peak memory, for two kinds of masks.

Four steps are compared, each forward, backward, AdamW and clearing the gradients:

- plain: ordinary training;
- ours: the same with `upop.Pruner` attached (masks in weight space), `pruner.step()` in every step, and a stage that
  ends at every `--interval`-th, in the middle of a search; two steps before record the inputs of the layers
  to correct. With as many repeats as a stage has steps, `total` is the mean over a whole stage;
- soft: the published search, its masks moved at every `--interval`-th step, when a third of the cost is masked;
- activations: the same with masks that multiply activations, as the published code does: q, k and v per head
  dimension and the first MLP layer's output, each by a learnable vector whose gradient accumulates. Its
  ranking is left out, which flatters it.

Time: one model and one optimizer serve all of them, which take turns step by step in a rotating order, so that
a drift of the machine hits all alike. Ratios are taken within a round; their median and quartiles are given.
`total` is the ratio of all rounds' summed times: the rare steps that move the masks count in it as they do.
Putting masks on and taking them off between turns is not timed.

Memory: the most bytes held at once in a step, weights, gradients and optimizer state included. On CUDA the
allocator knows it (`max_memory_allocated`). On a CPU the process's resident size moves with the allocator's
caches and the machine's load, so the profiler samples every allocation and release that torch asks of its
allocator, from before the model is built, and their running sum is exact, whatever else the machine does.

    python benchmarks/search_step.py --models deit-s --repeats 20 --threads 1
"""

from __future__ import annotations

import argparse
import gc
import json
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.profiler import ProfilerActivity, profile

import upop
from upop.files import write_json
from upop.machine import machine
from upop.models.nlvr import BlipNlvr, NlvrConfig
from upop.pruning.costs import call
from upop.pruning.pruner import Progress

RESULTS = Path(__file__).parent / "results"
TARGET = 1.02
WARMUP = 2
MEMORY_STEPS = 4
HORIZON = 1000  # the length of the search that the measured steps are the middle of: a third of the cost is masked

Batch = tuple[Any, Tensor]
Step = Callable[[], None]
Variant = Callable[[nn.Module, int], AbstractContextManager[Step]]


def deit_s() -> tuple[nn.Module, Batch]:
    """Return DeiT-S and 16 images of 224 pixels with their labels."""
    return timm.create_model("deit_small_patch16_224"), (
        torch.randn(16, 3, 224, 224),
        torch.randint(1000, (16,)),
    )


def blip_nlvr(pairs: int = 1) -> tuple[nn.Module, Batch]:
    """Return full-size BLIP for NLVR and pairs of 384-pixel images, each with a sentence of 36 tokens."""
    config = NlvrConfig.vit("base")
    inputs = {
        "images": torch.randn(2 * pairs, 3, config.image_size, config.image_size),
        "input_ids": torch.randint(1000, 20000, (pairs, 36)),
        "attention_mask": torch.ones(pairs, 36, dtype=torch.long),
    }
    return BlipNlvr(config), (inputs, torch.randint(2, (pairs,)))


MODELS: dict[str, Callable[[], tuple[nn.Module, Batch]]] = {
    "deit-s": deit_s,
    "blip-nlvr": blip_nlvr,
    # What our masks cost depends on the weights alone, so its share of a step falls as the batch grows.
    "blip-nlvr-batch4": partial(blip_nlvr, 4),
}


@contextmanager
def plain(_model: nn.Module, _interval: int) -> Iterator[Step]:
    """A plain training step."""
    yield lambda: None


class Ours:
    """Attaches a `Pruner`; the search goes on where it stood when it was last taken off."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._state: dict[str, Any] | None = None

    @contextmanager
    def __call__(self, model: nn.Module, interval: int) -> Iterator[Step]:
        """Attach the masks to `model`; yields what goes between backward and the optimizer."""
        pruner = upop.Pruner(model, ratio=0.5, steps=HORIZON, interval=interval, progress=self._progress)
        pruner.load_state_dict(self._state or pruner.state_dict() | {"steps_done": HORIZON // 2})
        try:
            yield pruner.step
        finally:
            self._state = pruner.state_dict()
            pruner.remove()


class Activations:
    """Multiplies the masked layers' outputs by learnable vectors, as the published code does."""

    def __init__(self) -> None:
        self._alphas: dict[str, nn.Parameter] = {}

    @contextmanager
    def __call__(self, model: nn.Module, _interval: int) -> Iterator[Step]:
        """Hook the layers of `model`; nothing is to be done between backward and the optimizer."""
        device = next(model.parameters()).device
        hooks = []
        for group in upop.find_groups(model):
            alpha = self._alphas.setdefault(group.name, nn.Parameter(torch.ones(group.size, device=device)))
            for part in group.producers:
                layer, _, leaf = part.tensor.rpartition(".")
                if leaf == "weight":
                    hooks.append(model.get_submodule(layer).register_forward_hook(self._hook(alpha, part.outer)))
        try:
            yield lambda: None
        finally:
            for hook in hooks:
                hook.remove()

    @staticmethod
    def _hook(alpha: nn.Parameter, outer: int) -> Callable[[nn.Module, Any, Tensor], Tensor]:
        return lambda _module, _inputs, output: output * alpha.repeat(outer)


def variants() -> dict[str, Variant]:
    """Return the kinds of step, with no history."""
    return {"plain": plain, "ours": Ours("stages"), "soft": Ours("soft"), "activations": Activations()}


def train_step(model: nn.Module, batch: Batch, optimizer: torch.optim.Optimizer, between: Step) -> None:
    """Take one step; `between` runs after the backward pass."""
    cross_entropy(call(model, batch[0]), batch[1]).backward()
    between()
    optimizer.step()
    optimizer.zero_grad()


def prepared(name: str, device: torch.device) -> tuple[nn.Module, Batch, torch.optim.Optimizer]:
    """Build a model in training mode with a batch and AdamW, all on `device`."""
    torch.manual_seed(0)
    model, (inputs, labels) = MODELS[name]()
    model.to(device).train()
    inputs = {key: value.to(device) for key, value in inputs.items()} if isinstance(inputs, dict) else inputs.to(device)
    return (
        model,
        (inputs, labels.to(device)),
        torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.05),
    )


def step_seconds(name: str, repeats: int, interval: int, device: torch.device) -> dict[str, list[float]]:
    """Return the seconds of every step, per variant, in rounds that belong together."""
    model, batch, optimizer = prepared(name, device)
    kinds = variants()
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    for turn in range(WARMUP + repeats):
        first = turn % len(kinds)
        order = list(kinds)[first:] + list(kinds)[:first]
        for kind in order:
            with kinds[kind](model, interval) as between:
                _wait(device)
                start = time.perf_counter()
                train_step(model, batch, optimizer, between)
                _wait(device)
                seconds[kind].append(time.perf_counter() - start)
    return {kind: values[WARMUP:] for kind, values in seconds.items()}


def peak_bytes(name: str, kind: str, device: torch.device) -> int:
    """Return the most bytes held at once in the steps after the first; the masks move in one of them."""
    gc.collect()
    if device.type == "cuda":
        model, batch, optimizer = prepared(name, device)
        with variants()[kind](model, 2) as between:
            train_step(model, batch, optimizer, between)
            torch.cuda.reset_peak_memory_stats(device)
            for _ in range(MEMORY_STEPS - 1):
                train_step(model, batch, optimizer, between)
        return torch.cuda.max_memory_allocated(device)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        model, batch, optimizer = prepared(name, device)
        with variants()[kind](model, 2) as between:
            for number in range(MEMORY_STEPS):
                if number == 1:
                    gc.collect()
                with torch.profiler.record_function(f"measured {number}"):
                    train_step(model, batch, optimizer, between)
    return _running_peak(profiler, since="measured 1")


def _running_peak(profiler: profile, since: str) -> int:
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    start = next(event["ts"] for event in events if event.get("name") == since)
    held = peak = 0
    for event in sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: float(e["ts"])):
        held += int(event["args"]["Bytes"])
        peak = max(peak, held) if event["ts"] >= start else held
    return peak


def summary(seconds: dict[str, list[float]], peaks: dict[str, int]) -> dict[str, dict[str, float | list[float]]]:
    """Return per variant: its seconds, their ratios to plain, its peak bytes and their ratio to plain."""
    rows: dict[str, dict[str, float | list[float]]] = {}
    for kind, values in seconds.items():
        ratios = [value / base for value, base in zip(values, seconds["plain"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        rows[kind] = {
            "seconds": values,
            "median_seconds": statistics.median(values),
            "time_ratio": middle,
            "time_ratio_quartiles": [low, high],
            "time_ratio_total": sum(values) / sum(seconds["plain"]),
            "peak_bytes": peaks[kind],
            "memory_ratio": peaks[kind] / peaks["plain"],
        }
    return rows


def table(rows: dict[str, dict[str, dict[str, Any]]]) -> Table:
    """Return the measurements as a table for the terminal."""
    result = Table(title=f"A search step beside a plain training step (target: at most {TARGET} in both)")
    for column in ("model", "step", "seconds", "time ratio", "quartiles", "total", "peak MB", "memory ratio"):
        result.add_column(column, justify="left" if column in ("model", "step") else "right")
    for name, kinds in rows.items():
        for kind, row in kinds.items():
            low, high = row["time_ratio_quartiles"]
            cells = [
                name,
                kind,
                f"{row['median_seconds']:.3f}",
                f"{row['time_ratio']:.3f}",
                f"{low:.3f} to {high:.3f}",
            ]
            cells += [
                f"{row['time_ratio_total']:.3f}",
                f"{row['peak_bytes'] / 1e6:.1f}",
                f"{row['memory_ratio']:.4f}",
            ]
            result.add_row(*cells, end_section=kind == "activations")
    return result


def main() -> None:
    """Measure, print the table, write the JSON file."""
    parser = argparse.ArgumentParser(description="Time and peak memory of a search step beside a plain one.")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=["deit-s", "blip-nlvr"])
    parser.add_argument("--repeats", type=int, default=20, help="rounds of one step each, at least 2")
    parser.add_argument("--interval", type=int, default=10, help="the masks move at every so many steps")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.repeats < 2:
        parser.error("--repeats must be at least 2")
    torch.set_num_threads(options.threads)
    rows = {}
    for name in options.models:
        peaks = {kind: peak_bytes(name, kind, options.device) for kind in variants()}
        rows[name] = summary(step_seconds(name, options.repeats, options.interval, options.device), peaks)
    Console(width=110).print(table(rows))
    about = machine(options.device)
    slug = "-".join("".join(c if c.isalnum() else " " for c in str(about["device"]).lower()).split())
    content = {
        "machine": about,
        "command": shlex.join(["python", *sys.argv]),
        "interval": options.interval,
        "models": rows,
    }
    write_json(options.out / f"search_step_{slug}.json", content)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
