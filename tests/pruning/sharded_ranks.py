"""What each of two processes does that share a model's weights and search it; apart, for a fresh process."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from transformers import GPT2Config, GPT2Model

import upop
from pruning.families import NLVR, VIT, Family, Inputs, _images, _vit, loss_of, outputs_of, rows_of
from pruning.ranks import LIMIT
from upop.errors import LayoutError
from upop.pruning import plan_by_magnitude
from upop.pruning.sharded import is_sharded_tensor

STEPS = 4
POISONED = 1
"""The step that has a gradient which is not finite, in a row that the second process holds."""


class Gpt(nn.Module):
    """transformers' GPT-2: layers whose weights are transposed."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {"n_embd": 24, "n_layer": 2, "n_head": 3, "n_inner": 40, "vocab_size": 60, "n_positions": 12}
        self.gpt = GPT2Model(GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.gpt(input_ids=input_ids, use_cache=False).last_hidden_state


def _encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(24, 3, 40, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def _words(size: int, generator: torch.Generator) -> Inputs:
    return {"input_ids": torch.randint(0, 60, (size, 7), generator=generator)}


def _states(size: int, generator: torch.Generator) -> Inputs:
    return {"src": torch.randn(size, 5, 24, generator=generator)}


@dataclass(frozen=True)
class Case:
    """A model, what of it `fully_shard` is called on besides the whole, and whether masks are there already then."""

    family: Family
    inner: Callable[[Any], list[nn.Module]]
    masks_first: bool = False
    copies: int = 0  # of the sharded model, each over the processes of a node
    settings: Callable[[Inputs], dict[str, Any]] = lambda _inputs: {}


def own_score(weight: Tensor, gradient: Tensor) -> Tensor:
    """A score of one's own, which is no sum: it must see plain, whole rows, and at least one."""
    assert type(weight) is Tensor or type(weight) is nn.Parameter
    assert type(gradient) is Tensor and len(weight)
    return gradient.abs().amax(1) * weight.norm(dim=1)


CASES = {
    # 41 rows are no multiple of two, and an attention is sharded by itself.
    "vit": Case(
        Family("vit", lambda: _vit(mlp_ratio=41 / 24), _images),
        lambda model: [part for block in model.blocks for part in (block.attn, block)],
        settings=lambda inputs: {"cost": "macs", "example": inputs},
    ),
    "nlvr": Case(
        NLVR,
        lambda model: [*model.visual_encoder.blocks, *model.text_encoder.encoder.layer],
        masks_first=True,
        copies=2,
    ),
    # Rows of its weights lie along the dimension that is not sharded.
    "gpt2": Case(
        Family("gpt2", Gpt, _words), lambda model: [*model.gpt.h], settings=lambda _: {"importance": own_score}
    ),
    # Masked modules are sharded by themselves, one of them reads a packed weight itself.
    "torch": Case(
        Family("torch", _encoder, _states),
        lambda model: [part for layer in model.layers for part in (layer.linear1, layer.self_attn, layer)],
        masks_first=True,
        copies=1,
        settings=lambda _: {"importance": own_score},
    ),
}


def spoil(model: nn.Module, pruner: upop.Pruner) -> None:
    """Put a NaN into the last row of a scored gradient."""
    gradient = dict(model.named_parameters())[pruner.groups[0].producers[0].tensor].grad
    assert gradient is not None
    if isinstance(gradient, torch.distributed.tensor.DTensor):
        whole, gradient = len(gradient), gradient.to_local()
        if dist.get_rank() == 0 and len(gradient) < whole:
            return
    gradient[-1, -1] = torch.nan


def steps(model: nn.Module, pruner: upop.Pruner, inputs: Inputs, first: int, last: int) -> None:
    # That a step is not finite, and that GPT-2 returns a view, which nothing changes in place.
    warnings.filterwarnings("ignore", "(.* of .* search steps had gradients|FSDP2-wrapped module)", UserWarning)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    for step in range(first, last):
        optimizer.zero_grad()
        loss_of(model(**inputs)).backward()
        if step == POISONED:
            spoil(model, pruner)
        pruner.step()
        if step != POISONED:
            optimizer.step()


def decided(pruner: upop.Pruner) -> dict[str, Any]:
    return {
        "scores": pruner.scores,
        "masks": pruner.masks,
        "plan": {name: list(kept) for name, kept in pruner.plan().items()},
        "kept": pruner.kept_share(),
        "costs": pruner.costs,
        "skipped": pruner.skipped_steps,
    }


def alone(case: Case) -> dict[str, Any]:
    """Search, shrink and return what came of it, in one process and one piece."""
    model, inputs = case.family.build(), case.family.inputs(4)
    pruner = upop.Pruner(model, 0.5, STEPS, 1, **case.settings(inputs))
    steps(model, pruner, inputs, 0, STEPS)
    found = decided(pruner)
    found["masked"] = outputs_of(model, inputs)
    pruner.shrink(verify=inputs)
    return {**found, "shrunk": outputs_of(model, inputs), "shapes": shapes(model)}


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def refusal(action: Callable[[], Any]) -> str:
    try:
        action()
    except LayoutError as error:
        return str(error)
    return ""


def together(case: Case, folder: Path) -> dict[str, Any]:
    """The same on two processes that share the weights, each with half of the batch."""
    model, everything = case.family.build(), case.family.inputs(4)
    rank = dist.get_rank()
    inputs = rows_of(everything, 4, slice(2 * rank, 2 * rank + 2))
    like = upop.meta_copy(model)
    before = [type(module) for module in model.modules()]

    def make() -> upop.Pruner:
        return upop.Pruner(model, 0.5, STEPS, 1, **case.settings(everything))

    pruner = make() if case.masks_first else None
    names = ("replicate", "shard")
    mesh = init_device_mesh("cpu", (case.copies, 2 // case.copies), mesh_dim_names=names) if case.copies else None
    for module in case.inner(model):
        fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    pruner = pruner or make()
    steps(model, pruner, inputs, 0, 2)
    state = pruner.state_dict()
    pruner.remove()
    classes = [type(module) for module in model.modules()]
    whole = upop.full_copy(model, like)
    found: dict[str, Any] = {"plain": (outputs_of(model, everything), outputs_of(whole, everything))}
    model.reshard()  # after a forward pass alone, for the optimizer must not be given gathered parameters
    pruner = make()  # goes on where the first one was
    pruner.load_state_dict(state)
    steps(model, pruner, inputs, 2, STEPS)
    found |= decided(pruner)
    found["masked"] = outputs_of(model, everything)
    model.reshard()
    found["refused"] = [
        refusal(action)
        for action in (
            lambda: upop.save(model, folder / "saved"),
            lambda: plan_by_magnitude(model, 0.5),
            lambda: upop.full_copy(model, like=model),
        )
    ]
    whole, plan = upop.full_copy(model, like), pruner.plan()
    found["ties"] = len(list(whole.parameters())) == len(list(model.parameters()))
    pruner.move_to(whole)
    found["copy"] = outputs_of(whole, everything)
    pruner.shrink(verify=everything)
    found["shapes"] = shapes(whole)
    found["shrunk"] = outputs_of(whole, everything)
    upop.shrink(model, plan, verify=everything)  # where it is, in its shards
    found["in place"] = outputs_of(model, everything)
    model.reshard()
    found["gathered"] = outputs_of(upop.full_copy(model), everything)
    found["parts"] = all(is_sharded_tensor(part) for part in model.parameters()), shapes(model)
    found["classes"] = all(
        kind is old or (issubclass(kind, FSDPModule) and kind.__bases__[1] is old)
        for kind, old in zip(classes, before, strict=True)
    )
    found["sharded"] = sum(issubclass(kind, FSDPModule) for kind in classes)
    return found


def spread_otherwise() -> dict[str, str]:
    """What is said of FSDP's first version, of frozen shards, and of weights that are cut along both dimensions."""
    model = FullyShardedDataParallel(nn.Sequential(VIT.build()), device_id=torch.device("cpu"), use_orig_params=True)
    found = {"flattened": refusal(lambda: upop.Pruner(model, 0.5, STEPS))}
    plain = VIT.build()
    pruner = upop.Pruner(plain, 0.5, STEPS)
    mesh, layer = init_device_mesh("cpu", (2, 1)), plain.blocks[0].attn.qkv
    weights = [distribute_tensor(layer.weight.detach(), mesh, [Shard(0), Shard(1)]) for _ in range(2)]
    layer.weight = nn.Parameter(weights[0])
    layer.weight.grad = weights[1]
    frozen = VIT.build()
    frozen.blocks[0].mlp.fc1.weight.requires_grad_(False)
    fully_shard(frozen, mesh=init_device_mesh("cpu", (2,)))
    found["frozen"] = refusal(lambda: upop.Pruner(frozen, 0.5, STEPS))
    return {**found, "cut twice": refusal(pruner.step)}


def compress(folder: Path) -> None:
    """Compress a sharded model by the loop of README, each process with its part of the batch."""
    dist.init_process_group("gloo", timeout=LIMIT)
    torch.save(compressed(dist.get_rank(), dist.get_world_size()), folder / f"rank{dist.get_rank()}.pt")
    dist.destroy_process_group()


def compressed(rank: int, processes: int) -> dict[str, Any]:
    """Return what came of a compression, in processes that share the weights, or in a model that none of them shares.

    Args:
        rank: of this process.
        processes: how many share the weights; 0 is a plain model.
    """
    warnings.filterwarnings("ignore", "Converting a tensor with requires_grad", UserWarning)
    model: Any = VIT.build()
    if processes:
        mesh = init_device_mesh("cpu", (processes,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    before = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    compression = upop.Compression(model, 0.5, 9)
    share = 4 // max(processes, 1)
    for step in range(9):
        inputs = {name: each[rank * share : (rank + 1) * share] for name, each in VIT.inputs(4, seed=step).items()}
        compression.loss(loss_of(model(**inputs))).backward()
        compression.step(optimizer)
        optimizer.zero_grad()
    assert compression.finish() is model
    state = {name: optimizer.state[each]["exp_avg"] for name, each in model.named_parameters()}
    return {
        "same": all(before[name] is each for name, each in model.named_parameters()),
        "sharded": {is_sharded_tensor(each) for each in (*before.values(), *state.values())},
        "plan": {name: list(kept) for name, kept in compression.plan().items()},
        "weights": {name: _plain(each) for name, each in model.named_parameters()},
        "moments": {name: _plain(each) for name, each in state.items()},
    }


def _plain(tensor: Tensor) -> Tensor:
    whole: Tensor = tensor.detach()
    return whole.full_tensor() if is_sharded_tensor(whole) else whole  # type: ignore[attr-defined]


def run(folder: Path, names: Collection[str]) -> None:
    """Save what comes of some cases, and what is refused, in each of two processes."""
    dist.init_process_group("gloo", timeout=LIMIT)
    results: dict[str, Any] = {name: together(CASES[name], folder) for name in names if name != "refused"}
    if "refused" in names:
        results["refused"] = spread_otherwise()
    torch.save(results, folder / f"rank{dist.get_rank()}.pt")
    dist.destroy_process_group()
