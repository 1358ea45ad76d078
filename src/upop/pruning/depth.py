"""Depth: whole branches, and whole layers of a tower, are pruned in the same ranking and budget as channels.

A branch (an attention, an MLP) that is pruned whole outputs its last bias and costs nothing else. Its loss is the
summed loss of its channels. Its saving is their cost, plus, for latency, the fixed time of a branch of any size.
Branches are ranked by loss per saving.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from upop.pruning.costs import call, evaluating
from upop.pruning.errors import LayoutError, SettingError
from upop.pruning.groups import Group
from upop.pruning.shrink import cut, restore


@dataclass(frozen=True)
class Depth:
    """Which branches may be pruned whole, and what each saves.

    Attributes:
        branches: names of groups that are pruned together -> cost that this saves beside that of their channels.
        channel: group -> what one of its channels costs, as `branches` counts.
    """

    branches: Mapping[tuple[str, ...], float] = field(default_factory=dict)
    channel: Mapping[str, float] = field(default_factory=dict)

    def __bool__(self) -> bool:
        """Whether any branch may be pruned whole."""
        return bool(self.branches)

    def score(self, names: Sequence[str], scores: Mapping[str, Tensor]) -> float:
        """Return the score of groups that are pruned together, comparable with that of one channel.

        Args:
            names: names of the groups.
            scores: per group, [size]; infinite for channels that are already pruned.
        """
        left = {name: scores[name][scores[name] < math.inf] for name in names}
        costs = sum(self.channel[name] * len(each) for name, each in left.items())
        if not costs:
            return math.inf
        lost = sum(self.channel[name] * float(each.sum()) for name, each in left.items())
        # What is better gone is no better for what goes beside it.
        return lost / (costs + (self.branches[tuple(names)] if lost < 0 else 0.0))

    def with_rest(self, group: Group, ordered: Tensor, sizes: list[int], means: Tensor) -> tuple[list[int], Tensor]:
        """Return the blocks of a group that may be pruned whole; the last block holds all remaining channels.

        The loss per saving never rises from one block to the next (lower convex hull): single blocks end where
        pruning all remaining channels at once loses least.

        Args:
            group: the group.
            ordered: the scores of its channels, highest first, [size].
            sizes: channels per prunable block, in pruning order.
            means: the mean score of each of these blocks.
        """
        starts = [0, *torch.tensor(sizes, dtype=torch.long).cumsum(0).tolist()]
        rests = [self.score((group.name,), {group.name: ordered[start:]}) for start in starts]
        # Where some of what would go has gone already, it goes before all that is left.
        first = next((at for at, start in enumerate(starts) if bool((ordered[start:] < math.inf).all())), len(sizes))
        end = min(range(first, len(starts)), key=rests.__getitem__)
        last = min(rests[end], float(means[end - 1])) if end else rests[end]
        return [*sizes[:end], group.size - starts[end]], torch.cat([means[:end], means.new_tensor([last])])


NONE = Depth()


def check_depth(depth: object, progress: str = "stages") -> bool:
    """Return whether branches may be pruned whole.

    Raises:
        SettingError: it is not a bool, or the search is soft, which standardises kinds of groups separately.
    """
    if not isinstance(depth, bool):
        raise SettingError(f"depth is True (prune whole branches and layers) or False; found {depth!r}.")
    if depth and progress == "soft":
        raise SettingError(
            'depth=True needs a search in stages: a "soft" search ranks attention and MLPs separately, which leaves no '
            'place for whole branches. Set progress="stages", the default.'
        )
    return depth


def branches_of(
    model: nn.Module,
    groups: Sequence[Group],
    examples: Iterable[Any],
    layers: Mapping[str, tuple[str, ...]] | None = None,
) -> list[tuple[str, ...]]:
    """Return the names of groups that may be pruned whole, together.

    Args:
        model: the dense model.
        groups: the groups that are searched.
        examples: possible inputs.
        layers: layer path -> its groups, if only whole layers may be pruned.

    Raises:
        SettingError: no branch can be pruned whole; the message says why.
    """
    given = list(examples)
    found = removable(model, groups, given)
    if layers is None:
        return [(group.name,) for group in groups if group.name in found]
    may = {path: layer for path, layer in layers.items() if found.issuperset(layer)}
    passing = layers_passing(model, groups, may, given) if may else []
    if not passing:
        why = (
            "the configuration of {} counts no layers that would be left with nothing"
            if not may
            else "layers of {} change what passes them without all that can be cut: norms behind branches do, and "
            "attention whose heads stay"
        )
        warnings.warn(
            f"depth=True with uniform='tower' prunes no whole layer: {why.format(type(model).__name__)}. Without "
            "uniform, it may prune branches.",
            stacklevel=7,
        )
    return passing


def layers_passing(
    model: nn.Module, groups: Sequence[Group], layers: Mapping[str, tuple[str, ...]], examples: Iterable[Any]
) -> list[tuple[str, ...]]:
    """Return the layers that add at most a constant to their input once their groups are empty.

    Args:
        model: the dense model, without masks.
        groups: its groups.
        layers: layer path -> names of its groups.
        examples: possible inputs; the first that runs is used.
    """
    from upop.pruning.masks import Masks

    inside = {name for layer in layers.values() for name in layer}
    masks = Masks(model, [group for group in groups if group.name in inside])
    try:
        masks.set({name: torch.zeros_like(mask) for name, mask in masks.values.items()})
        added = constants(model, list(layers), examples)
    finally:
        masks.remove()
    return [layer for path, layer in layers.items() if added.get(path) is not None]


@torch.no_grad()
def constants(model: nn.Module, paths: Sequence[str], examples: Iterable[Any]) -> dict[str, Tensor | None]:
    """Return the constant vector that each module adds to its input tokens; None if it is not constant.

    Args:
        model: run in evaluation mode.
        paths: of modules whose first input and first output are tokens, [..., hidden].
        examples: possible inputs; the first that runs is used.
    """
    seen: dict[str, Tensor | None] = {}

    def recorder(path: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            given = args[0] if args else next(iter(kwargs.values()), None)
            made = output[0] if isinstance(output, tuple) and output else output
            if isinstance(given, Tensor) and isinstance(made, Tensor) and given.shape == made.shape:
                change = (made.double() - given.double()).flatten(0, -2)
                size = max(1.0, float(given.abs().max())) * torch.finfo(given.dtype).eps
                found = change.mean(0)
                same = bool(((change - found).abs() <= 16 * size).all())
                before = seen.get(path, found)
                seen[path] = (
                    found if same and before is not None and torch.allclose(before, found, atol=16 * size) else None
                )
            else:
                seen[path] = None

        return hook

    for example in examples:
        seen.clear()
        hooks = [model.get_submodule(path).register_forward_hook(recorder(path), with_kwargs=True) for path in paths]
        try:
            with evaluating(model):
                call(model, example)
        except Exception:  # the model's own, for inputs that were made up
            continue
        finally:
            for hook in hooks:
                hook.remove()
        return seen
    return {}


def removable(model: nn.Module, groups: Sequence[Group], examples: Iterable[Any]) -> frozenset[str]:
    """Return the names of groups that can be pruned whole: the cut model runs without them on an example.

    Args:
        model: the dense model, left unchanged; it runs on fake tensors.
        groups: its groups.
        examples: possible inputs; the first that runs is used.

    Raises:
        SettingError: no group can be pruned whole; the message says why.
    """
    from upop.pruning.axes.copies import Shapes

    shapes: Shapes | None = None
    for example in examples:
        try:
            shapes = Shapes(model, example)
        except LayoutError:
            continue
        break
    if shapes is None:
        raise SettingError(
            "depth=True needs inputs, to check that the model runs without a branch, and none could be generated for "
            f"{type(model).__name__}. Pass example=... (a tensor, a tuple of arguments, or a mapping)."
        )
    copied, world = shapes.copy(), shapes

    def fails(going: Sequence[Group]) -> Exception | None:
        undo = cut(copied, list(going), {group.name: () for group in going}, fold=False)
        try:
            with world.running(), torch.no_grad():
                call(copied, world.example)
        except Exception as error:  # the model's own
            return error
        finally:
            restore(undo)
        return None

    if fails(groups) is None:
        return frozenset(group.name for group in groups)
    why = {group.name: fails([group]) for group in groups}
    found = frozenset(name for name, error in why.items() if error is None)
    if not found:
        name, error = next(iter(why.items()))
        raise SettingError(
            f"depth=True finds no branch to prune: {type(model).__name__} fails without any one of its {len(groups)} "
            f"branches ({name}: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}). Leave depth out."
        )
    return found
