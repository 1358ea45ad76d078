"""Checks whether a model can be a cut of another: the same modules and settings, except for sizes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from upop.checkpoints.fitting.fit import kept_sizes
from upop.errors import CheckpointError
from upop.pruning import Group, find_prunable

# What training or the machine decides; outputs in evaluation mode do not depend on it.
_FREE_CLASSES = ("Dropout", "DropPath", "Identity", "PatchDropout")
_FREE_VALUES = (
    "training",
    "grad_checkpointing",
    "fused_attn",
    "p",
    "drop_prob",
    "scale_by_keep",
    "inplace",
    "name_or_path",
)
# Attributes in which layers store their sizes.
_WIDTHS = ("in_features", "out_features", "in_channels", "out_channels", "num_features", "embedding_dim", "nx", "nf")


def same_but_for_sizes(model: nn.Module, dense: nn.Module) -> bool:
    """Whether a cut of `dense` can give `model`: the same modules and settings, and tensors of matching shapes."""
    groups = find_prunable(dense).groups
    mine = model.state_dict()
    if list(mine) != list(dense.state_dict()):
        return False
    try:
        kept = kept_sizes(groups, mine, "the model")
    except CheckpointError:
        return False
    # Buffers that are not saved count too: an attention mask, for example.
    shapes = {name: list(value.shape) for name, value in {**dict(model.named_buffers()), **mine}.items()}
    if shapes != cut_shapes(dense, groups, kept):
        return False
    cut: set[tuple[str, str]] = set()
    for group in groups:
        owners = [part.tensor.rpartition(".")[0] for part in group.slices]
        cut |= {(owner, width) for owner in owners for width in _WIDTHS}
        cut |= {(attribute.module, attribute.name.partition("[")[0]) for attribute in group.attributes}
    pairs = zip(model.named_modules(), dense.named_modules(), strict=False)
    return all(
        ours == name and _alike(one, other) and _settings(one, ours, cut) == _settings(other, name, cut)
        for (ours, one), (name, other) in pairs
    )


def cut_shapes(dense: nn.Module, groups: Iterable[Group], kept: Mapping[str, int]) -> dict[str, list[int]]:
    """Return the shapes of a dense model's parameters and buffers after a cut to the given sizes."""
    shapes = {name: list(value.shape) for name, value in {**dict(dense.named_buffers()), **dense.state_dict()}.items()}
    names: dict[int, list[str]] = {}
    for name, tensor in (*dense.named_parameters(remove_duplicate=False), *dense.named_buffers(remove_duplicate=False)):
        names.setdefault(id(tensor), []).append(name)
    aliases = {name: same for same in names.values() for name in same}
    for group in groups:
        for part in group.slices if group.name in kept else ():
            for name in aliases.get(part.tensor, ()):
                if name in shapes:
                    shapes[name][part.dim] = part.length(kept[group.name])
    return shapes


def _alike(one: nn.Module, other: nn.Module) -> bool:
    # A cut may replace the class of a module by one that knows the original.
    names = {getattr(type(each), "uncut_class", type(each)).__name__ for each in (one, other)}
    return len(names) == 1 or names <= set(_FREE_CLASSES)


def _settings(module: nn.Module, name: str, cut: set[tuple[str, str]]) -> dict[str, Any]:
    """Return the plain values that a module stores, without those that a cut changes."""
    if type(module).__name__ in _FREE_CLASSES:
        return {}
    return {
        key: value
        for key, value in vars(module).items()
        if not key.startswith("_")
        and key not in _FREE_VALUES
        and (name, key) not in cut
        and (value is None or isinstance(value, bool | int | float | str | tuple))
    }
