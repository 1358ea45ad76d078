"""One of two processes that train with a teacher; apart from the tests, so that a fresh process can import it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import upop
from models.test_retrieval import pairs, tiny
from pruning.families import NLVR, loss_of, rows_of
from upop.models.contrast import own_rows


def gradients(inputs: dict[str, Tensor], *, parallel: bool = False) -> dict[str, Any]:
    """Return the loss of a model that has moved away from its teacher, and all gradients."""
    model: nn.Module = NLVR.build().train()
    teacher = NLVR.build(seed=1)
    wrapped = nn.parallel.DistributedDataParallel(model) if parallel else model
    distill = upop.distill(wrapped, teacher)
    task = loss_of(wrapped(**inputs))
    taught = distill.loss()
    (task + taught).backward()
    return {"loss": taught.detach(), "gradients": [parameter.grad for parameter in model.parameters()]}


def run(folder: str) -> None:
    """Write the gradients of this process's half of a batch, and what a teacher of retrieval sees of the other half."""
    dist.init_process_group("gloo")
    try:
        rank = dist.get_rank()
        found = gradients(rows_of(NLVR.inputs(4), 4, slice(2 * rank, 2 * rank + 2)), parallel=True)
        model = tiny().train()
        teacher = copy.deepcopy(model)
        with torch.no_grad():
            teacher.temp.fill_(0.5)  # left to itself, it would draw other hard negatives
        distill = upop.distill(nn.parallel.DistributedDataParallel(model), teacher)
        batch = pairs(6)
        # Each process pads to its own longest text.
        own = {name: value[own_rows(3)] for name, value in batch.items()}
        own |= {name: own[name][:, : 7 - 2 * rank] for name in ("input_ids", "attention_mask")}
        own["attention_mask"][:] = 1
        model(**own)
        found["retrieval"] = distill.loss().detach()
        found["draws"] = model.replay_arguments()["draws"]
        torch.save(found, Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()
