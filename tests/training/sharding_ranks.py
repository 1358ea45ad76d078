"""What each of two processes does that train with sharded weights; apart from the tests, for a fresh process."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn

import upop
from models import test_clip, test_retrieval
from pruning.ranks import LIMIT
from upop.errors import LayoutError
from upop.models.contrast import own_rows
from upop.runs.sharding import (
    Sharding,
    average_unsharded,
    clip,
    load_whole_optimizer_state,
    sharded_copy,
    split_groups,
    total_norm,
    whole_optimizer_state,
)

STEPS = 4
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Case:
    """A model with momentum copies and a temperature, the batch of a step, and the loss of outputs."""

    build: Callable[[], nn.Module]
    batch: Callable[[int], dict[str, Tensor]]
    loss: Callable[[Any], Tensor]


def _retrieval_batch(step: int) -> dict[str, Tensor]:
    batch = test_retrieval.pairs(6, ids=[0, 1, 2, 2, 3, 4 + step], seed=step)
    return {**batch, "images": batch["images"].double()}


CASES = {
    "retrieval": Case(
        lambda: test_retrieval.tiny(queue_size=16).double(), _retrieval_batch, lambda found: sum(found[:2])
    ),
    # Its momentum tower reads the norm of its other one.
    "clip": Case(
        lambda: test_clip.clip(queue_size=16),
        lambda step: {**test_clip.pairs(6, seed=step), "ids": torch.tensor([0, 1, 2, 2, 3, 4 + step])},
        lambda loss: loss,
    ),
}


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.05)


def train(case: Case, share: bool, *, again_at: int | None = None) -> dict[str, Any]:
    """Search a few steps, with an average and clipped gradients, and return everything that came of it.

    Args:
        case: what to train.
        share: whether the weights are shared out over two processes, each of which takes half of the batch.
        again_at: before this step, start all over from saved states.
    """
    torch.manual_seed(11)
    model = case.build()
    average, pruner = ModelEmaV3(model, decay=0.5), upop.Pruner(model, 0.5, STEPS, 1)
    sharding = Sharding(model, CPU, pruner, average) if share else None
    trained = sharding.module if sharding else model
    trained.train()
    optimizer = optimizer_of(trained)
    split_groups(optimizer)
    norms = []
    for step in range(STEPS):
        if step == again_at and sharding:
            with sharding.whole(CPU):
                states = [copy.deepcopy(each.state_dict()) for each in (model, average.module, pruner)]
            saved, randomness = whole_optimizer_state(optimizer), torch.get_rng_state()
            model = case.build()
            average, pruner = ModelEmaV3(model, decay=0.5), upop.Pruner(model, 0.5, STEPS, 1)
            for each, state in zip((model, average.module, pruner), states, strict=True):
                each.load_state_dict(state)
            sharding = Sharding(model, CPU, pruner, average)
            trained = sharding.module.train()
            optimizer = optimizer_of(trained)
            split_groups(optimizer)
            load_whole_optimizer_state(optimizer, saved)
            torch.set_rng_state(randomness)
        batch: dict[str, Any] = case.batch(step)
        if share:
            batch = {name: value[own_rows(3)] for name, value in batch.items()}
        optimizer.zero_grad()
        case.loss(trained(**batch, alpha=0.4)).backward()
        if share:
            average_unsharded(trained)
        norms.append(total_norm(trained.parameters()))
        pruner.step()
        clip(trained.parameters(), 0.1, norms[-1])
        optimizer.step()
        average.update(trained)
    with sharding.whole(CPU) if sharding else nullcontext():
        found = {"masked": outputs(model, case), "scores": pruner.scores, "masks": pruner.masks}
        found |= {"model": copy.deepcopy(model.state_dict()), "average": copy.deepcopy(average.module.state_dict())}
    if sharding:
        sharding.finish()
    pruner.shrink(verify=lambda whole: outputs(whole, case))
    return {**found, "shrunk": outputs(model, case), "norms": torch.stack(norms)}


@torch.no_grad()
def outputs(model: nn.Module, case: Case) -> Tensor:
    batch, training = case.batch(0), model.training
    model.eval()
    texts = (batch[name] for name in ("input_ids", "attention_mask") if name in batch)
    found = (model.encode_image(batch["images"]), model.encode_text(*texts))
    model.train(training)
    return torch.cat([part.flatten() for each in found for part in (each if isinstance(each, tuple) else (each,))])


class Tied(nn.Module):
    """Two blocks that share a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.blocks[2].weight = self.blocks[0].weight


def tied() -> str:
    try:
        sharded_copy(Tied(), CPU)
    except LayoutError as error:
        return str(error)
    return ""


def run(name: str, folder: Path) -> None:
    warnings.filterwarnings("ignore", "torch.distributed.nn.functional.all_gather is deprecated", FutureWarning)
    dist.init_process_group("gloo", timeout=LIMIT)
    runs = [train(CASES[name], True), train(CASES[name], True, again_at=2)]
    torch.save({"runs": runs, "tied": tied()}, folder / f"rank{dist.get_rank()}.pt")
    dist.destroy_process_group()
