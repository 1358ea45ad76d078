"""Realised speed-up of token merging: a vision transformer with and without it.

Both take turns in one process; processor time of one thread is counted, which other programs disturb little. Weights
are random, which does not affect time.

    python benchmarks/tokens_speed.py --removed 48 --batches 1 16
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from upop import count_macs, merge_tokens
from upop.files import write_json
from upop.machine import machine

RESULT = Path(__file__).parent / "results" / "tokens_cpu.json"


def seconds(models: dict[str, nn.Module], image: Tensor, rounds: int) -> dict[str, float]:
    """Return the least processor time of a forward pass of every model, in turn."""
    taken: dict[str, list[float]] = {name: [] for name in models}
    with torch.inference_mode():
        for _ in range(rounds):
            for name, model in models.items():
                begun = time.process_time()
                model(image)
                taken[name].append(time.process_time() - begun)
    return {name: min(times) for name, times in taken.items()}


def main() -> None:
    """Measure, print and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_base_patch16_384", help="timm's name")
    parser.add_argument("--removed", type=int, default=48, help="tokens that every layer removes")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--rounds", type=int, default=4)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dense: Any = timm.create_model(arguments.model).eval()
    models = {"dense": dense, "merging": merge_tokens(copy.deepcopy(dense), arguments.removed)}
    size = dense.pretrained_cfg["input_size"]
    found: dict[str, Any] = {
        "model": arguments.model,
        "removed": arguments.removed,
        "machine": machine(),
        "batches": {},
    }
    for batch in arguments.batches:
        image = torch.randn(batch, *size)
        gmacs = {name: count_macs(model, image) / 1e9 for name, model in models.items()}
        taken = seconds(models, image, arguments.rounds)
        predicted, realised = (each["dense"] / each["merging"] for each in (gmacs, taken))
        found["batches"][batch] = {
            "gmacs": gmacs,
            "seconds": taken,
            "predicted": predicted,
            "realised": realised,
            "share": realised / predicted,
        }
        print(f"batch {batch}: {predicted:.2f}x predicted, {realised:.2f}x realised, {realised / predicted:.2f} of it")
        write_json(RESULT, found)


if __name__ == "__main__":
    main()
