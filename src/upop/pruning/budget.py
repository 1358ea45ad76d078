"""Which entries go under one budget: standardised scores, one ranking over all modalities, one threshold.

Section 3 of the paper. A high score means that shrinking the entry lowers the loss most, so high scores go first.
"""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from upop.pruning.align import Align, entries_in_block, told_align
from upop.pruning.depth import NONE, Depth
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
        units: all of them, in forward order.
        groups: those that lose blocks; those of a tower lose equally many entries, and are one group.
        orders: per group and unit, its entries that may go, those with the highest scores first.
        lengths: per group, how many of each unit's entries are in each of its blocks.
        means: the mean score of every block, group by group, and then of what goes whole.
        walk: places in `means`, in the order in which blocks go.
        whole: the names of units that go whole, together, beside the blocks of the groups.
    """

    units: Sequence[Unit]
    groups: Sequence[Sequence[Unit]]
    orders: Sequence[Sequence[Tensor]]
    lengths: Sequence[Tensor]
    means: Tensor
    walk: Tensor
    whole: Sequence[tuple[str, ...]] = ()
    _owners: Tensor = field(init=False)  # the place of the group of every block
    _entries: Tensor = field(init=False)  # how many entries of each of its units every block has

    def __post_init__(self) -> None:
        """Note of every block whose it is."""
        counts = torch.tensor([len(each) for each in self.lengths], dtype=torch.long)
        object.__setattr__(self, "_owners", torch.arange(len(self.groups)).repeat_interleave(counts))
        lengths = torch.cat(list(self.lengths)) if self.lengths else torch.zeros(0, dtype=torch.long)
        object.__setattr__(self, "_entries", lengths)

    def costs(self, costs: Mapping[str, float]) -> Tensor:
        """Return what each block costs, in the order in which they go."""
        entry = torch.tensor([sum(costs[unit.name] for unit in group) for group in self.groups], dtype=torch.float64)
        return (self._entries.double() * entry[self._owners])[self.walk]

    def kept(self, count: int) -> dict[str, int]:
        """Return how many entries every unit keeps when so many blocks go."""
        gone, whole = self._parts(count)
        lost = torch.zeros(len(self.groups), dtype=torch.long)
        lost.index_add_(0, self._owners[gone], self._entries[gone])
        kept = {unit.name: unit.size for unit in self.units}
        for group, number in zip(self.groups, lost.tolist(), strict=True):
            kept.update({unit.name: unit.size - number for unit in group})
        return kept | dict.fromkeys(whole, 0)

    def _parts(self, count: int) -> tuple[Tensor, set[str]]:
        """Return which blocks of groups go when so many do, and which units go whole beside them."""
        gone, blocks = self.walk[:count], len(self._entries)
        whole = [self.whole[place] for place in (gone[gone >= blocks] - blocks).tolist()]
        return gone[gone < blocks], {name for names in whole for name in names}

    def last(self, count: int) -> list[tuple[tuple[str, ...], list[int]]]:
        """Return, where so many blocks go, groups and the lengths of their blocks that go, the last to go first.

        Groups that lost blocks last come first. Blocks whose score is infinite went before, and are left out, as are
        units that go whole beside their blocks.
        """
        gone, whole = self._parts(count)
        found: dict[tuple[str, ...], list[int]] = {}
        for place in gone.flip(0).tolist():
            if math.isfinite(self.means[place]):
                group = self.groups[int(self._owners[place])]
                names = tuple(unit.name for unit in group if unit.name not in whole)
                found.setdefault(names, []).append(int(self._entries[place]))
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
        marked = {unit.name: torch.zeros(unit.size, dtype=torch.bool) for unit in self.units}
        *picks, whole = chosen.split([*(len(length) for length in self.lengths), len(self.whole)])
        for group, orders, length, picked in zip(self.groups, self.orders, self.lengths, picks, strict=True):
            for unit, order in zip(group, orders, strict=True):
                going = picked & (picked.cumsum(0) <= picked.sum() - back.get(unit.name, 0))
                marked[unit.name][order[going.repeat_interleave(length)]] = True
        for names, picked in zip(self.whole, whole.tolist(), strict=True):
            for name in names if picked else ():
                marked[name].fill_(True)
        spent = sum(costs[unit.name] * int(marked[unit.name].sum()) for unit in self.units)
        return Selection(marked, threshold, float(spent))


def rank(
    units: Sequence[Unit],
    scores: Mapping[str, Tensor],
    align: Align = 1,
    *,
    standardised: bool = True,
    towers: Sequence[Tower] = (),
    depth: Depth = NONE,
) -> Ranking:
    """Return all blocks of entries that may go, those with the highest (standardised) scores first; see `select`.

    A unit that may go whole ends with a block of all that is left, which goes by what it loses for what it saves: the
    sum of its entries' scores, over their cost and what goes beside them. Blocks that would save less for what they
    lose than all that is left does are part of that one. So do the units of a layer of a tower, together.
    """
    ranked = standardise(units, scores) if standardised else {name: s.double().cpu() for name, s in scores.items()}
    gone = {unit.name for unit in units if depth and bool((ranked[unit.name] == math.inf).all())}
    found = together([unit for unit in units if unit.name not in gone], towers)
    orders, means, lengths = [], [], []
    for group, tower in found:
        both = [ranked[unit.name].sort(descending=True, stable=True) for unit in group]
        sizes = removable_blocks(group[0], align, tower)
        removable = sum(sizes)
        values = torch.stack([values[:removable] for values, _ in both]).mean(0)
        values = values if all(size == 1 for size in sizes) else _block_means(values, sizes)
        if tower is None and (group[0].name,) in depth.branches:
            sizes, values = depth.with_rest(group[0], both[0].values, sizes, values)
        orders.append([order[: sum(sizes)] for _, order in both])
        lengths.append(torch.tensor(sizes, dtype=torch.long))
        means.append(values)
    alone = {unit.name for group, tower in found if tower is None for unit in group}
    whole = [(names, depth.score(names, ranked)) for names in depth.branches if alone.isdisjoint(names)]
    flat_means = torch.cat([*means, torch.tensor([score for _, score in whole], dtype=torch.float64)])
    walk = flat_means.argsort(descending=True, stable=True)
    groups = [group for group, _ in found]
    return Ranking(units, groups, orders, lengths, flat_means, walk, [names for names, _ in whole])


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
    whole: Container[str] = (),
    wider: Sequence[str] = (),
) -> None:
    """Raise unless `ratio` of the total cost can go while every unit keeps its last block.

    Args:
        units: that are ranked.
        costs: of an entry.
        ratio: asked for.
        align: kept channels are multiples of this.
        towers: units that lose equally many.
        whole: names of units that may go whole.
        wider: what would let more go, in words.

    Raises:
        SettingError: it cannot; the message says the largest ratio that can, and which units an `align` leaves whole.
    """
    total = sum(costs[unit.name] * unit.size for unit in units)
    blocks = {unit.name: entries_in_block(unit, align) for unit in units}
    removable = sum(
        costs[unit.name] * (unit.size if unit.name in whole else sum(removable_blocks(unit, align, tower)))
        for group, tower in together(units, towers)
        for unit in group
    )
    if ratio * total > removable:
        largest = max(blocks.values())
        block = "entry" if largest == 1 else f"block of {largest} entries" if align == largest else "block"
        stays = [unit.name for unit in units if unit.size < 2 * blocks[unit.name]]
        stay = f" (with align={told_align(align)}, {len(stays)} of them stay whole)" if stays and largest > 1 else ""
        wider = [*(["a smaller align"] if largest > 1 else []), *wider]
        raise SettingError(
            f"ratio={ratio} cannot be reached: every one of the {len(units)} units keeps at least one {block}{stay}, "
            f"so at most {math.floor(removable / total * 1e4) / 1e4} of the cost can go. "
            f"Ask for less{', or for ' if wider else ''}{', or '.join(wider)}."
        )


def _block_means(values: Tensor, sizes: list[int]) -> Tensor:
    """Return the mean of every block of the sorted `values`; rounding must not let a later block come first."""
    if not sizes:
        return values
    return torch.stack([block.mean() for block in torch.split(values, sizes)]).cummin(0).values
