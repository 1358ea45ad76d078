"""Width: channels of the residual stream of each tower are pruned in the same ranking and budget as heads and neurons.

A channel's score is the first-order change of the loss without it, compared with those of other channels as it is. A
channel of a stream costs as much as many others; scores over costs were tried, and prune far too many (docs/log.md).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from torch import nn

from upop.pruning.errors import LayoutError, SettingError
from upop.pruning.groups import Group, Skipped

_RESIDUAL = "residual"


def check_width(width: object, target: object, progress: str = "stages") -> bool:
    """Return whether the residual streams of towers are pruned.

    Raises:
        SettingError: it is neither True nor False, there is no target for the whole model, or a "soft" search is to do
            it.
    """
    if not isinstance(width, bool):
        raise SettingError(
            f"width is True (prune channels of the residual stream of each tower) or False; found {width!r}."
        )
    if width and target is None:
        raise SettingError(
            "width=True needs a target, not a ratio: a ratio sums the costs of all groups, and would count weights "
            "twice that belong to the residual stream and to a head or a neuron. Give a limit for the whole model: "
            "target={'params': 0.5}."
        )
    if width and progress == "soft":
        raise SettingError(
            'width=True needs a search in stages: norms cannot compute over channels that a "soft" search has masked '
            'in part. Set progress="stages", the default.'
        )
    return width


def streams_among(groups: Iterable[Group]) -> list[Group]:
    """Return the groups that are residual streams."""
    return [group for group in groups if group.kind == _RESIDUAL]


def blocks_among(groups: Iterable[Group]) -> list[Group]:
    """Return the groups that are no residual streams: heads, dimensions and neurons of blocks."""
    return [group for group in groups if group.kind != _RESIDUAL]


def names_stream(name: object) -> bool:
    """Whether a group of this name is a residual stream, as upop names them."""
    return isinstance(name, str) and name.rpartition(".")[2].partition("[")[0] == _RESIDUAL


_READER = " read by "


def with_readers(groups: Iterable[Group]) -> list[Group]:
    """Return the groups, with one for every layer that reads a stream in the place of the stream: all are corrected.

    A table of words that is read, too, is left alone: what it writes would change.
    """
    found: list[Group] = []
    for group in groups:
        readers = [part for part in group.scored if not part.produces] if group.kind == _RESIDUAL else []
        found += [replace(group, name=group.name + _READER + part.tensor, slices=(part,)) for part in readers] or [
            group
        ]
    return found


def stream_of(group: Group) -> str:
    """Return the name of the group whose reader one of `with_readers` is."""
    return group.name.partition(_READER)[0]


def refuse_no_stream(model: nn.Module, groups: Sequence[Group], skipped: Sequence[Skipped]) -> None:
    """Raise a `LayoutError` if no residual stream is among the groups of a model."""
    if streams_among(groups):
        return
    reasons = [f"{each.name}: {each.reason}" for each in skipped if names_stream(each.name)]
    why = "; ".join(reasons[:3]) or "no blocks add to one"
    raise LayoutError(
        f"width=True finds no residual stream of {type(model).__name__} that can be cut ({why}). Leave width out."
    )
