"""Which entries go under one budget: standardised scores, one ranking over all modalities, one threshold.

Section 3 of the paper. A high score means that shrinking the entry lowers the loss most, so high scores go first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from upop.pruning.align import Align, entries_in_block, told_align
from upop.pruning.errors import SettingError
from upop.pruning.uniform import Tower, removable_blocks, together
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
    towers: Sequence[Tower] = (),
) -> Selection:
    """Mark the entries with the highest (standardised) scores until their cost is nearest to `share` of the total.

    Entries are ranked in blocks: within a unit, the entries sorted by score are grouped, so that the channels that
    stay are always a multiple of `align`; the first block takes the remainder of the unit's size. The last block of
    each unit (its lowest scores) is never marked, and is left out of the walk, so the budget holds all the same.

    The units of a tower lose equally many entries: their first blocks are one, and so on, with the mean of their
    scores. Such a block costs much; one that does not fit into what is left of the budget is passed over, and smaller
    ones behind it fill that up.

    Args:
        units: the units to rank together.
        scores: accumulated scores per unit, shape [size].
        costs: cost of one entry per unit.
        share: share of the total cost to be marked, in [0, 1).
        align: channels in a block; 1 ranks single entries. An entry that is a head has many channels.
        standardised: whether attention and MLP scores are each standardised, as published; else they are compared as
            they are.
        towers: units that lose equally many.
    """
    ranking = rank(units, scores, align, standardised=standardised, towers=towers)
    if towers:
        return ranking.filled(share * sum(costs[unit.name] * unit.size for unit in units), costs)
    spent = torch.cat([torch.zeros(1, dtype=torch.float64), ranking.costs(costs).cumsum(0)])
    total = sum(costs[unit.name] * unit.size for unit in units)
    return ranking.selection(int((spent - share * total).abs().argmin()), costs)


@dataclass(frozen=True)
class Ranking:
    """The blocks of all units in the order in which they go.

    Attributes:
        groups: the units; those of a tower lose equally many entries, and are one group.
        orders: per group and unit, its entries that may go, those with the highest scores first.
        lengths: per group, how many of each unit's entries are in each of its blocks.
        means: the mean score of every block, group by group.
        walk: places in `means`, in the order in which blocks go.
    """

    groups: Sequence[Sequence[Unit]]
    orders: Sequence[Sequence[Tensor]]
    lengths: Sequence[Tensor]
    means: Tensor
    walk: Tensor

    @cached_property
    def _owners(self) -> Tensor:
        """The place of the group of every block."""
        return torch.arange(len(self.groups)).repeat_interleave(torch.tensor([len(each) for each in self.lengths]))

    def costs(self, costs: Mapping[str, float]) -> Tensor:
        """Return what each block costs, in the order in which they go."""
        entry = torch.tensor([sum(costs[unit.name] for unit in group) for group in self.groups], dtype=torch.float64)
        return (torch.cat(list(self.lengths)).double() * entry[self._owners])[self.walk]

    def kept(self, count: int) -> dict[str, int]:
        """Return how many entries every unit keeps when so many blocks go."""
        gone = self.walk[:count]
        lost = torch.zeros(len(self.groups), dtype=torch.long)
        lost.index_add_(0, self._owners[gone], torch.cat(list(self.lengths))[gone])
        pairs = zip(self.groups, lost.tolist(), strict=True)
        return {unit.name: unit.size - number for group, number in pairs for unit in group}

    def last(self, count: int) -> list[tuple[tuple[str, ...], list[int]]]:
        """Return, where so many blocks go, groups and the lengths of their blocks that go, the last to go first.

        Groups that lost blocks last come first. Blocks whose score is infinite went before, and are left out.
        """
        lengths, found = torch.cat(list(self.lengths)), dict[tuple[str, ...], list[int]]()
        for place in self.walk[:count].flip(0).tolist():
            if math.isfinite(self.means[place]):
                names = tuple(unit.name for unit in self.groups[int(self._owners[place])])
                found.setdefault(names, []).append(int(lengths[place]))
        return list(found.items())

    def selection(self, count: int, costs: Mapping[str, float], back: Mapping[str, int] | None = None) -> Selection:
        """Return what goes where so many blocks do, but for the last ones of some units, which stay."""
        chosen = torch.zeros(len(self.walk), dtype=torch.bool)
        chosen[self.walk[:count]] = True
        threshold = float(self.means[self.walk[count]]) if count < len(self.walk) else -math.inf
        return self._marked(chosen, costs, threshold, back or {})

    def filled(self, budget: float, costs: Mapping[str, float]) -> Selection:
        """Return what goes where blocks go in their order, as far as the budget has room for them.

        Half of the smallest block may be too much. A group of which a block was passed over loses no more.
        """
        chosen = torch.zeros(len(self.walk), dtype=torch.bool)
        each = self.costs(costs)
        left = budget + (float(each.min()) / 2 if len(each) else 0.0)
        closed: set[int] = set()
        threshold = -math.inf
        for block, cost, owner in zip(self.walk.tolist(), each.tolist(), self._owners[self.walk].tolist(), strict=True):
            if owner not in closed and cost <= left:
                chosen[block] = True
                left -= cost
            else:
                threshold = max(threshold, float(self.means[block]))
                closed.add(owner)
        return self._marked(chosen, costs, threshold, {})

    def _marked(
        self, chosen: Tensor, costs: Mapping[str, float], threshold: float, back: Mapping[str, int]
    ) -> Selection:
        marked = {}
        picks = chosen.split([len(length) for length in self.lengths])
        for group, orders, length, picked in zip(self.groups, self.orders, self.lengths, picks, strict=True):
            for unit, order in zip(group, orders, strict=True):
                going = picked & (picked.cumsum(0) <= picked.sum() - back.get(unit.name, 0))
                gone = torch.zeros(unit.size, dtype=torch.bool)
                gone[order[going.repeat_interleave(length)]] = True
                marked[unit.name] = gone
        spent = sum(costs[unit.name] * int(marked[unit.name].sum()) for group in self.groups for unit in group)
        return Selection(marked, threshold, float(spent))


def rank(
    units: Sequence[Unit],
    scores: Mapping[str, Tensor],
    align: Align = 1,
    *,
    standardised: bool = True,
    towers: Sequence[Tower] = (),
) -> Ranking:
    """Return all blocks of entries that may go, those with the highest (standardised) scores first; see `select`."""
    ranked = standardise(units, scores) if standardised else {name: s.double().cpu() for name, s in scores.items()}
    found = together(units, towers)
    orders, means, lengths = [], [], []
    for group, tower in found:
        both = [ranked[unit.name].sort(descending=True, stable=True) for unit in group]
        sizes = removable_blocks(group[0], align, tower)
        removable = sum(sizes)
        orders.append([order[:removable] for _, order in both])
        lengths.append(torch.tensor(sizes, dtype=torch.long))
        values = torch.stack([values[:removable] for values, _ in both]).mean(0)
        means.append(values if all(size == 1 for size in sizes) else _block_means(values, sizes))
    flat_means = torch.cat(means)
    walk = flat_means.argsort(descending=True, stable=True)
    return Ranking([group for group, _ in found], orders, lengths, flat_means, walk)


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


def check_reachable(
    units: Sequence[Unit],
    costs: Mapping[str, float],
    ratio: float,
    align: Align = 1,
    towers: Sequence[Tower] = (),
) -> None:
    """Raise unless `ratio` of the total cost can go while every unit keeps its last block.

    Raises:
        SettingError: it cannot; the message says the largest ratio that can, and which units an `align` leaves whole.
    """
    total = sum(costs[unit.name] * unit.size for unit in units)
    blocks = {unit.name: entries_in_block(unit, align) for unit in units}
    removable = sum(
        costs[unit.name] * sum(removable_blocks(unit, align, tower))
        for group, tower in together(units, towers)
        for unit in group
    )
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
