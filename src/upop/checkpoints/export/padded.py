"""Pads a cut model with zeros to the widest layer of every tower: an ordinary model with the same outputs.

Only the differences between the layers of a tower are lost. Sizes that no field of the configuration sets are padded to
those of the dense model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from upop.checkpoints.configs.builders import (
    Builder,
    Change,
    changed,
    of_timm,
    of_transformers,
    with_fields,
    without_record,
)
from upop.checkpoints.configs.comparing import differing
from upop.checkpoints.configs.size_fields import size_fields
from upop.checkpoints.fitting.fit import kept_sizes
from upop.checkpoints.fitting.meta import empty_model, materialize, meta_model
from upop.checkpoints.fitting.sizes import dense_meta_copy
from upop.errors import SettingError, VerificationError
from upop.libraries import is_pretrained
from upop.pruning import Group, count_parameters, find_prunable
from upop.pruning.carried import plan_of
from upop.pruning.known import know_as, sized
from upop.pruning.slicing import Slicing, slicings
from upop.pruning.width import streams_among


@dataclass(frozen=True)
class Padded:
    """A padded model, and what it costs.

    Attributes:
        model: an ordinary model of its library.
        architecture: timm's name of it; empty for a model of transformers.
        settings: arguments of `timm.create_model` beside the name, for a model of timm.
        dense: parameters of the dense model.
        cut: parameters of the cut model.
        parameters: parameters of the padded model.
        whole: groups that are padded to their dense size, because no configuration field sets it.
    """

    model: nn.Module
    architecture: str
    settings: Mapping[str, Any]
    dense: int
    cut: int
    parameters: int
    whole: tuple[str, ...]

    @property
    def left(self) -> float:
        """The share of the removed parameters that stay removed after padding."""
        return (self.dense - self.parameters) / (self.dense - self.cut) if self.dense > self.cut else 1.0

    def described(self) -> str:
        """Return how much of the reduction remains, as a sentence."""
        whole = f"; {len(self.whole)} groups have their dense size, since no configuration field sets it"
        return (
            f"{self.parameters:,} parameters; {self.cut:,} before the padding, {self.dense:,} when dense: "
            f"{self.left:.0%} of the reduction is left{whole if self.whole else ''}"
        )


@torch.no_grad()
def pad(model: nn.Module) -> Padded:
    """Pad a cut model of transformers or timm with zeros to an ordinary one, and compare their outputs.

    Args:
        model: the cut model; it is not changed.

    Raises:
        SettingError: neither library builds such a model, or its residual stream was pruned.
        VerificationError: the outputs differ.
    """
    builder, dense = padding_builder(model)
    groups = find_prunable(dense).groups
    kept = kept_sizes(groups, model.state_dict(), type(model).__name__)
    sizes, change, said = widest(dense, groups, kept, builder)
    streams = [group.name for group in streams_among(groups) if kept.get(group.name, 0) < sizes[group.name]]
    if streams:
        raise SettingError(
            f"This {type(model).__name__} cannot be padded: {streams[0]} was pruned, no field of {builder.by} sets its "
            "width, and norms would count zeros. Use `upop export --to onnx` or `--to torch-export`, or load it with "
            "upop.load."
        )
    wide = _wide(model, builder, change)
    _copy(model, wide, groups, kept, sizes)
    know_as(wide, model)
    why = differing(model, wide)
    if why is not None:
        raise VerificationError(
            f"The padded {type(model).__name__} does not compute what the cut one does: {why}. Nothing was written; "
            "please report this."
        )
    whole = tuple(
        group.name for group in groups if kept.get(group.name, group.size) < group.size and group.name not in said
    )
    settings = {name: value for name, value in changed(builder.settings, change).items() if value is not None}
    counts = count_parameters(dense), count_parameters(model), count_parameters(wide)
    return Padded(wide.eval(), builder.architecture, settings, *counts, whole)


def padding_builder(model: nn.Module) -> tuple[Builder, nn.Module]:
    """Return the builder of a cut model's dense form, and that form on the meta device.

    Raises:
        SettingError: no library builds it from a configuration.
    """
    if is_pretrained(model):
        return of_transformers(model), dense_meta_copy(model)
    described = None
    if type(model).__module__.partition(".")[0] == "timm":
        from upop.checkpoints.libraries import timm_models

        described = timm_models.describe(model, plan_of(model))
    if described is None:
        raise SettingError(
            f"A {type(model).__name__} cannot be padded: neither transformers nor timm builds it from a configuration. "
            "Use `upop export --to onnx` or `--to torch-export`, or load it with upop.load."
        )
    builder = of_timm(described["architecture"], described["arguments"])
    dense = meta_model(lambda: builder.build(builder.settings))
    know_as(dense, model)
    return builder, dense


def widest(
    dense: nn.Module, groups: Sequence[Group], kept: Mapping[str, int], builder: Builder
) -> tuple[dict[str, int], Change, set[str]]:
    """Return the padded size of every group, the change of the dense configuration, and the groups with a field."""
    sizes = {group.name: group.size for group in groups}
    change: dict[Any, Any] = {}
    said: set[str] = set()
    for field in size_fields(dense, groups, builder):
        said.update(field.groups)
        whole = sizes[field.groups[0]]
        most = max(1, *(kept.get(name, whole) for name in field.groups))  # no library builds empty layers
        size = most if field.sizes is None else min((each for each in field.sizes if each >= most), default=whole)
        if size < whole:
            sizes |= dict.fromkeys(field.groups, size)
            change |= field.change(size)
    return sizes, change, said


def _wide(model: nn.Module, builder: Builder, change: Change) -> nn.Module:
    if not is_pretrained(model):
        return materialize(empty_model(lambda: builder.build(changed(builder.settings, change))))
    config = with_fields(without_record(model.config), change)
    kind: Any = getattr(type(model), "uncut_class", type(model))
    return materialize(empty_model(lambda: kind(config)))


def _copy(
    model: nn.Module, wide: nn.Module, groups: Sequence[Group], kept: Mapping[str, int], sizes: Mapping[str, int]
) -> None:
    """Copy the tensors of a cut model into a wider one, with zeros around them.

    Where softmax scales follow head_dim, queries are multiplied by the ratio of the scales.
    """
    here = [sized(wide, replace(group, size=sizes[group.name])) for group in groups]
    if None in here:
        here = list(find_prunable(wide).groups)
    grown = [group for group in here if group is not None]
    places = slicings(wide, grown, {group.name: range(kept.get(group.name, group.size)) for group in grown})
    mine = model.state_dict()
    buffers = dict(model.named_buffers())
    for name, theirs in (*wide.named_parameters(), *wide.named_buffers()):
        if name not in mine:  # a computed buffer
            theirs.data = theirs.data.to(buffers[name].device, buffers[name].dtype) if name in buffers else theirs.data
            continue
        value = mine[name]
        place = places.get(name, Slicing(value.shape, {}))
        for dim, positions in place.kept.items():
            shape = list(value.shape)
            shape[dim] = place.shape[dim]
            value = value.new_zeros(shape).index_copy_(dim, positions.to(value.device), value)
        for dim, positions, factor in place.scaled:
            rows = positions.to(value.device)
            value = value.index_copy(dim, rows, value.index_select(dim, rows) / factor)
        theirs.data = value.clone()
