"""One rank of the two that search together; apart from the tests, so that a fresh process can import it."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import upop
from pruning.families import NLVR, loss_of, rows_of

STEPS = 3
LIMIT = timedelta(minutes=2)


def search(inputs: dict[str, Tensor], rank: int | None, progress: Any) -> dict[str, Any]:
    """Search three steps on a batch of four, or on this rank's half of it; return what was decided."""
    model: nn.Module = NLVR.build()
    frozen = next(name for name, _ in model.named_parameters() if name.endswith("mlp.fc1.weight"))
    model.get_parameter(frozen).requires_grad_(False)  # its scores are averaged, where DDP averages no gradient
    wrapped = model if rank is None else nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=1e-2)
    pruner = upop.Pruner(wrapped, 0.5, STEPS, 1, progress=progress)
    if rank is not None:
        inputs = rows_of(inputs, 4, slice(2 * rank, 2 * rank + 2))
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss_of(wrapped(**inputs)).backward()
        exact = {each: each.grad.clone() for each in model.parameters() if each.grad is not None}
        for each in exact if rank else ():  # averages may differ in a last bit, and must decide alike
            each.grad.mul_(1 + 2**-52)
        pruner.step()
        for each, gradient in exact.items():
            each.grad = gradient
        optimizer.step()
    plan = {name: list(kept) for name, kept in pruner.plan().items()}
    result = {"scores": pruner.scores, "masks": pruner.masks, "plan": plan, "weights": dict(model.state_dict())}
    pruner.shrink(verify=inputs)
    return result


def compress(inputs: dict[str, Tensor], rank: int | None, steps: int) -> dict[str, Any]:
    """Compress in a few steps, most of them after the cut, with the wrapper and the optimizer of the dense model."""
    model: nn.Module = NLVR.build()
    wrapped = model if rank is None else nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=1e-2, momentum=0.9)
    compression = upop.Compression(wrapped, 0.5, steps, correct=False)
    if rank is not None:
        inputs = rows_of(inputs, 4, slice(2 * rank, 2 * rank + 2))
    for _ in range(steps):
        compression.loss(loss_of(wrapped(**inputs))).backward()
        compression.step(optimizer)
        optimizer.zero_grad()
    compression.finish()
    plan = {name: list(kept) for name, kept in compression.plan().items()}
    return {"plan": plan, "weights": dict(model.state_dict())}


def run(rank: int, folder: str, work: Any, how: Any) -> None:
    """Do one rank's part of `search` or `compress`, and leave what came of it in a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2, timeout=LIMIT)
    try:
        torch.save(work(NLVR.inputs(4), rank, how), Path(folder) / f"rank{rank}.pt")
    finally:
        dist.destroy_process_group()
