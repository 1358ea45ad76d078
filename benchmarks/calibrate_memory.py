"""Memory of pruning without training, beside the weights: `upop.calibrate` on decoders.

- Measured: the peak while a decoder of 0.5 B parameters in bfloat16 is built and cut, with the default settings, in one
  process. A dispatch mode tracks all tensors from before the weights exist until they are freed; memory inside of
  kernels is not counted. The groups are found before, which takes float64 copies (`reading`, up to 6 GiB for any
  model): they are cached for models of the same kind.
- Traced (`--trace`): a decoder of 7 B parameters with torch's fake tensors, which have shapes but no content: the
  scores of one batch, with recomputed activations, and the correction of the widest layer. The other phases hold
  less: a cut holds one tensor twice.

Weights are random, which does not affect memory.

    OMP_NUM_THREADS=1 python benchmarks/calibrate_memory.py
    OMP_NUM_THREADS=1 python benchmarks/calibrate_memory.py --trace      # adds to the existing file
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

import upop
from upop.files import write_json
from upop.machine import machine
from upop.pruning.costs import evaluating
from upop.pruning.groups import tensor_of
from upop.pruning.least_squares import PARTS, ConsumerInputs
from upop.pruning.moments import consumers
from upop.pruning.recompute import recomputing
from upop.pruning.scores import FreedRows, scoring
from upop.runs.memory import peak_bytes

RESULTS = Path(__file__).parent / "results"
GIB = 2**30


def half_billion(layers: int = 24) -> PreTrainedModel:
    """Return a decoder with the sizes of Qwen2.5-0.5B."""
    sizes: dict[str, Any] = {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
    }
    return Qwen2ForCausalLM(Qwen2Config(**sizes, num_hidden_layers=layers, vocab_size=151936, tie_word_embeddings=True))


def seven_billion(layers: int = 32) -> PreTrainedModel:
    """Return a decoder with the sizes of Llama-2-7B."""
    sizes: dict[str, Any] = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=layers, vocab_size=32000))


def without_memory(build: Any, layers: int) -> nn.Module:
    """Return a decoder in bfloat16 on the meta device."""
    with torch.device("meta"):
        model: nn.Module = build(layers).to(torch.bfloat16)
    return model.eval()


@torch.no_grad()
def filled(model: nn.Module) -> nn.Module:
    """Give a decoder from the meta device random weights."""
    model.to_empty(device="cpu")
    model.tie_weights()  # type: ignore[operator]
    for parameter in model.parameters():
        parameter.normal_(std=0.02) if parameter.dim() > 1 else parameter.fill_(1.0)
    for buffer in model.buffers():  # the frequencies of rotary embeddings
        buffer.copy_(1e4 ** (-torch.arange(len(buffer)) / len(buffer)))
    return model


def measured(layers: int, batches: int, tokens: int, stages: int, ratio: float) -> dict[str, Any]:
    """Make and cut a decoder of 0.5 B parameters; return the peaks."""
    found: dict[str, Any] = {"batches": batches, "tokens_per_batch": tokens, "stages": stages, "ratio": ratio}

    empty = without_memory(half_billion, layers)
    found["reading"] = peak_bytes(lambda: upop.find_prunable(empty))

    def run() -> None:
        model = filled(empty)
        found["parameters"] = sum(each.numel() for each in model.parameters())
        found["weights"] = sum(each.nbytes for each in model.parameters())
        ids = [torch.randint(151936, (1, tokens)) for _ in range(batches)]
        begun = time.process_time()
        upop.calibrate(model, [{"input_ids": each, "labels": each} for each in ids], ratio, stages=stages)
        found["processor_seconds"] = round(time.process_time() - begun)
        found["parameters_after"] = sum(each.numel() for each in model.parameters())

    found["peak"] = peak_bytes(run)
    found["peak_per_weights"] = round(found["peak"] / found["weights"], 3)
    return found


def traced(layers: int, tokens: int, batches: int) -> dict[str, Any]:
    """Return the peaks of a decoder of 7 B parameters: of the scores of a batch, and of one layer's correction."""
    model = without_memory(seven_billion, layers)
    groups = upop.find_groups(model)
    weights = sum(each.nbytes for each in model.parameters())
    widest = max(groups, key=lambda group: consumers(model, group)[0].in_features)
    layer = consumers(model, widest)[0]
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        ids = torch.zeros(1, tokens, dtype=torch.long)
        parameters = {
            part.tensor: (tensor_of(model, part.tensor), part.dim) for group in groups for part in group.producers
        }

        def scores() -> None:
            rows = FreedRows(scoring("absolute").rows, parameters, model.parameters())

            def loss() -> torch.Tensor:
                with torch.enable_grad():
                    value: torch.Tensor = model(input_ids=ids, labels=ids).loss
                return value

            with evaluating(model), recomputing(model):
                rows.of(loss)
            rows.release()

        def correction() -> None:
            size, outputs = layer.in_features, layer.out_features
            inputs = ConsumerInputs(size, torch.float32)
            for number in range(batches):
                given = torch.empty(tokens, size, dtype=torch.bfloat16)
                inputs.add(given, torch.ones(tokens), number % PARTS)
                del given
            kept, pruned = torch.arange(size - size // 16), torch.arange(size - size // 16, size)
            lost = torch.empty(len(pruned), 64)
            problem = inputs.problem(kept, pruned, torch.device("cpu"))
            problem.trial(lost, bias=False).gain(1.0, 0)
            problem.solve(torch.empty(len(pruned), outputs), 1.0, bias=False)

        peaks = {"scores": peak_bytes(scores), "correction_of_one_layer": peak_bytes(correction)}
    return {
        "parameters": sum(each.numel() for each in model.parameters()),
        "weights": weights,
        "tokens_per_batch": tokens,
        "batches": batches,
        "beside_the_weights": peaks,
        "peak_gib": round((weights + max(peaks.values())) / GIB, 2),
        "per_weights": round(1 + max(peaks.values()) / weights, 3),
    }


def main() -> None:
    """Measure or trace, and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", action="store_true")
    parser.add_argument("--layers", type=int, help="of the decoder; by default all")
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--stages", type=int, default=8)
    parser.add_argument("--ratio", type=float, default=0.3)
    parser.add_argument("--out", type=Path, default=RESULTS / "calibrate_memory_cpu.json")
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    content: dict[str, Any] = json.loads(given.out.read_text()) if given.out.is_file() else {}
    run = (
        partial(traced, given.layers or 32, given.tokens or 2048, given.batches)
        if given.trace
        else partial(measured, given.layers or 24, given.batches, given.tokens or 64, given.stages, given.ratio)
    )
    name = "traced, 7 B" if given.trace else "measured, 0.5 B"
    content = {key: content.get(key) for key in ("measured, 0.5 B", "traced, 7 B")}
    content[name] = {"command": shlex.join(["python", *sys.argv]), **run()}
    print(json.dumps(content[name], indent=1))
    write_json(given.out, {"machine": machine("cpu"), **content})


if __name__ == "__main__":
    main()
