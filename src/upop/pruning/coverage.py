"""The share of parameters and multiply-adds that groups cover, and why the rest is skipped."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from upop.pruning.groups import Group, Skipped
from upop.pruning.traits import momentum_prefixes

Where = Literal["groups", "skipped", "outside"]
PLACES: tuple[Where, ...] = ("groups", "skipped", "outside")
"""In groups; in blocks, but skipped for a reason; outside of blocks: embeddings, heads, norms."""

UNKNOWN = "no prunable axis was found in it"


@dataclass(frozen=True)
class Share:
    """The size of one of the three places: in groups, skipped, outside.

    Attributes:
        parameters: their number; shared tensors count once, momentum copies not at all.
        macs: multiply-adds of one forward pass; None without an example.
    """

    parameters: int
    macs: int | None = None


@dataclass(frozen=True)
class Coverage:
    """The place of every parameter of a model.

    Attributes:
        shares: place -> its size.
        where: tensor -> its place.
        reasons: weight matrix -> why it is skipped.
    """

    shares: Mapping[Where, Share]
    where: Mapping[str, Where]
    reasons: Mapping[str, str]

    @property
    def of_blocks(self) -> float:
        """Return the share of the blocks' parameters that is in groups; 1 where there are no blocks."""
        groups, left = (self.shares[place].parameters for place in PLACES[:2])
        return groups / (groups + left) if groups + left else 1.0

    def __str__(self) -> str:
        """Return the shares, a line for each place."""
        counts = [self.shares[place] for place in PLACES]
        lines = []
        for place, share in zip(PLACES, counts, strict=True):
            line = f"{place:<12}{_percent(share.parameters, [each.parameters for each in counts]):>6} of the parameters"
            if share.macs is not None:
                line += f"{_percent(share.macs, [each.macs or 0 for each in counts]):>8} of the multiply-adds"
            lines.append(line)
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Return the shares and the reasons as JSON values."""
        counts = {place: self.shares[place] for place in PLACES}
        return {
            "shares": {place: {"parameters": share.parameters, "macs": share.macs} for place, share in counts.items()},
            "of_blocks": self.of_blocks,
            "reasons": dict(self.reasons),
        }


def coverage(
    model: nn.Module, groups: Iterable[Group], skipped: Iterable[Skipped], macs: Mapping[str, int] | None = None
) -> Coverage:
    """Return the place of every parameter; each weight matrix is in exactly one place.

    A matrix that no group cuts counts as skipped if it is in a block (one of several sibling modules of a class with
    at least two weight matrices each), or, in a model without blocks, if `skipped` lists it. Embeddings, position
    tables, output heads and all else are outside. Biases go with the matrix of their layer; norms are outside.

    Args:
        model: the model.
        groups: its groups.
        skipped: parts of the model that are in no group, with reasons.
        macs: module name -> its own multiply-adds, without those of its submodules.
    """
    copies = momentum_prefixes(model)
    named = {name: each for name, each in model.named_parameters() if not name.startswith(copies)}
    cut = {part.tensor for group in groups for part in group.online}
    blocks = _blocks(model)
    described = {each.name: each.reason for each in skipped}
    where: dict[str, Where] = {}
    reasons: dict[str, str] = {}
    for name, parameter in named.items():
        layer = name.rpartition(".")[0]
        if name in cut:
            where[name] = "groups"
        elif parameter.dim() > 1 and not isinstance(model.get_submodule(layer), nn.Embedding):
            inside = any(f"{layer}.".startswith(block) for block in blocks)
            reason = _reason(layer, described, blocks)
            explained = reason is not None and reason not in _OF_HEADS
            if (explained and not blocks) or (inside and (explained or name.endswith("weight"))):
                where[name], reasons[name] = "skipped", reason or UNKNOWN
    beside = {name.rpartition(".")[0]: place for name, place in where.items()}
    for name in named:
        if name not in where:
            where[name] = beside.get(name.rpartition(".")[0], "outside") if named[name].dim() < 2 else "outside"
    shares = {
        place: Share(
            sum(named[name].numel() for name, here in where.items() if here == place),
            None if macs is None else sum(count for path, count in macs.items() if _of(path, where, named) == place),
        )
        for place in PLACES
    }
    return Coverage(shares, where, reasons)


_OF_HEADS = ("it leaves the model", "it is the residual stream")
"""Reasons that only layers outside of blocks have."""


def _blocks(model: nn.Module) -> tuple[str, ...]:
    """Return the outermost repeated modules with several weight matrices, as name prefixes."""
    found: list[str] = []
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList | nn.Sequential | nn.ModuleDict):
            continue
        large = [(name, type(child)) for name, child in module.named_children() if _matrices(child) > 1]
        kinds = [kind for _, kind in large]
        for name, kind in large:
            here = f"{path}.{name}." if path else f"{name}."
            if kinds.count(kind) > 1 and not here.startswith(tuple(found)):
                found.append(here)
    return tuple(found)


def _matrices(module: nn.Module) -> int:
    return sum(parameter.dim() > 1 for parameter in module.parameters())


def _reason(layer: str, described: Mapping[str, str], blocks: Iterable[str]) -> str | None:
    """Return the reason for a layer, for one of its ancestors, or else for a sibling layer."""
    block = next((each for each in blocks if f"{layer}.".startswith(each)), "")
    beside = f"{layer.rpartition('.')[0]}."
    path = layer
    while path and f"{path}.".startswith(block):
        if path in described:
            return described[path]
        path = path.rpartition(".")[0]
    return next((reason for name, reason in described.items() if len(beside) > 1 and name.startswith(beside)), None)


def _of(module: str, where: Mapping[str, Where], named: Mapping[str, nn.Parameter]) -> Where:
    """Return the place of a module's own computations: that of its matrices, or of its submodules' matrices."""
    start = f"{module}." if module else ""
    own = [where[name] for name in where if name.startswith(start) and "." not in name.removeprefix(start)]
    below = own or [where[name] for name in where if name.startswith(start) and named[name].dim() > 1]
    return next((place for place in PLACES if place in below), "outside")


def _percent(count: int, all_of: list[int]) -> str:
    return f"{100 * count / max(1, sum(all_of)):.1f} %"
