"""Chooses the groups to prune, by patterns, and checks that their weights can be scored."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Sequence
from numbers import Real
from typing import Literal, TypeGuard

from torch import nn

from upop.pruning.errors import LayoutError, SettingError, nearest, some_of
from upop.pruning.groups import Group, tensor_of
from upop.pruning.sharded import is_sharded_tensor


def chosen(
    groups: list[Group],
    include: str | Sequence[str] | None,
    exclude: str | Sequence[str] | None,
    *,
    depth: bool = False,
) -> list[Group]:
    """Return the groups that `include` matches (None matches all) and `exclude` does not.

    Groups of one channel (attention whose heads all share keys and values) count only if they may be pruned whole
    (`depth`).

    Raises:
        SettingError: a pattern matches nothing, or no group remains.
    """
    groups = [
        group for group in groups if group.size > (not depth)
    ]  # nothing of the others can go: no part of a budget
    if not groups:
        raise SettingError(
            "Every group of the model has only one channel (one group of heads that share keys and values), and the "
            "last channel of a group cannot be pruned."
        )
    names = [group.name for group in groups]
    keep = set(_matches(names, include, "include")) if include is not None else set(names)
    keep -= set(_matches(names, exclude, "exclude")) if exclude is not None else set()
    if not keep:
        raise SettingError(f"include={include!r} and exclude={exclude!r} leave none of the {len(names)} groups.")
    return [group for group in groups if group.name in keep]


def check_correct(correct: object) -> bool | Literal["auto"]:
    """Validate `correct`: whether layers are corrected, and with how much memory.

    Raises:
        SettingError: it is something else.
    """
    if isinstance(correct, bool):
        return correct
    if correct != "auto":
        raise SettingError(f'correct is True, False or "auto"; found {correct!r}.')
    return "auto"


def refuse_unscored(model: nn.Module, groups: list[Group]) -> None:
    """Raise a `LayoutError` if a group's weights can get no gradient, or are missing."""
    if any(tensor_of(model, part.tensor).is_meta for group in groups for part in group.producers):
        raise LayoutError(
            f"{type(model).__name__} is on the meta device and has no weights to score. Load its weights first."
        )
    if any(tensor_of(model, part.tensor).is_inference() for group in groups for part in group.producers):
        raise LayoutError(
            f"{type(model).__name__} was built in torch.inference_mode(), and its weights get no gradient. Use a copy "
            "made outside of it: copy.deepcopy(model)."
        )


def refuse_frozen(model: nn.Module, groups: list[Group]) -> None:
    """Raise a `LayoutError` if a group cannot be scored, or training would not repair it: all producers are frozen."""
    refuse_unscored(model, groups)
    frozen = []
    for group in groups:
        enough = all if group.kind == "residual" else any  # a stream is scored by all that reads it
        if not enough(tensor_of(model, part.tensor).requires_grad for part in group.scored):
            frozen.append(group.name)
    if frozen:
        raise LayoutError(
            f"{len(frozen)} groups have frozen weights, which training cannot repair after a cut "
            f"({some_of(frozen)}). Set requires_grad on them, give them adapters, exclude them, or prune without "
            "training: upop.calibrate(model, batches, ...)."
        )
    refuse_half_scored(model, groups)


def refuse_half_scored(model: nn.Module, groups: list[Group]) -> None:
    """Raise a `LayoutError` if frozen weights beside trained ones are sharded, where nobody sees their gradients."""
    frozen = [
        group.name
        for group in groups
        for tensor in (tensor_of(model, part.tensor) for part in group.producers)
        if tensor.dim() > 1 and not tensor.requires_grad and is_sharded_tensor(tensor)
    ]
    if frozen:
        raise LayoutError(
            f"{len(set(frozen))} groups have frozen weights beside trained ones "
            f"({some_of(list(dict.fromkeys(frozen)))}), and fully_shard shards them: the adapters alone would rank "
            "their channels by noise. Set requires_grad on them, keep the model whole in each process "
            "(DistributedDataParallel), or prune it first: upop.calibrate(model, batches, ...)."
        )


def check_whole(name: str, value: object) -> int:
    """Validate a setting that must be an integer of at least 1.

    Raises:
        SettingError: it is something else.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        whole = isinstance(value, float) and value.is_integer() and value >= 1
        more = f": write {int(value)}" if whole else ""  # type: ignore[call-overload]
        raise SettingError(f"{name} must be a whole number of at least 1; found {value!r}{more}.")
    return value


def check_ratio(value: object) -> float:
    """Validate a ratio; return it as a float.

    Raises:
        SettingError: it is not strictly between 0 and 1; for "50%", 50 and "2x" the message says what to write.
    """
    if is_ratio(value):
        return float(value)
    raise SettingError(
        f"ratio is the share of the cost to remove, strictly between 0 and 1; found {value!r}{meant(value)}."
    )


def is_ratio(value: object) -> TypeGuard[float]:
    """Whether a value is a number strictly between 0 and 1."""
    return isinstance(value, Real) and not isinstance(value, bool) and 0 < float(value) < 1


def meant(value: object) -> str:
    """Return a hint for a ratio in another form, as the end of a sentence: ": write 0.5 for 50 %"."""
    written = re.fullmatch(r"\s*(\d*[.,]?\d+)\s*(%|percent|[xX])?\s*", str(value))
    if isinstance(value, bool) or written is None:
        return ""
    size, group = float(written[1].replace(",", ".")), (written[2] or "").lower()
    shares = {}
    if group != "x" and (group or size > 1) and 0 < size < 100:
        shares[f"{size:g} %"] = size / 100
    if group in ("", "x") and 1 < size <= (100 if group else 10):
        shares[f"{size:g}x smaller"] = 1 - 1 / size
    if not shares and 0 < size < 1:
        return f": write {size:g}"
    return ": write " + " or ".join(f"{share:.3g} for {what}" for what, share in shares.items()) if shares else ""


def _matches(names: list[str], patterns: str | Sequence[str], setting: str) -> list[str]:
    listed = [patterns] if isinstance(patterns, str) else patterns
    if not isinstance(listed, Iterable) or not all(isinstance(pattern, str) for pattern in listed):
        raise SettingError(f"{setting} takes a name or a pattern of groups, or a list of them; found {patterns!r}.")
    found: list[str] = []
    for pattern in listed:
        matched = fnmatch.filter(names, pattern)
        if not matched:
            raise SettingError(
                f"{setting} names {pattern!r}, which matches none of the {len(names)} groups"
                f"{nearest(pattern, names)}. upop.find_groups(model) lists them."
            )
        found += matched
    return found
