"""One of two processes that train a model which merges tokens; apart from the tests, so that a fresh process has it."""

from __future__ import annotations

from pathlib import Path

import timm
import torch
import torch.distributed as dist
from torch import Tensor, nn

import upop

IMAGES = torch.linspace(-1, 1, 4 * 3 * 32 * 32).sin().view(4, 3, 32, 32)


def gradients(images: Tensor, *, parallel: bool = False) -> list[Tensor]:
    """Return all gradients of a mean over images."""
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 4, "num_classes": 5}
    model: nn.Module = upop.merge_tokens(timm.create_model("vit_tiny_patch16_224", **sizes).double(), 3).train()
    wrapped = nn.parallel.DistributedDataParallel(model) if parallel else model
    wrapped(images.double()).square().mean().backward()
    return [each.grad for each in model.parameters() if each.grad is not None]


def run(folder: str) -> None:
    """Write the gradients of this process, which has half of the images."""
    dist.init_process_group("gloo")
    try:
        rank = dist.get_rank()
        torch.save(gradients(IMAGES[2 * rank : 2 * rank + 2], parallel=True), Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()
