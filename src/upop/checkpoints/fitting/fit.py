"""Fits a model to a file: infers kept sizes from shapes, compares keys, and copies weights."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor, nn

from upop.checkpoints.fitting.meta import empty_model, materialize, meta_model
from upop.checkpoints.fitting.recorded_groups import groups_if_read
from upop.errors import CheckpointError, UPopError
from upop.pruning import Group, Plan, Prunable, Skipped, find_prunable, remember
from upop.pruning.groups import Slice
from upop.pruning.shrink import apply_plan

_Shared = dict[tuple[str, int], list[tuple[Group, Slice]]]
"""(tensor, dimension) -> the groups that are cut along it, and their slices."""


def _sharing(groups: Sequence[Group]) -> _Shared:
    found: _Shared = {}
    for group in groups:
        for part in group.online:
            found.setdefault((part.tensor, part.dim), []).append((group, part))
    return found


def _rows(state: Mapping[str, Tensor], part: Slice) -> int:
    shape = state[part.tensor].shape
    return shape[part.dim] if part.dim < len(shape) else 0


def _apart(group: Group, beside: list[tuple[Group, Slice]], shared: _Shared, state: Mapping[str, Tensor]) -> int:
    """Return the kept size of a group that shares tensors with others, if their shapes determine it; else -1."""
    names = [each.name for each, _ in beside]
    left, right = [], []
    for parts in shared.values():
        if not {each.name for each, _ in parts} <= set(names) or parts[0][1].tensor not in state:
            continue
        counts = [0.0] * len(names)
        for each, part in parts:
            counts[names.index(each.name)] += sum(part.inners)
        pruned = parts[0][1].length(parts[0][0].size) - _rows(state, parts[0][1])
        left.append(counts)
        right.append(float(pruned))
    solved = torch.linalg.lstsq(torch.tensor(left).double(), torch.tensor(right).double()[:, None])
    pruned_of = solved.solution.flatten().round()
    described = bool((torch.tensor(left).double() @ pruned_of == torch.tensor(right).double()).all())
    enough = int(torch.linalg.matrix_rank(torch.tensor(left).double())) == len(names)
    return group.size - int(pruned_of[names.index(group.name)]) if described and enough else -1


def kept_sizes(groups: Sequence[Group], state: Mapping[str, Tensor], source: str) -> dict[str, int]:
    """Infer the number of kept channels of every group from the shapes in `state`.

    Raises:
        CheckpointError: a size is no multiple of a channel, or larger than in the dense model.
    """
    shared = _sharing(groups)
    sizes = {}
    for group in groups:
        part = group.producers[0]
        if part.tensor not in state:
            continue
        rows = _rows(state, part)
        beside = shared[part.tensor, part.dim]
        if len(beside) > 1:  # the rows of other groups are gaps in this one's
            kept, rest = _apart(group, beside, shared, state), 0
        else:
            kept, rest = divmod(rows - sum(part.gaps), sum(part.inners))
        if rest or not 0 <= kept <= group.size:
            raise CheckpointError(
                f"{source}: {part.tensor} has {rows} rows, which is no number of channels up to {group.size} "
                f"for {group.heads} heads. Was it made for a model of other sizes?"
            )
        sizes[group.name] = kept
    return sizes


def fit(
    model: nn.Module,
    state: Mapping[str, Tensor],
    source: str,
    fixed_scale: Callable[[Group], bool],
    *,
    strict: bool = True,
) -> nn.Module:
    """Shrink `model` to the shapes of a published state dict, and load the weights.

    Args:
        model: the dense model.
        state: the tensors, under the model's names.
        source: their origin, for messages.
        fixed_scale: whether the published code keeps the dense softmax scale of a compressed attention group; its
            its queries are then rescaled, so that the scale of the kept head_dim gives the same outputs.
        strict: False warns of misfits, and keeps the model's own values there.

    Raises:
        CheckpointError: keys or shapes do not fit; they are listed.
    """
    groups, sizes = cut_to_fit(model, state, source)
    materialize(model)
    fitting = compare(model, state, source, strict=strict)
    model.load_state_dict(fitting, strict=False)
    for group in groups:
        if 0 < sizes.get(group.name, 0) < group.size and fixed_scale(group):
            scale_queries(model, group, sizes[group.name], math.sqrt(sizes[group.name] / group.size))
    return model


def fitted(build: Callable[[], nn.Module], state: Mapping[str, Tensor], source: str, *, strict: bool) -> nn.Module:
    """Build a model of a library and load its weights, in their precision; return it in evaluation mode.

    The description is compared with the weights before memory is allocated.

    Args:
        build: builds the model, as its library describes it.
        state: its tensors.
        source: their origin, for messages.
        strict: False warns of misfits.

    Raises:
        CheckpointError: names or shapes do not fit; misfits are listed.
    """
    model = as_precise(build_to_fit(build, state, source, strict=strict), state)
    return fit(model, state, source, lambda _group: False, strict=strict).eval()


def build_to_fit(
    build: Callable[[], nn.Module],
    state: Mapping[str, Tensor],
    source: str,
    *,
    dense: Mapping[str, int] | None = None,
    strict: bool = True,
) -> nn.Module:
    """Build the dense model for `fit` with tensors of these names and shapes.

    It is first built on the meta device and compared with the shapes. If all fit, parameters are allocated only after
    `fit` has cut them, so that a model never takes more memory than its file.

    Args:
        build: builds the dense model.
        state: its tensors, possibly on the meta device.
        source: their origin, for messages.
        dense: group -> its dense size, where known.
        strict: False allows parts without tensors.

    Raises:
        CheckpointError: names or shapes do not fit, or unsaved buffers would be larger than the weights.
    """
    meta = meta_model(build, len(state), source)
    _check_beside(meta, state, source)
    groups = groups_if_read(meta)
    skipped = find_prunable(meta).skipped if groups else ()
    cut_to_fit(meta, state, source)
    for group in groups:
        size = (dense or {}).get(group.name, group.size)
        if size != group.size:
            raise CheckpointError(
                f"{source} describes a model with {group.size} channels in {group.name}, and records {size} before "
                "the cut. Was it damaged? Fetch or write it again."
            )
    known = meta.state_dict()
    if strict:
        compare(meta, state, source)
    if strict or all(name in state and state[name].shape == value.shape for name, value in known.items()):
        return _read_as(empty_model(build, len(state), source), groups, skipped)
    held, asked = (sum(value.numel() for value in tensors.values()) for tensors in (state, known))
    if asked > AT_MOST * held + BESIDE:
        raise CheckpointError(
            f"{source} describes a model of {asked:,} elements, and holds {held:,}: too few for a model with some "
            "weights missing."
        )
    return _read_as(build(), groups, skipped)


def _read_as(model: nn.Module, groups: Sequence[Group], skipped: Sequence[Skipped]) -> nn.Module:
    """Reuse the groups of a meta copy for a model; return the model."""
    if groups:
        remember(model, Prunable(tuple(groups), tuple(skipped)))
    return model


_LONGEST_LINE = 300
AT_MOST, BESIDE = 4, 2**24
"""Elements that a model may have relative to its file, and on top: missing weights, and buffers that are not saved."""


def _check_beside(meta: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Refuse unsaved buffers, such as attention masks, whose sizes the weights do not determine."""
    saved = meta.state_dict()
    beside = {name: buffer for name, buffer in meta.named_buffers() if name not in saved}
    held = sum(value.numel() for value in state.values())
    if sum(buffer.numel() for buffer in beside.values()) > AT_MOST * held + BESIDE:
        name, buffer = max(beside.items(), key=lambda each: each[1].numel())
        raise CheckpointError(
            f"{source} describes a model whose {name} alone has shape {tuple(buffer.shape)}, and its weights have "
            f"{held:,} elements. Was it damaged? Fetch or write it again."
        )


def cut_to_fit(model: nn.Module, state: Mapping[str, Tensor], source: str) -> tuple[Sequence[Group], dict[str, int]]:
    """Cut a dense model to the shapes of `state`; return its dense groups and their kept sizes."""
    groups = groups_if_read(model)
    sizes = kept_sizes(groups, state, source)
    compressed = {
        group.name: range(sizes[group.name]) for group in groups if sizes.get(group.name, group.size) < group.size
    }
    if compressed:
        apply_plan(model, Plan.of(list(groups), compressed), fold=False)
    return groups, sizes


@torch.no_grad()
def scale_queries(model: nn.Module, group: Group, kept: int, factor: float) -> None:
    """Multiply the query rows and biases of an attention group of `kept` channels by `factor`."""
    for part in group.slices:
        tensor = model.get_parameter(part.tensor)
        rows = part.query_rows(kept).to(tensor.device)
        tensor.index_copy_(part.dim, rows, tensor.index_select(part.dim, rows) * factor)


def load_strictly(
    model: nn.Module,
    state: Mapping[str, Tensor],
    source: str,
    may_miss: Callable[[str], bool] = lambda _key: False,
) -> list[str]:
    """Copy `state` into `model`; return the missing optional keys.

    Raises:
        CheckpointError: keys are missing or unknown, shapes differ, or numbers are not finite; nothing was copied.
    """
    missing = [key for key in model.state_dict() if key not in state]
    model.load_state_dict(compare(model, state, source, may_miss), strict=False)
    return missing


def compare(
    model: nn.Module,
    state: Mapping[str, Tensor],
    source: str,
    may_miss: Callable[[str], bool] = lambda _key: False,
    *,
    strict: bool = True,
) -> dict[str, Tensor]:
    """Return the tensors of `state` that fit `model`; with `strict=False`, misfits cause warnings.

    Args:
        model: cut to the sizes in `state`.
        state: the tensors; values of meta tensors are not checked.
        source: its origin, for messages.
        may_miss: whether a key of the model is optional.
        strict: whether misfits are errors.

    Raises:
        CheckpointError: keys are missing or unknown, shapes differ, or numbers are not finite; they are listed.
    """
    mine = model.state_dict()
    problems = [f"missing {key}" for key in mine if key not in state and not may_miss(key)]
    problems += [f"unknown {key}" for key in state if key not in mine]
    shapes = {key: _misfit(state[key], mine[key]) for key in mine if key in state}
    numbers = {key: not_finite(state[key]) for key in mine if key in state and not shapes[key]}
    problems += [f"{key} {problem}" for key, problem in {**shapes, **numbers}.items() if problem]
    if problems:
        message = listed(f"{source} does not fit {type(model).__name__} ({len(problems)} misfits)", problems)
        if strict:
            raise CheckpointError(message)
        warnings.warn(message, stacklevel=4)
    return {key: value for key, value in state.items() if key in mine and not shapes[key]}


def listed(heading: str, problems: Sequence[str]) -> str:
    """Return a heading and the first problems, one per line."""
    more = f"\n  ... and {len(problems) - 12} more" if len(problems) > 12 else ""
    lines = [line if line.isprintable() else ascii(line)[1:-1] for line in problems[:12]]  # names are a file's own
    return f"{heading}:\n  " + "\n  ".join(line[:_LONGEST_LINE] for line in lines) + more


@contextmanager
def expecting_shapes(source: str) -> Iterator[None]:
    """Turn errors from unexpected tensor shapes into a CheckpointError."""
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
    """Return why a tensor cannot replace the model's own; "" if it can."""
    if found.shape != mine.shape:
        return f"has shape {tuple(found.shape)}, the model {tuple(mine.shape)}"
    if mine.is_floating_point() and not found.is_floating_point():
        return "holds no floating-point numbers, and the model's are"
    return ""


def not_finite(found: Tensor) -> str:
    """Return a message if a tensor holds NaN or infinite numbers; else ""."""
    if found.is_meta or not found.is_floating_point() or found.isfinite().all():
        return ""
    return "holds numbers that are not finite, so the model would compute nothing. Was its training ended by them?"


def resize_positions(positions: Tensor, tokens: int) -> Tensor:
    """Resize position embeddings [1, k + n*n, hidden] of a square grid to [1, tokens, hidden], bicubically.

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


def as_precise(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """Convert a model to the precision of a state dict, tensor by tensor."""
    found = {value.dtype for value in state.values() if value.is_floating_point()}
    if len(found) == 1:
        return model.to(dtype=found.pop())  # buffers that are not saved too
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name in state:
            tensor.data = tensor.data.to(state[name].dtype)
    return model
