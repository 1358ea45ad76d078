"""Time and memory to find and prove the groups of models of published sizes.

Each model is built with random weights, or none (a Llama of 8 B parameters on the meta device), and read once in its
own process, by `upop.find_prunable` with an example of two samples. Libraries are imported before the clock
starts. Wall time and processor time are measured; other work on the machine hardly affects the latter:

    python benchmarks/reading.py --threads 2
"""

from __future__ import annotations

import argparse
import json
import resource
import shlex
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import upop
from upop.files import write_json
from upop.machine import machine
from upop.models.retrieval import BlipRetrieval, RetrievalConfig
from upop.models.vqa import BlipVqa, VqaConfig
from upop.pruning.costs import count_parameters

RESULTS = Path(__file__).parent / "results"
_BATCH, _WORDS = 2, 12


def _words() -> torch.Tensor:
    return torch.randint(1000, 30000, (_BATCH, _WORDS))


def deit() -> tuple[nn.Module, Any]:
    """Return DeiT-S and two images."""
    return timm.create_model("deit_small_patch16_224"), torch.randn(_BATCH, 3, 224, 224)


def retrieval() -> tuple[nn.Module, Any]:
    """Return BLIP for retrieval, with its momentum encoders, and two images with a caption each."""
    config = RetrievalConfig.vit("base")
    mask = torch.ones(_BATCH, _WORDS, dtype=torch.long)
    return BlipRetrieval(config), (torch.randn(_BATCH, 3, config.image_size, config.image_size), _words(), mask)


def vqa() -> tuple[nn.Module, Any]:
    """Return BLIP for question answering, and two images with a question and an answer each."""
    config = VqaConfig.vit("base")
    mask = torch.ones(_BATCH, _WORDS, dtype=torch.long)
    images = torch.randn(_BATCH, 3, config.image_size, config.image_size)
    return BlipVqa(config), (images, _words(), mask, _words(), mask, torch.ones(_BATCH, dtype=torch.long))


def llama() -> tuple[nn.Module, Any]:
    """Return Llama-3-8B without memory for its weights, and two short texts."""
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    return model, {"input_ids": _words()}


MODELS: dict[str, tuple[Callable[[], tuple[nn.Module, Any]], float]] = {
    "deit-s": (deit, 2),
    "blip-retrieval": (retrieval, 15),
    "blip-vqa": (vqa, 15),
    "llama-8b": (llama, 60),
}
"""How each is built, and the seconds it may take on two cores."""


def measured(name: str) -> dict[str, Any]:
    """Read a model in this process; return what it took and what was found."""
    torch.manual_seed(0)
    model, example = MODELS[name][0]()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    passed, used = time.perf_counter(), time.process_time()
    found = upop.find_prunable(model, example)
    passed, used = time.perf_counter() - passed, time.process_time() - used
    return {
        "parameters": count_parameters(model),
        "seconds": passed,
        "processor_seconds": used,
        "target_seconds": MODELS[name][1],
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "peak_gib_before": before / 2**20,
        "groups": dict(Counter(f"{group.kind}, {group.channel}" for group in found.groups)),
        "skipped": len(found.skipped),
    }


def table(rows: dict[str, dict[str, Any]]) -> Table:
    """Return the measurements as a table for the terminal."""
    result = Table(title="Reading and proving a model")
    for column in ("model", "parameters", "seconds", "processor s", "target s", "peak GiB", "groups"):
        result.add_column(column, justify="left" if column == "model" else "right")
    for name, row in rows.items():
        numbers = (row["seconds"], row["processor_seconds"], row["target_seconds"], row["peak_gib"])
        groups = str(sum(row["groups"].values()))
        result.add_row(name, f"{row['parameters'] / 1e6:,.0f} M", *(f"{each:.1f}" for each in numbers), groups)
    return result


def main() -> None:
    """Measure each model in a process of its own, print the table, write the JSON file."""
    parser = argparse.ArgumentParser(description="Time and memory of reading and proving models of published sizes.")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--one", choices=list(MODELS), help="read this one here, and print what it took as JSON")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.one:
        print(json.dumps(measured(options.one)))
        return
    rows = {}
    for name in options.models:
        command = [sys.executable, __file__, "--one", name, "--threads", str(options.threads)]
        rows[name] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    Console(width=100).print(table(rows))
    about = machine(torch.device("cpu"))
    slug = "-".join("".join(c if c.isalnum() else " " for c in str(about["device"]).lower()).split())
    content = {"machine": about, "command": shlex.join(["python", *sys.argv]), "models": rows}
    write_json(options.out / f"reading_{slug}.json", content)


if __name__ == "__main__":
    main()
