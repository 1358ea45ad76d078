"""Which entries go under one budget: standardised scores, one ranking over all modalities, one threshold.

Section 3 of the paper. A high score means that shrinking the entry lowers the loss most, so high scores go first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from upop.pruning.align import Align, entries_in_block, told_align
from upop.pruning.errors import SettingError
from upop.pruning.units import Unit


def progress(step: int, steps: int, ratio: float) -> float:
    """Return p_t, the share of the cost to be marked after step `step` (from 0) of `steps`.

    `ratio * sqrt((1 - cos(pi (t + 1) / T)) / 2)`: fast at first, flat at the end, and exactly `ratio` at the last
    step, so that the last masks are binary.
    """
    if step + 1 >= steps:
        return ratio
    return ratio * math.sqrt((1 - math.cos(math.pi * (step + 1) / steps)) / 2)


@dataclass(frozen=True)
class Selection:
    """What a ranking decided.

    Attributes:
        marked: per unit, shape [size], bool: True where the entry is to go.
        threshold: the standardised score above which entries go.
        cost: the summed cost of the marked entries.
    """

    marked: dict[str, Tensor]
    threshold: float
    cost: float


def standardise(units: Sequence[Unit], scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return `(s - mean) / std` over all attention entries together, and over all MLP entries together (float64).

    The standard deviation is the unbiased one. Where all scores of a kind are equal, they become 0.
    """
    result: dict[str, Tensor] = {}
    for kind in ("attention", "mlp"):
        names = [unit.name for unit in units if unit.kind == kind]
        if not names:
            continue
        values = torch.cat([scores[name].double().cpu() for name in names])
        # Compared, since the rounded mean of equal numbers need not be that number.
        equal = bool((values == values[0]).all())
        values = torch.zeros_like(values) if equal else (values - values.mean()) / values.std()
        result.update(zip(names, values.split([scores[name].numel() for name in names]), strict=True))
    return result


def select(
    units: Sequence[Unit],
    scores: Mapping[str, Tensor],
    costs: Mapping[str, float],
    share: float,
    align: Align = 1,
    *,
    standardised: bool = True,
) -> Selection:
    """Mark the entries with the highest (standardised) scores until their cost is nearest to `share` of the total.

    Entries are ranked in blocks: within a unit, the entries sorted by score are grouped, so that the channels that
    stay are always a multiple of `align`; the first block takes the remainder of the unit's size. The last block of
    each unit (its lowest scores) is never marked, and is left out of the walk, so the budget holds all the same.

    Args:
        units: the units to rank together.
        scores: accumulated scores per unit, shape [size].
        costs: cost of one entry per unit.
        share: share of the total cost to be marked, in [0, 1).
        align: channels in a block; 1 ranks single entries. An entry that is a head has many channels.
        standardised: whether attention and MLP scores are each standardised, as published; else they are compared as
            they are.
    """
    ranked = standardise(units, scores) if standardised else {name: s.double().cpu() for name, s in scores.items()}
    orders, means, block_costs, lengths = [], [], [], []
    for unit in units:
        values, order = ranked[unit.name].sort(descending=True, stable=True)
        block = entries_in_block(unit, align)
        sizes = _removable_blocks(unit.size, block)
        removable = sum(sizes)
        orders.append(order[:removable])
        lengths.append(torch.tensor(sizes, dtype=torch.long))
        means.append(values[:removable] if block == 1 else _block_means(values[:removable], sizes))
        block_costs.append(lengths[-1].double() * costs[unit.name])
    flat_means = torch.cat(means)
    walk = flat_means.argsort(descending=True, stable=True)
    spent = torch.cat([torch.zeros(1, dtype=torch.float64), torch.cat(block_costs)[walk].cumsum(0)])
    total = sum(costs[unit.name] * unit.size for unit in units)
    count = int((spent - share * total).abs().argmin())
    chosen = torch.zeros(len(walk), dtype=torch.bool)
    chosen[walk[:count]] = True
    marked = {}
    for unit, order, length, picked in zip(
        units, orders, lengths, chosen.split([len(length) for length in lengths]), strict=True
    ):
        gone = torch.zeros(unit.size, dtype=torch.bool)
        gone[order[picked.repeat_interleave(length)]] = True
        marked[unit.name] = gone
    threshold = float(flat_means[walk[count]]) if count < len(walk) else -math.inf
    return Selection(marked, threshold, float(spent[count]))


def select_as_published(
    units: Sequence[Unit], scores: Mapping[str, Tensor], costs: Mapping[str, float], share: float
) -> Selection:
    """Mark entries as the published implementation does, so that its masks can be reproduced.

    The threshold is the score at which the cumulated cost is nearest to the budget; only scores strictly above it
    are marked, and of those each unit keeps its lowest. So the marked cost falls a little short of the budget.
    """
    ranked = standardise(units, scores)
    flat = torch.cat([ranked[unit.name] for unit in units])
    entry_costs = torch.cat([torch.full((unit.size,), float(costs[unit.name])) for unit in units]).double()
    ordered, order = flat.sort(descending=True)
    nearest = (entry_costs[order].cumsum(0) - share * entry_costs.sum()).abs().argmin()
    threshold = ordered[nearest]
    marked = {
        unit.name: (ranked[unit.name] > threshold) & (ranked[unit.name] > ranked[unit.name].min()) for unit in units
    }
    cost = sum(costs[name] * int(gone.sum()) for name, gone in marked.items())
    return Selection(marked, float(threshold), float(cost))


def check_reachable(units: Sequence[Unit], costs: Mapping[str, float], ratio: float, align: Align = 1) -> None:
    """Raise unless `ratio` of the total cost can go while every unit keeps its last block.

    Raises:
        SettingError: it cannot; the message says the largest ratio that can, and which units an `align` leaves whole.
    """
    total = sum(costs[unit.name] * unit.size for unit in units)
    blocks = {unit.name: entries_in_block(unit, align) for unit in units}
    removable = sum(costs[unit.name] * sum(_removable_blocks(unit.size, blocks[unit.name])) for unit in units)
    if ratio * total > removable:
        largest = max(blocks.values())
        block = "entry" if largest == 1 else f"block of {largest} entries" if align == largest else "block"
        whole = [unit.name for unit in units if unit.size < 2 * blocks[unit.name]]
        stay = f" (with align={told_align(align)}, {len(whole)} of them stay whole)" if whole and largest > 1 else ""
        raise SettingError(
            f"ratio={ratio} cannot be reached: every one of the {len(units)} units keeps at least one {block}{stay}, "
            f"so at most {math.floor(removable / total * 1e4) / 1e4} of the cost can go. "
            "Ask for less" + (", or for a smaller align." if largest > 1 else ".")
        )


def _block_means(values: Tensor, sizes: list[int]) -> Tensor:
    """Return the mean of every block of the sorted `values`; rounding must not let a later block come first."""
    if not sizes:
        return values
    return torch.stack([block.mean() for block in torch.split(values, sizes)]).cummin(0).values


def _removable_blocks(size: int, block: int) -> list[int]:
    """Return the sizes of a unit's blocks that may go, first to go first, without the one that always stays."""
    whole, rest = divmod(size, block)
    if whole == 0:
        return []  # smaller than one block: it stays as it is
    return ([rest] if rest else []) + [block] * (whole - 1)
