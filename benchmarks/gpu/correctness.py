"""Whether cut models compute what masked ones do on this device, in every precision, compiled, and across devices."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gpu.models import Batch, Model
from gpu.sections import Measurement
from random_cut import attention_kernel
from upop.pruning import Pruner, find_groups, shrink
from upop.pruning.groups import Group, tensor_of

SAYS = """Every group keeps another number of channels. *Cut* is how far the outputs of the cut model lie from those of
the dense model with the rows of what goes set to 0, in float32 on the CPU, as a share of the largest output; *dense*
is how far the dense model on this device lies from itself on the CPU, which is the precision's own rounding.
*Compiled* is the cut model under torch.compile beside itself."""
KERNELS_SAY = """DeiT-S, all heads cut to so many dimensions of 64; *kernel* is the attention that torch chose."""
RESUMED_SAYS = """A search stopped half-way on one device that goes on on another: how many of its channels are kept as
by the search that stayed, and whether the cut that follows was verified."""
DTYPES = ("float32", "bfloat16", "float16")
_KEPT = (64, 56, 48, 40, 33, 32, 24, 16)


def agreements(models: Mapping[str, Model], device: torch.device, compiled: bool) -> Iterator[Measurement]:
    """Yield, for every model and precision, what compares the cut model with the masked one."""
    for name, model in models.items():
        for dtype in DTYPES:
            yield (
                {"model": name, "precision": dtype},
                partial(agreement, model, device, getattr(torch, dtype), compiled and dtype == "bfloat16"),
            )


@torch.no_grad()
def agreement(model: Model, device: torch.device, dtype: torch.dtype, compiled: bool) -> dict[str, Any]:
    """Return how far a cut model lies from the masked one, and the dense model from itself on the CPU."""
    torch.manual_seed(0)
    dense = model.build().eval()
    inputs = model.batch(2, torch.device("cpu"))
    groups = find_groups(dense)
    kept = {
        group.name: list(range(number % 2, group.size, 1 + (number % 3 > 0))) for number, group in enumerate(groups)
    }
    masked = copy.deepcopy(dense)
    for group in groups:
        _silence(masked, group, kept[group.name])
    small = shrink(copy.deepcopy(dense), kept, verify=None).to(device, dtype)
    here = {key: value.to(device, dtype if value.is_floating_point() else None) for key, value in inputs.items()}
    expected, exact = _outputs(masked, inputs), _outputs(dense, inputs)
    found = _outputs(small, here)
    row = {
        "dense": _apart(exact, _outputs(dense.to(device, dtype), here)),
        "cut": _apart(expected, found),
        "attention": attention_kernel(small, here),
    }
    if compiled:
        row["compiled"] = _apart(found, _outputs(torch.compile(small), here))
    return row


def kernels(model: Model, device: torch.device, dtype: torch.dtype) -> Iterator[Measurement]:
    """Yield, for head sizes, what finds the attention kernel that a cut model runs."""
    for kept in _KEPT:
        yield {"dimensions": kept}, partial(_kernel, model, kept, device, dtype)


def _kernel(model: Model, kept: int, device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    dense = model.build().eval()
    plan = {
        group.name: range(max(1, group.size * kept // 64)) for group in find_groups(dense) if group.kind == "attention"
    }
    small = shrink(dense, plan, verify=None).to(device, dtype)
    return {"kernel": attention_kernel(small, model.batch(2, device, dtype))}


def resumed(model: Model, device: torch.device) -> Iterator[Measurement]:
    """Yield searches that resume on another device."""
    cpu = torch.device("cpu")
    for first, second in ((cpu, device), (device, cpu)):
        yield (
            {"from": first.type, "to": second.type},
            partial(_resume, model, first, second),
        )


def _resume(model: Model, first: torch.device, second: torch.device) -> dict[str, Any]:
    torch.manual_seed(0)
    dense = model.build()
    batches = [model.batch(4, torch.device("cpu")) for _ in range(8)]
    stayed = copy.deepcopy(dense).to(first)
    whole = Pruner(stayed, ratio=0.5, steps=8, interval=4)
    _search(stayed, whole, batches, first)
    moved = copy.deepcopy(dense).to(first)
    begun = Pruner(moved, ratio=0.5, steps=8, interval=4)
    _search(moved, begun, batches[:3], first)
    state = begun.state_dict()
    begun.remove()
    weights = {name: value.to(second) for name, value in moved.state_dict().items()}
    resumed = copy.deepcopy(dense).to(second)
    resumed.load_state_dict(weights)
    search = Pruner(resumed, ratio=0.5, steps=8, interval=4)
    search.load_state_dict(state)
    _search(resumed, search, batches[3:], second)
    mine, theirs = search.plan(), whole.plan()
    same = sum(len(set(mine[name]) & set(theirs[name])) for name in theirs)
    search.shrink(verify=model.batch(2, second))
    return {"kept alike": same / sum(map(len, theirs.values())), "verified": "yes"}


def _search(model: nn.Module, pruner: Pruner, batches: list[Batch], device: torch.device) -> None:
    for batch in batches:
        outputs = _outputs(model, {key: value.to(device) for key, value in batch.items()})
        torch.stack([output.float().square().mean() for output in outputs]).sum().backward()
        pruner.step()
        model.zero_grad()


def _silence(model: nn.Module, group: Group, kept: list[int]) -> None:
    """Set the rows that produce pruned channels to 0."""
    mask = torch.zeros(group.size)
    mask[kept] = 1
    for part in group.producers:
        tensor = tensor_of(model, part.tensor)
        shape = [-1 if dim == part.dim % tensor.dim() else 1 for dim in range(tensor.dim())]
        tensor.mul_(part.expand(mask).view(shape))


def _outputs(model: Any, inputs: Batch) -> list[Tensor]:
    found = model(**inputs)
    values = found if isinstance(found, tuple) else [found] if isinstance(found, Tensor) else list(found.values())
    return [value for value in values if isinstance(value, Tensor)]


def _apart(expected: list[Tensor], found: list[Tensor]) -> float:
    """Return the largest difference as a share of the largest output."""
    return max(
        float((one.cpu().float() - other.cpu().float()).abs().max() / one.cpu().float().abs().max())
        for one, other in zip(expected, found, strict=True)
    )
