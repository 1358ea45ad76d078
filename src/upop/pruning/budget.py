"""Selects the channels to prune under one budget: standardised scores, one ranking over all modalities, one threshold.

Section 3 of the paper. A high score means that pruning the channel lowers the loss most, so channels with high scores
are pruned first.
"""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from upop.pruning.depth import NONE, Depth
from upop.pruning.errors import SettingError
from upop.pruning.groups import Group
from upop.pruning.round_to import RoundTo, channels_in_block, format_round_to
from upop.pruning.uniform import Tower, removable_blocks, together


def progress(step: int, steps: int, ratio: float) -> float:
    """Return p_t, the share of the cost to mark after step `step` (from 0) of `steps`.

    `ratio * sqrt((1 - cos(pi (t + 1) / T)) / 2)`: fast at first, flat at the end, and exactly `ratio` at the last
    step, so that the last masks are binary.
    """
    if step + 1 >= steps:
        return ratio
    return ratio * math.sqrt((1 - math.cos(math.pi * (step + 1) / steps)) / 2)


@dataclass(frozen=True)
class Selection:
    """The channels that a ranking selects.

    Attributes:
        marked: per group, [size], bool: the channels to prune.
        threshold: the standardised score above which channels are pruned.
        cost: the summed cost of the marked channels.
    """

    marked: dict[str, Tensor]
    threshold: float
    cost: float


def standardise(groups: Sequence[Group], scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return `(s - mean) / std` over all attention channels together, and over all MLP channels together (float64).

    The standard deviation is the unbiased one. Where all scores of a kind are equal, they become 0.
    """
    result: dict[str, Tensor] = {}
    for kind in ("attention", "mlp"):
        names = [group.name for group in groups if group.kind == kind]
        if not names:
            continue
        values = torch.cat([scores[name].double().cpu() for name in names])
        # Compared, since the rounded mean of equal numbers need not be that number.
        equal = bool((values == values[0]).all())
        values = torch.zeros_like(values) if equal else (values - values.mean()) / values.std()
        result.update(zip(names, values.split([scores[name].numel() for name in names]), strict=True))
    return result


def select(
    groups: Sequence[Group],
    scores: Mapping[str, Tensor],
    costs: Mapping[str, float],
    share: float,
    round_to: RoundTo = 1,
    *,
    standardised: bool = True,
    towers: Sequence[Tower] = (),
) -> Selection:
    """Mark the channels with the highest (standardised) scores until their cost is nearest to `share` of the total.

    Channels are ranked in blocks: the sorted channels of a group are divided so that the number of kept channels is
    always a multiple of `round_to`; the first block takes the remainder. The last block of each group (its lowest
    scores) is never marked and does not count in the ranking, so the budget still holds.

    The groups of a tower lose equally many channels: their first blocks form one block with the mean of their scores,
    and so on. Such a block is expensive; if it exceeds the remaining budget, it is skipped, and cheaper blocks behind
    it fill the budget.

    Args:
        groups: the groups to rank together.
        scores: accumulated scores per group, shape [size].
        costs: cost of one channel per group.
        share: share of the total cost to mark, in [0, 1).
        round_to: channels per block; 1 ranks single channels. A whole head counts with all its dimensions.
        standardised: whether attention and MLP scores are standardised separately, as published; else raw scores are
            compared.
        towers: groups that lose equally many.
    """
    ranking = rank(groups, scores, round_to, standardised=standardised, towers=towers)
    if towers:
        return ranking.filled(share * sum(costs[group.name] * group.size for group in groups), costs)
    spent = torch.cat([torch.zeros(1, dtype=torch.float64), ranking.costs(costs).cumsum(0)])
    total = sum(costs[group.name] * group.size for group in groups)
    return ranking.selection(int((spent - share * total).abs().argmin()), costs)


@dataclass(frozen=True)
class Ranking:
    """The blocks of all groups in pruning order.

    Attributes:
        groups: all of them, in forward order.
        bundles: the groups that lose blocks together: one group, or all groups of a tower.
        orders: per bundle and group, its prunable channels, highest score first.
        lengths: per bundle, the number of channels of each group in each block.
        means: the mean score of every block, bundle by bundle, then of the groups that are pruned whole.
        walk: indices into `means`, in pruning order.
        whole: names of groups that are pruned whole and together, in addition to the blocks of the bundles.
    """

    groups: Sequence[Group]
    bundles: Sequence[Sequence[Group]]
    orders: Sequence[Sequence[Tensor]]
    lengths: Sequence[Tensor]
    means: Tensor
    walk: Tensor
    whole: Sequence[tuple[str, ...]] = ()
    _owners: Tensor = field(init=False)  # the place of the bundle of every block
    _channels: Tensor = field(init=False)  # how many channels of each of its groups every block has

    def __post_init__(self) -> None:
        """Index every block by its bundle."""
        counts = torch.tensor([len(each) for each in self.lengths], dtype=torch.long)
        object.__setattr__(self, "_owners", torch.arange(len(self.bundles)).repeat_interleave(counts))
        lengths = torch.cat(list(self.lengths)) if self.lengths else torch.zeros(0, dtype=torch.long)
        object.__setattr__(self, "_channels", lengths)

    def costs(self, costs: Mapping[str, float]) -> Tensor:
        """Return the cost of each block, in pruning order."""
        channel = torch.tensor(
            [sum(costs[group.name] for group in bundle) for bundle in self.bundles], dtype=torch.float64
        )
        return (self._channels.double() * channel[self._owners])[self.walk]

    def kept(self, count: int) -> dict[str, int]:
        """Return the number of kept channels per group after pruning `count` blocks."""
        pruned, whole = self._parts(count)
        lost = torch.zeros(len(self.bundles), dtype=torch.long)
        lost.index_add_(0, self._owners[pruned], self._channels[pruned])
        kept = {group.name: group.size for group in self.groups}
        for bundle, number in zip(self.bundles, lost.tolist(), strict=True):
            kept.update({group.name: group.size - number for group in bundle})
        return kept | dict.fromkeys(whole, 0)

    def _parts(self, count: int) -> tuple[Tensor, set[str]]:
        """Return the pruned blocks per bundle for a number of blocks, and the groups that are pruned whole."""
        pruned, blocks = self.walk[:count], len(self._channels)
        whole = [self.whole[place] for place in (pruned[pruned >= blocks] - blocks).tolist()]
        return pruned[pruned < blocks], {name for names in whole for name in names}

    def last(self, count: int) -> list[tuple[tuple[str, ...], list[int]]]:
        """Return, for a number of pruned blocks, the bundles and the lengths of their pruned blocks, last pruned first.

        Blocks with an infinite score were pruned earlier and are left out, and so are groups that are pruned whole.
        """
        pruned, whole = self._parts(count)
        found: dict[tuple[str, ...], list[int]] = {}
        for place in pruned.flip(0).tolist():
            if math.isfinite(self.means[place]):
                bundle = self.bundles[int(self._owners[place])]
                names = tuple(group.name for group in bundle if group.name not in whole)
                found.setdefault(names, []).append(int(self._channels[place]))
        return list(found.items())

    def selection(self, count: int, costs: Mapping[str, float], back: Mapping[str, int] | None = None) -> Selection:
        """Return the selection of the first `count` blocks, minus the last ones of given groups, which are kept."""
        chosen = torch.zeros(len(self.walk), dtype=torch.bool)
        chosen[self.walk[:count]] = True
        threshold = float(self.means[self.walk[count]]) if count < len(self.walk) else -math.inf
        return self._marked(chosen, costs, threshold, back or {})

    def without(self, count: int) -> Ranking:
        """Return the ranking in which the last of `count` blocks, and those behind it of its groups, come last."""
        last, blocks = int(self.walk[count - 1]), len(self._channels)
        later = self.walk[count - 1 :]
        kept = later == last
        if last < blocks:
            kept = (later < blocks) & (self._owners[later.clamp_max(blocks - 1)] == self._owners[last])
        return replace(self, walk=torch.cat([self.walk[: count - 1], later[~kept], later[kept]]))

    def filled(self, budget: float, costs: Mapping[str, float]) -> Selection:
        """Return the selection of blocks, in order, that fits the budget.

        It may exceed the budget by half of the smallest block. After a skipped block, its bundle loses no further ones.
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
        marked = {group.name: torch.zeros(group.size, dtype=torch.bool) for group in self.groups}
        *picks, whole = chosen.split([*(len(length) for length in self.lengths), len(self.whole)])
        for bundle, orders, length, picked in zip(self.bundles, self.orders, self.lengths, picks, strict=True):
            for group, order in zip(bundle, orders, strict=True):
                going = picked & (picked.cumsum(0) <= picked.sum() - back.get(group.name, 0))
                marked[group.name][order[going.repeat_interleave(length)]] = True
        for names, picked in zip(self.whole, whole.tolist(), strict=True):
            for name in names if picked else ():
                marked[name].fill_(True)
        spent = sum(costs[group.name] * int(marked[group.name].sum()) for group in self.groups)
        return Selection(marked, threshold, float(spent))


def rank(
    groups: Sequence[Group],
    scores: Mapping[str, Tensor],
    round_to: RoundTo = 1,
    *,
    standardised: bool = True,
    towers: Sequence[Tower] = (),
    depth: Depth = NONE,
) -> Ranking:
    """Return all prunable blocks of channels, highest (standardised) score first; see `select`.

    A group that may be pruned whole ends with a block of all remaining channels. It is ranked by loss per saving: the
    sum of its scores over its cost, fixed cost included. Blocks with a worse ratio than this last one are merged into
    it. The groups of one layer of a tower are treated likewise, together.
    """
    ranked = standardise(groups, scores) if standardised else {name: s.double().cpu() for name, s in scores.items()}
    pruned = {group.name for group in groups if depth and bool((ranked[group.name] == math.inf).all())}
    found = together([group for group in groups if group.name not in pruned], towers)
    orders, means, lengths = [], [], []
    for bundle, tower in found:
        both = [ranked[group.name].sort(descending=True, stable=True) for group in bundle]
        sizes = removable_blocks(bundle[0], round_to, tower)
        removable = sum(sizes)
        values = torch.stack([values[:removable] for values, _ in both]).mean(0)
        values = values if all(size == 1 for size in sizes) else _block_means(values, sizes)
        if tower is None and (bundle[0].name,) in depth.branches:
            sizes, values = depth.with_rest(bundle[0], both[0].values, sizes, values)
        orders.append([order[: sum(sizes)] for _, order in both])
        lengths.append(torch.tensor(sizes, dtype=torch.long))
        means.append(values)
    alone = {group.name for bundle, tower in found if tower is None for group in bundle}
    whole = [(names, depth.score(names, ranked)) for names in depth.branches if alone.isdisjoint(names)]
    flat_means = torch.cat([*means, torch.tensor([score for _, score in whole], dtype=torch.float64)])
    walk = flat_means.argsort(descending=True, stable=True)
    bundles = [bundle for bundle, _ in found]
    return Ranking(groups, bundles, orders, lengths, flat_means, walk, [names for names, _ in whole])


def select_as_published(
    groups: Sequence[Group], scores: Mapping[str, Tensor], costs: Mapping[str, float], share: float
) -> Selection:
    """Mark channels as the published implementation does, so that its masks can be reproduced.

    The threshold is the score at which the cumulated cost is nearest to the budget; only scores strictly above it
    are marked, and each group keeps the lowest of those. The marked cost is thus slightly below the budget.
    """
    ranked = standardise(groups, scores)
    flat = torch.cat([ranked[group.name] for group in groups])
    channel_costs = torch.cat([torch.full((group.size,), float(costs[group.name])) for group in groups]).double()
    ordered, order = flat.sort(descending=True)
    nearest = (channel_costs[order].cumsum(0) - share * channel_costs.sum()).abs().argmin()
    threshold = ordered[nearest]
    marked = {
        group.name: (ranked[group.name] > threshold) & (ranked[group.name] > ranked[group.name].min())
        for group in groups
    }
    cost = sum(costs[name] * int(pruned.sum()) for name, pruned in marked.items())
    return Selection(marked, float(threshold), float(cost))


def check_reachable(
    groups: Sequence[Group],
    costs: Mapping[str, float],
    ratio: float,
    round_to: RoundTo = 1,
    towers: Sequence[Tower] = (),
    whole: Container[str] = (),
    wider: Sequence[str] = (),
) -> None:
    """Raise unless `ratio` of the total cost can be removed while every group keeps its last block.

    Args:
        groups: to rank.
        costs: of one channel per group.
        ratio: the requested ratio.
        round_to: kept channels are multiples of this.
        towers: groups that lose equally many.
        whole: names of groups that may be pruned whole.
        wider: settings that would allow a larger ratio, in words.

    Raises:
        SettingError: it cannot; the message says the largest possible ratio, and which groups `round_to` leaves whole.
    """
    total = sum(costs[group.name] * group.size for group in groups)
    blocks = {group.name: channels_in_block(group, round_to) for group in groups}
    removable = sum(
        costs[group.name] * (group.size if group.name in whole else sum(removable_blocks(group, round_to, tower)))
        for bundle, tower in together(groups, towers)
        for group in bundle
    )
    if ratio * total > removable:
        largest = max(blocks.values())
        block = "channel" if largest == 1 else f"block of {largest} channels" if round_to == largest else "block"
        stays = [group.name for group in groups if group.size < 2 * blocks[group.name]]
        stay = (
            f" (with round_to={format_round_to(round_to)}, {len(stays)} of them stay whole)"
            if stays and largest > 1
            else ""
        )
        wider = [*(["a smaller round_to"] if largest > 1 else []), *wider]
        raise SettingError(
            f"ratio={ratio} cannot be reached: every one of the {len(groups)} groups keeps at least one {block}{stay}, "
            f"so at most {math.floor(removable / total * 1e4) / 1e4} of the cost can be removed. "
            f"Lower the ratio{', or use ' if wider else ''}{', or '.join(wider)}."
        )


def _block_means(values: Tensor, sizes: list[int]) -> Tensor:
    """Return the mean of every block of the sorted `values`, never increasing despite rounding."""
    if not sizes:
        return values
    return torch.stack([block.mean() for block in torch.split(values, sizes)]).cummin(0).values
