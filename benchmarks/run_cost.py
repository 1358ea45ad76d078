"""Cost of a whole compression, relative to plain fine-tuning of the dense model for as many steps.

- Measured: DeiT-S on images of `--pixels`, and a small BLIP for NLVR (`--model blip`), on this CPU. Every kind of step
  takes its turn, round by round, in one thread, timed in processor time since the machine may be busy: a step of
  the dense model (`plain`), of the default search (masks, scores, teacher), of the training after it (cut to half of
  what can be cut, teacher), and of the published search (`reference`: soft masks, no teacher) and the training after
  that. Other work of the search (finding groups, the correction at the end of a stage, the verified cut) is
  timed separately. A run is the sum over its steps. Peak memory is that of all tensors in a step, weights, gradients
  and optimizer state included.
- Traced (`--trace`): DeiT-S and BLIP for NLVR at full size. The operations of products, attention and convolutions are
  counted in a forward pass of the dense and of the cut model, those of the correction by formulas; a run is their sum.
- Computed (`--compute`): a decoder of 8 B parameters in bfloat16. Operations are counted by formulas, of its sizes and
  of those of the correction; assumed rates of a GPU turn them into time. Memory is counted: weights, gradients, two
  moments in float32, activations of checkpointed layers; and what a search holds beside these.

    OMP_NUM_THREADS=1 python benchmarks/run_cost.py --pixels 224
    OMP_NUM_THREADS=1 python benchmarks/run_cost.py --model blip   # adds to the existing file
    OMP_NUM_THREADS=1 python benchmarks/run_cost.py --trace
    OMP_NUM_THREADS=1 python benchmarks/run_cost.py --compute
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
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

import upop
from upop.compression import steps_of_search
from upop.files import write_json
from upop.machine import machine
from upop.models.nlvr import BlipNlvr, NlvrConfig
from upop.pruning import plan_by_magnitude
from upop.pruning.least_squares import moments_bytes
from upop.pruning.moments import OBSERVATIONS, allowed_bytes, consumers
from upop.runs.memory import peak_bytes

RESULTS = Path(__file__).parent / "results"
STEPS = 1000
"""Optimizer steps of a run."""
STAGES = 8
MATMUL, SOLVE = 400e12, 30e12
"""Operations per second of a large GPU: products in bfloat16, and products and Cholesky factors in float32."""

Step = Callable[[], None]
Example = tuple[nn.Module, dict[str, torch.Tensor], torch.Tensor]


def deit(size: int, batch: int) -> Example:
    """Return DeiT-S for images of `size` pixels, a batch of them, and labels."""
    torch.manual_seed(0)
    model = timm.create_model("deit_small_patch16_224", img_size=size, num_classes=100).train()
    return model, {"x": torch.randn(batch, 3, size, size)}, torch.randint(100, (batch,))


def blip(size: int, batch: int) -> Example:
    """Return BLIP for NLVR, of six layers of half the width, and pairs of images with a sentence each."""
    torch.manual_seed(0)
    sizes = {"image_size": size, "vision_width": 384, "vision_depth": 6, "vision_heads": 6, "text_width": 384}
    config = NlvrConfig(**sizes, text_depth=6, text_heads=6, merge_from=3)
    return BlipNlvr(config).train(), _pairs(config.image_size, batch), torch.randint(2, (batch,))


def full_blip(_size: int, batch: int) -> Example:
    """Return BLIP for NLVR with ViT-B, at its published size."""
    config = NlvrConfig.vit("base")
    return BlipNlvr(config).train(), _pairs(config.image_size, batch), torch.randint(2, (batch,))


def _pairs(size: int, batch: int) -> dict[str, torch.Tensor]:
    return {
        "images": torch.randn(2 * batch, 3, size, size),
        "input_ids": torch.randint(1000, 20000, (batch, 36)),
        "attention_mask": torch.ones(batch, 36, dtype=torch.long),
    }


MODELS: dict[str, tuple[str, Callable[[int, int], Example]]] = {
    "deit": ("DeiT-S", deit),
    "blip": ("BLIP for NLVR, six layers of half the width", blip),
}


class Kinds:
    """A model for every kind of step.

    Args:
        example: the dense model, a batch, and its labels.
    """

    def __init__(self, example: Example) -> None:
        dense, self._inputs, self._labels = example
        self.once: dict[str, float] = {}
        self.steps: dict[str, Step] = {}
        begun = time.process_time()
        upop.find_groups(dense)
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
            loss = cross_entropy(model(**self._inputs), self._labels)
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


def _stage(example: Example) -> tuple[dict[str, float], dict[str, int]]:
    """Return the seconds of a plain step and of the last of a stage, and the peaks of both with all that is held."""
    dense, inputs, labels = example
    seconds, peaks = {}, {}
    for name in ("plain", "last of a stage"):
        model = copy.deepcopy(dense)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
        pruner = None if name == "plain" else upop.Pruner(model, 0.5, 2 * OBSERVATIONS, OBSERVATIONS)

        def step(given: Any, model: nn.Module = model, optimizer: Any = optimizer, pruner: Any = pruner) -> None:
            cross_entropy(model(**given), labels).backward()
            if pruner is not None:
                pruner.step()
            optimizer.step()
            optimizer.zero_grad()

        for _ in range(1 if pruner is None else OBSERVATIONS - 1):
            step({key: value.clone() for key, value in inputs.items()})
        held = 3 * sum(each.nbytes for each in model.parameters())  # and the moments of the optimizer
        if pruner is not None:  # the user's own batch is freed by the next step
            held += sum(each.nbytes for one in pruner._moments._passes for each in one.tensors())
        begun = time.process_time()
        peaks[name] = held + peak_bytes(lambda step=step: step(inputs))  # type: ignore[misc]
        seconds[name] = time.process_time() - begun
    return seconds, peaks


def measured(name: str, size: int, batch: int, rounds: int) -> dict[str, Any]:
    """Return the seconds of all kinds of steps, and of whole runs."""
    words, build = MODELS[name]
    kinds = Kinds(build(size, batch))
    seconds: dict[str, list[float]] = {name: [] for name in kinds.steps}
    names = list(kinds.steps)
    for turn in range(rounds + 1):
        for kind in names[turn % len(names) :] + names[: turn % len(names)]:
            begun = time.process_time()
            kinds.steps[kind]()
            if turn:
                seconds[kind].append(time.process_time() - begun)
    once = kinds.once
    del kinds
    plain = statistics.mean(seconds["plain"])
    ends, peaks = _stage(build(size, batch))
    once["end of a stage"] = max(0.0, ends["last of a stage"] - ends["plain"])
    return {
        "model": f"{words}, images of {size} pixels, batch {batch}, AdamW",
        "timed": f"processor time of one thread, {rounds} rounds in turn; the machine was shared",
        "seconds_of_a_plain_step": round(plain, 3),
        "seconds_once": {name: round(value, 2) for name, value in once.items()},
        **_run({name: sum(values) / sum(seconds["plain"]) for name, values in seconds.items()}, once, plain),
        "peak_bytes": peaks,
        "peak_beside_plain": round(peaks["last of a stage"] / peaks["plain"], 4),
    }


def _run(ratios: dict[str, float], once: dict[str, float], plain: float) -> dict[str, Any]:
    """Return what whole runs cost, from their steps beside a plain one, what is done once, and a plain step."""
    ends = STAGES * once["end of a stage"] / plain
    search = steps_of_search(STEPS)
    whole = search * ratios["search"] + (STEPS - search) * ratios["recovery"] + ends
    whole += (once.get("reading", 0) + once.get("masking", 0) + once.get("cut", 0)) / plain
    return {
        "steps": STEPS,
        "steps_of_the_search": search,
        "steps_beside_plain": {name: round(value, 3) for name, value in ratios.items()},
        "search_of_1000_steps_beside_plain": round(ratios["search, no teacher"] + ends / STEPS, 3),
        "run_beside_plain": round(whole / STEPS, 3),
        "reference_run_beside_plain": round((ratios["reference search"] + ratios["reference recovery"]) / 2, 3),
    }


def traced(name: str, build: Callable[[int, int], Example], batch: int) -> dict[str, Any]:
    """Return what a run of a model at full size costs in operations of its products."""
    model, inputs, _ = build(224, batch)
    groups = upop.find_groups(model)
    solve: list[float] = []

    def see(layer: nn.Linear, given: Any, _output: Any) -> None:
        rows = OBSERVATIONS * min(given[0].shape[:-1].numel(), 8192)
        solve.append(correction_operations(rows, layer.in_features, layer.out_features))

    hooks = [consumers(model, group)[0].register_forward_hook(see) for group in groups]
    counted = [_forward_operations(model, inputs)]
    for hook in hooks:
        hook.remove()
    upop.shrink(model, {group.name: range(group.size // 2) for group in groups}, verify=False)
    counted.append(_forward_operations(model, inputs))
    dense, cut = counted
    ratios = {
        "plain": 1.0,
        "search, no teacher": 1.0,
        "search": 4 / 3,
        "recovery": (3 * cut + dense) / (3 * dense),
        "reference search": 1.0,
        "reference recovery": cut / dense,
    }
    end = OBSERVATIONS * dense + sum(solve)
    return {
        "model": f"{name}, batch {batch}, half of every group cut",
        "operations_of_a_plain_step": 3 * dense,
        "operations_of_the_end_of_a_stage": end,
        **_run(ratios, {"end of a stage": end}, 3 * dense),
    }


def _forward_operations(model: nn.Module, inputs: Any) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**inputs)
    return int(counter.get_total_flops())


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
    groups = upop.find_groups(model.eval())
    parameters = sum(each.numel() for each in model.parameters())
    embedding = model.get_input_embeddings().weight.numel()
    # Two operations per weight and token, and those of attention, causal.
    forward = 2.0 * (parameters - embedding) * tokens * sequences + layers * 2.0 * tokens**2 * 4096 * sequences
    weights = sum(each.nbytes for each in model.parameters())
    seen = tokens * sequences
    rows = OBSERVATIONS * min(seen, 8192)
    solve, held, largest = 0.0, 0, 0
    for group in groups:
        layer = consumers(model, group)[0]
        n, outputs = layer.in_features, layer.out_features
        solve += correction_operations(rows, n, outputs)
        held += min(rows * n * 2, moments_bytes(n, torch.float32))
        largest = max(largest, layer.weight.nbytes)
    prunable = sum(
        layer.weight.numel()
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and "layers" in name
    )
    cut = 1 - 0.5 * prunable / parameters
    search = steps_of_search(STEPS)
    plain = 3 * forward / MATMUL
    looks = STAGES * (OBSERVATIONS * forward / MATMUL + solve / SOLVE)
    whole = search * (plain + forward / MATMUL) + looks + (STEPS - search) * (cut * plain + forward / MATMUL)
    activations = layers * seen * 4096 * 2
    training = 2 * weights + 8 * parameters + activations
    held_on_device = min(held, int(allowed_bytes(model, "auto")))
    scratch = largest + OBSERVATIONS * seen * 16
    # Moments of both parts, those of a problem, and its factor; the rows of the layer are let go of meanwhile.
    solving = 2 * moments_bytes(14336, torch.float32)
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
                sum(moments_bytes(consumers(model, group)[0].in_features, torch.float32) for group in groups) / 2**30, 1
            ),
        },
        "search_adds_to_the_memory_of_a_step": round(
            max(scratch, held_on_device + solving - activations) / training, 4
        ),
    }


def correction_operations(rows: int, inputs: int, outputs: int) -> float:
    """Return the operations of a layer's correction, in as many unknowns as there are rows or inputs.

    Products are symmetric: of eight blocks of columns, nine sixteenths are made. Five solutions tell ridges apart (four
    by one part of the rows, one by the other), each with 64 outputs; one more is the change.
    """
    size = min(rows, inputs)
    products = 2 * rows * inputs * size * 9 / 16
    trials = 5 * (size**3 / 3 + 4 * size**2 * 64)
    return products + trials + size**3 / 3 + 2 * size**2 * outputs


def main() -> None:
    """Measure or compute, and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="deit")
    parser.add_argument("--trace", action="store_true")
    parser.add_argument("--compute", action="store_true")
    parser.add_argument("--pixels", type=int, default=112)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--out", type=Path, default=RESULTS / "run_cost_cpu.json")
    given = parser.parse_args()
    torch.set_num_threads(1)
    content: dict[str, Any] = json.loads(given.out.read_text()) if given.out.is_file() else {}
    found: dict[str, Any]
    if given.compute:
        name, found = "computed", computed(2048, 8, given.layers)
    elif given.trace:
        name = "traced"
        found = {
            "deit": traced("DeiT-S, 224 pixels", deit, 16),
            "blip": traced("BLIP for NLVR, 384 pixels", full_blip, 1),
        }
    else:
        name, found = f"measured_{given.model}", measured(given.model, given.pixels, given.batch, given.rounds)
    content[name] = {"command": shlex.join(["python", *sys.argv]), **found}
    print(json.dumps(content[name], indent=1))
    order = ("measured_deit", "measured_blip", "traced", "computed")
    write_json(given.out, {"machine": machine("cpu"), **{key: content.get(key) for key in order}})


if __name__ == "__main__":
    main()
