"""One rank of two that train together through Accelerate; apart from the tests, so that a fresh process imports it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

import upop
from integrations.conftest import Images, tiny_classifier

STEPS = 6


def compress(folder: Path) -> None:
    """Compress in six steps of eight images, over however many processes; leave the plan and weights in a file."""
    accelerator = Accelerator(cpu=True)
    model: Any = tiny_classifier()
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    loader: Any = DataLoader(Images(), batch_size=8 // accelerator.num_processes)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    compression = upop.Compression(model, 0.5, STEPS, correct=False)
    for _ in range(2):
        for batch in loader:
            accelerator.backward(compression.loss(model(**batch).loss))
            compression.step(optimizer)
            optimizer.zero_grad()
    compression.finish()
    plan = {name: list(kept) for name, kept in compression.plan().items()}
    found = {"plan": plan, "weights": accelerator.unwrap_model(model).state_dict()}
    torch.save(found, folder / f"{accelerator.num_processes}-{accelerator.process_index}.pt")
    accelerator.end_training()
