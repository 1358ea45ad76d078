"""In several processes: three training steps on a shared batch of six; the main process writes what came of them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parents[1]))

from models.test_retrieval import pairs, tiny
from upop.models import retrieval
from upop.models.contrast import gather, own_rows, processes

DRAWN: list[Tensor] = []


def watched(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Remember what is drawn."""
    index, paired = draw_negatives(*arguments)
    DRAWN.append(gather(index))
    return index, paired


draw_negatives = retrieval.draw_negatives
retrieval.draw_negatives = watched


def main() -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    size = 6 // processes()
    model = tiny(queue_size=16).double().train()
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.SGD([part for part in model.parameters() if part.requires_grad], lr=0.05)
    torch.manual_seed(11)
    losses = []
    for step in range(3):
        batch = pairs(6, ids=[0, 1, 2, 2, 3, 4 + step], seed=step)
        batch["images"] = batch["images"].double()
        own: dict[str, Any] = {name: part[own_rows(size)] for name, part in batch.items()}
        # Each process pads to its own longest text.
        longest = int(own["attention_mask"].sum(1).max())
        own |= {name: own[name][:, :longest] for name in ("input_ids", "attention_mask")}
        found = wrapped(**own, alpha=0.4)
        optimizer.zero_grad()
        (found.contrastive + found.matching).backward()
        optimizer.step()
        losses.append(gather(torch.stack([part.detach() for part in found]).unsqueeze(0)).mean(0))
    if dist.get_rank() == 0:
        drawn = torch.stack(DRAWN).view(3, 2, 6)
        torch.save({"state": model.state_dict(), "drawn": drawn, "losses": torch.stack(losses)}, sys.argv[1])
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
