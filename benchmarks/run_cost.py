"""What a whole compression costs beside plain fine-tuning of the dense model, of as many steps.

- Measured: DeiT-S on small pictures, on this CPU. Every kind of step is taken in turn, round by round, by one thread,
  and timed in processor time, for the machine may be busy: a step of the dense model (`plain`), of the default search
  (masks, scores, teacher), of the training after it (cut to half of what can be cut, teacher), and of the
  published search (`reference`: soft masks, no teacher) and the training after that. What the search does besides
  (reading the model, the correction at the end of a stage, the verified cut) is timed by itself. A run is the sum over
  its steps. Peak memory is that of all tensors in a step, weights, gradients and optimizer state included.
- Computed (`--compute`): a decoder of 8 B parameters in bfloat16. Operations are counted by formulas, of its sizes and
  of those of the correction; assumed rates of a GPU turn them into time. Memory is counted: weights, gradients, two
  moments in float32, activations of checkpointed layers; and what a search holds beside these.

    OMP_NUM_THREADS=1 python benchmarks/run_cost.py
    OMP_NUM_THREADS=1 python benchmarks/run_cost.py --compute      # adds to the file that is there
"""

from __future__ import annotations

import argparse
import copy
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

import upop
from upop.compression import search_steps
from upop.files import write_json
from upop.machine import machine
from upop.pruning import plan_by_magnitude
from upop.pruning.least_squares import PARTS, moments_bytes
from upop.pruning.moments import LOOKS, allowed_bytes, readers
from upop.training.memory import peak_bytes

RESULTS = Path(__file__).parent / "results"
STEPS = 1000
"""Optimizer steps of a run."""
STAGES = 8
_RIDGES = 4
"""Ridges that are tried for a layer, mostly."""
MATMUL, SOLVE = 400e12, 30e12
"""Operations per second of a large GPU: products in bfloat16, and products and Cholesky factors in float32."""

Step = Callable[[], None]


def small_deit(size: int) -> nn.Module:
    """Return DeiT-S for pictures of `size` pixels."""
    torch.manual_seed(0)
    return timm.create_model("deit_small_patch16_224", img_size=size, num_classes=100).train()


class Kinds:
    """A model for every kind of step.

    Args:
        size: of pictures, in pixels.
        batch: pictures.
    """

    def __init__(self, size: int, batch: int) -> None:
        self._images, self._labels = torch.randn(batch, 3, size, size), torch.randint(100, (batch,))
        self.once: dict[str, float] = {}
        self.steps: dict[str, Step] = {}
        begun = time.process_time()
        dense = small_deit(size)
        upop.find_units(dense)
        self.once["reading"] = time.process_time() - begun
        self.steps["plain"] = self._step(dense)
        alone = copy.deepcopy(dense)
        self.steps["search, no teacher"] = self._step(alone, None, self._masked(upop.Pruner(alone, 0.5, STEPS)))
        searched = copy.deepcopy(dense)
        begun = time.process_time()
        pruner = self._masked(upop.Pruner(searched, 0.5, STEPS))
        self.once["masking"] = time.process_time() - begun
        self.steps["search"] = self._step(searched, upop.distill(searched, copy.deepcopy(dense)), pruner)
        self.steps["recovery"] = self._cut(dense, teacher=True)
        soft = copy.deepcopy(dense)
        published = self._masked(upop.Pruner(soft, 0.5, STEPS, progress="soft", cost="reference"))
        self.steps["reference search"] = self._step(soft, None, published)
        self.steps["reference recovery"] = self._cut(dense, teacher=False)

    def _masked(self, pruner: upop.Pruner) -> upop.Pruner:
        """Bring a search to its middle, where a quarter of what can be cut is masked."""
        state = pruner.state_dict()
        masks = {name: torch.ones_like(mask) for name, mask in state["masks"].items()}
        for mask in masks.values():
            mask[: len(mask) // 4] = 0
        pruner.load_state_dict(state | {"steps_done": STEPS // 2 + 1, "masks": masks})
        return pruner

    def _step(self, model: nn.Module, teacher: Any = None, pruner: Any = None) -> Step:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)

        def step() -> None:
            loss = cross_entropy(model(self._images), self._labels)
            (loss if teacher is None else loss + teacher.loss()).backward()
            if pruner is not None:
                pruner.step()
            optimizer.step()
            optimizer.zero_grad()

        return step

    def _cut(self, dense: nn.Module, *, teacher: bool) -> Step:
        model = copy.deepcopy(dense)
        plan = plan_by_magnitude(model, 0.5)
        begun = time.process_time()
        upop.shrink(model, plan)
        self.once["cut"] = time.process_time() - begun
        return self._step(model, upop.distill(model, copy.deepcopy(dense)) if teacher else None)


def _stage(size: int, batch: int) -> tuple[dict[str, float], dict[str, int]]:
    """Return the seconds of a plain step and of the last of a stage, and the peaks of both with all that is held."""
    images, labels = torch.randn(batch, 3, size, size), torch.randint(100, (batch,))
    seconds, peaks = {}, {}
    for name in ("plain", "last of a stage"):
        model = small_deit(size)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
        pruner = None if name == "plain" else upop.Pruner(model, 0.5, 2 * LOOKS, LOOKS)

        def step(
            given: torch.Tensor, model: nn.Module = model, optimizer: Any = optimizer, pruner: Any = pruner
        ) -> None:
            cross_entropy(model(given), labels).backward()
            if pruner is not None:
                pruner.step()
            optimizer.step()
            optimizer.zero_grad()

        for _ in range(1 if pruner is None else LOOKS - 1):
            step(images.clone())
        held = 3 * sum(each.nbytes for each in model.parameters())  # and the moments of the optimizer
        if pruner is not None:  # the user's own batch is gone by the next step
            held += sum(each.nbytes for one in pruner._moments._passes for each in one.tensors())
        begun = time.process_time()
        peaks[name] = held + peak_bytes(lambda step=step: step(images))  # type: ignore[misc]
        seconds[name] = time.process_time() - begun
    return seconds, peaks


def measured(size: int, batch: int, rounds: int) -> dict[str, Any]:
    """Return the seconds of all kinds of steps, and of whole runs."""
    kinds = Kinds(size, batch)
    seconds: dict[str, list[float]] = {name: [] for name in kinds.steps}
    names = list(kinds.steps)
    for turn in range(rounds + 1):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            begun = time.process_time()
            kinds.steps[name]()
            if turn:
                seconds[name].append(time.process_time() - begun)
    ratios = {name: sum(values) / sum(seconds["plain"]) for name, values in seconds.items()}
    plain = statistics.mean(seconds["plain"])
    ends, peaks = _stage(size, batch)
    once = {**kinds.once, "end of a stage": max(0.0, ends["last of a stage"] - ends["plain"])}
    ends_in_steps = STAGES * once["end of a stage"] / plain
    search = search_steps(STEPS)
    whole = search * ratios["search"] + (STEPS - search) * ratios["recovery"] + ends_in_steps
    whole += (once["reading"] + once["masking"] + once["cut"]) / plain
    return {
        "model": f"DeiT-S, pictures of {size} pixels, batch {batch}, AdamW",
        "timed": f"processor time of one thread, {rounds} rounds in turn; the machine was shared",
        "steps": STEPS,
        "steps_of_the_search": search,
        "seconds_of_a_plain_step": round(plain, 3),
        "steps_beside_plain": {name: round(value, 3) for name, value in ratios.items()},
        "seconds_once": {name: round(value, 2) for name, value in once.items()},
        "search_of_1000_steps_beside_plain": round(ratios["search, no teacher"] + ends_in_steps / STEPS, 3),
        "run_beside_plain": round(whole / STEPS, 3),
        "reference_run_beside_plain": round((ratios["reference search"] + ratios["reference recovery"]) / 2, 3),
        "peak_bytes": peaks,
        "peak_beside_plain": round(peaks["last of a stage"] / peaks["plain"], 4),
    }


def computed(tokens: int, sequences: int, layers: int) -> dict[str, Any]:
    """Return what a run at the sizes of Llama 3 8B costs, in operations and bytes."""
    sizes: dict[str, Any] = {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    }
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=layers, vocab_size=128256))
        model.to(torch.bfloat16)
    units = upop.find_units(model.eval())
    parameters = sum(each.numel() for each in model.parameters())
    embedding = model.get_input_embeddings().weight.numel()
    # Two operations per weight and token, and those of attention, causal.
    forward = 2.0 * (parameters - embedding) * tokens * sequences + layers * 2.0 * tokens**2 * 4096 * sequences
    weights = sum(each.nbytes for each in model.parameters())
    seen = tokens * sequences
    rows = LOOKS * min(seen, 8192)
    solve, held, largest = 0.0, 0, 0
    for unit in units:
        layer = readers(model, unit)[0]
        n, outputs = layer.in_features, layer.out_features
        solve += PARTS * _operations(rows // PARTS, n, 64, _RIDGES) + _operations(rows, n, outputs, 1)
        held += min(rows * n * 2, moments_bytes(n, torch.float32))
        largest = max(largest, layer.weight.nbytes)
    prunable = sum(
        layer.weight.numel()
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and "layers" in name
    )
    cut = 1 - 0.5 * prunable / parameters
    search = search_steps(STEPS)
    plain = 3 * forward / MATMUL
    looks = STAGES * (LOOKS * forward / MATMUL + solve / SOLVE)
    whole = search * (plain + forward / MATMUL) + looks + (STEPS - search) * (cut * plain + forward / MATMUL)
    activations = layers * seen * 4096 * 2
    training = 2 * weights + 8 * parameters + activations
    held_on_device = min(held, int(allowed_bytes(model, "auto")))
    scratch = largest + LOOKS * seen * 16
    solving = 3 * moments_bytes(14336, torch.float32) // PARTS
    return {
        "model": f"Llama 3 8B sizes, {layers} layers, bfloat16, {sequences} x {tokens} tokens per step",
        "steps": STEPS,
        "rates": {"products": MATMUL, "solutions": SOLVE},
        "seconds": {
            "plain step": round(plain, 3),
            "what the search adds, without teacher, in all": round(looks, 1),
            "plain run": round(STEPS * plain),
            "run": round(whole),
        },
        "search_adds_to_the_run": round(looks / (STEPS * plain), 4),
        "run_beside_plain": round(whole / (STEPS * plain), 3),
        "gib": {
            "training step": round(training / 2**30, 1),
            "search, in a step": round(scratch / 2**30, 2),
            "correction, at the end of a stage": round((held_on_device + solving) / 2**30, 2),
            "activations that are free by then": round(activations / 2**30, 2),
            "waiting on the CPU": round(held / 2**30, 1),
            "moments of all layers, as it was": round(
                sum(moments_bytes(readers(model, unit)[0].in_features, torch.float32) for unit in units) / 2**30, 1
            ),
        },
        "search_adds_to_the_memory_of_a_step": round(
            max(scratch, held_on_device + solving - activations) / training, 4
        ),
    }


def _operations(rows: int, inputs: int, outputs: int, ridges: int) -> float:
    """Return the operations of a problem of least squares, in as many unknowns as there are rows or inputs."""
    size = min(rows, inputs)
    products = 2 * rows * inputs * size * (ridges if rows < inputs else 1)
    return products + ridges * (size**3 / 3 + 2 * size**2 * outputs + 2 * rows * inputs * outputs)


def main() -> None:
    """Measure or compute, and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compute", action="store_true")
    parser.add_argument("--pixels", type=int, default=112)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--out", type=Path, default=RESULTS / "run_cost_cpu.json")
    given = parser.parse_args()
    torch.set_num_threads(1)
    content: dict[str, Any] = json.loads(given.out.read_text()) if given.out.is_file() else {}
    found = computed(2048, 8, given.layers) if given.compute else measured(given.pixels, given.batch, given.rounds)
    name = "computed" if given.compute else "measured"
    content = {key: content.get(key) for key in ("measured", "computed")}
    content[name] = {"command": shlex.join(["python", *sys.argv]), **found}
    print(json.dumps(content[name], indent=1))
    write_json(given.out, {"machine": machine("cpu"), **content})


if __name__ == "__main__":
    main()
