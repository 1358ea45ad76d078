"""What each of two processes does with its half of a batch; apart from the tests, for a fresh process."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

from upop.checkpoints.pretrained import open_model
from upop.models.dual import contrast


def gradients_of_half(folder: Path, batch: Path, to: Path) -> None:
    """Write the loss of all processes, and the mean of their gradients."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    inputs = {name: value.chunk(2)[rank] for name, value in torch.load(batch).items()}
    model = open_model(folder, ("AutoModelForZeroShotImageClassification",)).model
    loss = contrast(model, model(**inputs))
    loss.backward()
    gradients = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
    for gradient in gradients.values():
        dist.all_reduce(gradient)
        gradient /= 2
    if rank == 0:
        torch.save({"loss": loss.detach(), "gradients": gradients}, to)
    dist.destroy_process_group()
