"""Fitting a model to a file: kept sizes are read off the shapes, keys are compared, weights are put in."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor, nn

from upop.errors import CheckpointError, UPopError
from upop.pruning import Plan, Unit, shrink, survey


def kept_sizes(units: Sequence[Unit], state: Mapping[str, Tensor], source: str) -> dict[str, int]:
    """Return the number of kept entries of every unit, as the shapes in `state` tell it.

    Raises:
        CheckpointError: a size is no whole number of entries, or larger than the dense model's.
    """
    sizes = {}
    for unit in units:
        part = unit.producers[0]
        if part.tensor not in state:
            continue
        shape = state[part.tensor].shape
        rows = shape[part.dim] if part.dim < len(shape) else 0
        kept, rest = divmod(rows, part.length(1))
        if rest or not 0 < kept <= unit.size:
            raise CheckpointError(
                f"{source}: {part.tensor} has {rows} rows, which is no number of entries between 1 and {unit.size} "
                f"for {unit.heads} heads. Was it made for a model of other sizes?"
            )
        sizes[unit.name] = kept
    return sizes


def fit(model: nn.Module, state: Mapping[str, Tensor], source: str, fixed_scale: Callable[[Unit], bool]) -> nn.Module:
    """Shrink `model` to the shapes of a published state dict, and put the weights in.

    Args:
        model: the dense model.
        state: the tensors, under the model's names.
        source: where they come from, for messages.
        fixed_scale: says of which attention units the published code keeps the softmax scale of the dense model
            when they are compressed; their queries are folded so that the natural scale computes the same.

    Raises:
        CheckpointError: keys or shapes do not fit; they are listed.
    """
    units = survey(model).units
    sizes = kept_sizes(units, state, source)
    compressed = {unit.name: range(sizes[unit.name]) for unit in units if sizes.get(unit.name, unit.size) < unit.size}
    if compressed:
        shrink(model, Plan.of(list(units), compressed), fold=False)
    load_strictly(model, state, source)
    for unit in units:
        if unit.name in compressed and fixed_scale(unit):
            scale_queries(model, unit, sizes[unit.name], math.sqrt(sizes[unit.name] / unit.size))
    return model


@torch.no_grad()
def scale_queries(model: nn.Module, unit: Unit, kept: int, factor: float) -> None:
    """Multiply the query rows and biases of an attention unit, as it stands with `kept` entries, by `factor`."""
    for part in unit.slices:
        if part.query_groups:
            model.get_parameter(part.tensor).narrow(part.dim, 0, part.query_rows(kept)).mul_(factor)


def load_strictly(
    model: nn.Module,
    state: Mapping[str, Tensor],
    source: str,
    may_miss: Callable[[str], bool] = lambda _key: False,
) -> list[str]:
    """Copy `state` into `model`; return the keys that were missing and may be.

    Raises:
        CheckpointError: keys are missing or unknown, shapes differ, or numbers are not finite; nothing was copied.
    """
    mine = model.state_dict()
    missing = [key for key in mine if key not in state]
    problems = [f"missing {key}" for key in missing if not may_miss(key)]
    problems += [f"unknown {key}" for key in state if key not in mine]
    wrong = {key: _misfit(state[key], mine[key]) for key in mine if key in state}
    problems += [f"{key} {problem}" for key, problem in wrong.items() if problem]
    if problems:
        more = f"\n  ... and {len(problems) - 12} more" if len(problems) > 12 else ""
        raise CheckpointError(
            f"{source} does not fit {type(model).__name__} ({len(problems)} of {len(mine)} keys):\n  "
            + "\n  ".join(problems[:12])
            + more
        )
    model.load_state_dict(dict(state), strict=False)
    return missing


@contextmanager
def expecting_shapes(source: str) -> Iterator[None]:
    """Make what tensors of unexpected shapes raise a CheckpointError."""
    try:
        yield
    except (ValidationError, UPopError):
        raise
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{source} holds tensors of shapes that no model of this task has: {error}. Was it damaged, or made by "
            "another program?"
        ) from error


def _misfit(found: Tensor, mine: Tensor) -> str:
    """Say why a tensor cannot take the place of the model's own; nothing if it can."""
    if found.shape != mine.shape:
        return f"has shape {tuple(found.shape)}, the model {tuple(mine.shape)}"
    if mine.is_floating_point() and not found.is_floating_point():
        return f"holds {found.dtype} numbers, the model {mine.dtype}"
    if mine.is_floating_point() and not found.isfinite().all():
        return "holds numbers that are not finite, so the model would compute nothing. Was its training ended by them?"
    return ""


def resize_positions(positions: Tensor, tokens: int) -> Tensor:
    """Resize position embeddings [1, k + n*n, width] of a square grid to [1, tokens, width], bicubically.

    The first k tokens (the class token, a distillation token) stay as they are.
    """
    if positions.shape[1] == tokens:
        return positions
    old = math.isqrt(positions.shape[1])
    first = positions.shape[1] - old**2
    new = math.isqrt(tokens - first)
    grid = positions[:, first:].reshape(1, old, old, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
    return torch.cat([positions[:, :first], grid.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)
