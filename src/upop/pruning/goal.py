"""The goal of a compression, a share of the cost or a target for the whole model, and the channels to prune for it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from upop.pruning import budget
from upop.pruning.beforehand import lost_parameters
from upop.pruning.budget import Ranking, Selection
from upop.pruning.choice import check_ratio
from upop.pruning.counting import Quantity, Sizes, parameters_of
from upop.pruning.depth import NONE, Depth
from upop.pruning.errors import SettingError
from upop.pruning.groups import Group
from upop.pruning.latency import Latency, Profile
from upop.pruning.round_to import RoundTo, channels_in_block, format_round_to
from upop.pruning.targets import Limit, Target, format_target, lost_before, quantity_of, read_target
from upop.pruning.uniform import Tower, removable_blocks, together
from upop.pruning.width import streams_among

_TOLERANCE = 0.01
"""A target is reached within this share of the dense model's count."""
_TRIES = 32
"""Rankings that are tried for one that comes so close."""


@dataclass(frozen=True)
class Bound:
    """A limit of a target, for one model.

    Attributes:
        limit: as requested.
        quantity: the count that it limits.
        most: the largest allowed count of the whole model.
        dense: the count before any pruning, also that before the search.
    """

    limit: Limit
    quantity: Quantity | Latency
    most: float
    dense: float

    @classmethod
    def of(cls, limit: Limit, quantity: Quantity | Latency, model: nn.Module) -> Bound:
        """Return the limit for a model, whose share counts what the model lost before the search."""
        dense = quantity.whole + (lost_before(limit, model))
        return cls(limit, quantity, limit.most(dense), dense)

    def after(self, part: float) -> float:
        """Return the allowed count at a progress in [0, 1]."""
        return self.quantity.whole - part * (self.quantity.whole - self.most)


class Goal:
    """The requested size of a compressed model.

    Args:
        ratio: share of the groups' cost to remove, in (0, 1), or
        target: limits for the whole model.
        profile: of the machine, for a target in milliseconds.

    Attributes:
        ratio: as requested, or None.
        limits: of the target.
        asked_share: the ratio, or the target as a share of the largest possible reduction, in (0, 1]; set by `begin`.

    Raises:
        SettingError: neither or both are given, or one is invalid.
    """

    def __init__(self, ratio: float | None, target: Target | None, profile: Profile | None = None) -> None:
        if (ratio is None) == (target is None):
            described = "neither of them was given" if ratio is None else f"found ratio={ratio!r} and target={target!r}"
            raise SettingError(
                "Give either ratio=, the share of the prunable cost to remove, or target=, limits for the whole "
                f"model, such as target={{'params': 0.5}}; {described}."
            )
        self.ratio = None if ratio is None else check_ratio(ratio)
        self.limits = () if target is None else read_target(target)
        self.asked_share = self.ratio or 0.0
        self._bounds: tuple[Bound, ...] = ()
        self._whole = 0.0
        self._parameters: Quantity | None = None
        self._lost = 0
        self._towers: Sequence[Tower] = ()
        self._depth = NONE
        self._profile = profile

    def __str__(self) -> str:
        """Return the goal in words."""
        return f"ratio={self.ratio:g}" if self.ratio is not None else format_target(self.limits)

    def settings(self) -> dict[str, Any]:
        """Return the goal as settings, for plans and resumed searches."""
        return {"ratio": self.ratio} if self.ratio is not None else {"target": format_target(self.limits)}

    def begin(
        self,
        model: nn.Module,
        groups: Sequence[Group],
        costs: Mapping[str, float],
        round_to: RoundTo,
        example: Any,
        towers: Sequence[Tower] = (),
        branches: Sequence[tuple[str, ...]] = (),
    ) -> None:
        """Bind the goal to a model, its towers, and its removable branches.

        Args:
            model: the dense model.
            groups: the groups that are searched.
            costs: of one channel per group.
            round_to: kept channels are multiples of this.
            example: inputs for one forward pass.
            towers: groups that lose equally many.
            branches: names of groups that may be pruned whole, together.

        Raises:
            SettingError: the goal cannot be reached; the message has the possible reduction, and what allows more.
            LayoutError: the count cannot be predicted before the cut.
        """
        self._whole = sum(costs[group.name] * group.size for group in groups)
        self._parameters = parameters_of(model, groups)
        self._lost = lost_parameters(model)
        self._towers = towers
        reach = _Reach(groups, round_to, towers, branches, _share_of_words(model))
        if self.ratio is not None:
            whole = {name for names in branches for name in names}
            budget.check_reachable(groups, costs, self.ratio, round_to, towers, whole, reach.wider()[round_to != 1 :])
            self._depth = Depth(dict.fromkeys(branches, 0.0), costs)
            return
        found = [(limit, quantity_of(limit, model, groups, example, self._profile)) for limit in self.limits]
        self._bounds = tuple(Bound.of(limit, each, model) for limit, each in found)
        if all(bound.most >= bound.quantity.whole for bound in self._bounds):
            have = " and ".join(
                _number(bound.quantity.whole)
                + (f" of {_number(bound.dense)}" if bound.dense > bound.quantity.whole else "")
                + f" {bound.limit.words}"
                for bound in self._bounds
            )
            raise SettingError(f"{self} removes nothing: the model has {have}. Give a smaller target.")
        self.asked_share = max(reach.check(bound) for bound in self._bounds)
        self._depth = self._priced(groups, costs, branches)

    def _priced(
        self, groups: Sequence[Group], costs: Mapping[str, float], branches: Sequence[tuple[str, ...]]
    ) -> Depth:
        """Return the saving of whole branches: in milliseconds for such a target, else in the cost of channels."""
        latency = self._latency
        if latency is None:
            return Depth(dict.fromkeys(branches, 0.0), costs)
        of = {group.name: group for group in groups}
        beside = {names: sum(latency.beside(of[name]) for name in names) for names in branches}
        return Depth(beside, {group.name: latency.channel(group) for group in groups})

    @property
    def _latency(self) -> Latency | None:
        return next((bound.quantity for bound in self._bounds if isinstance(bound.quantity, Latency)), None)

    def select(
        self,
        groups: Sequence[Group],
        scores: Mapping[str, Tensor],
        costs: Mapping[str, float],
        part: float,
        round_to: RoundTo = 1,
        *,
        standardised: bool = True,
    ) -> Selection:
        """Select the channels to prune at a given progress, highest scores first.

        With a target in milliseconds, scores are compared per saved millisecond, unless they are standardised.

        Args:
            groups: those of `begin`, at their current sizes.
            scores: per group, [size].
            costs: of one channel per group.
            part: progress towards the goal, in (0, 1].
            round_to: kept channels are multiples of this.
            standardised: as for `budget.select`.
        """
        if self.ratio is None or self._depth:
            if not standardised:
                scores = self._per_millisecond(groups, scores)
            ranking = budget.rank(
                groups, scores, round_to, standardised=standardised, towers=self._towers, depth=self._depth
            )
            return self._select_to(ranking, costs, self._holding(costs, part), part)
        left = sum(costs[group.name] * group.size for group in groups)
        share = self.ratio * part if left == self._whole else max(0.0, 1 - self._whole * (1 - self.ratio * part) / left)
        return budget.select(groups, scores, costs, share, round_to, standardised=standardised, towers=self._towers)

    def _per_millisecond(self, groups: Sequence[Group], scores: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        latency = self._latency
        if latency is None:
            return scores
        return {group.name: scores[group.name] / latency.channel(group) for group in groups}

    def share(self, sizes: Callable[[float], Sizes]) -> float:
        """Return the smallest share, to 1e-6, at which all limits hold; sizes must fall as it grows."""
        low, high = 0.0, 1.0
        while high - low > 1e-6:
            middle = (low + high) / 2
            enough = all(bound.quantity.at(sizes(middle)) <= bound.most for bound in self._bounds)
            low, high = (low, middle) if enough else (middle, high)
        return high

    def _holding(self, costs: Mapping[str, float], part: float) -> Callable[[Sizes], bool]:
        """Return whether sizes meet the limits at a given progress."""
        # Binary fractions of a limit need not be whole numbers.
        if self.ratio is not None:
            left = self._whole * (1 - self.ratio * part + 1e-9)
            return lambda kept: sum(costs[name] * count for name, count in kept.items()) <= left
        most = [bound.after(part) + 1e-9 * bound.quantity.whole for bound in self._bounds]
        return lambda kept: all(
            bound.quantity.at(kept) <= limit for bound, limit in zip(self._bounds, most, strict=True)
        )

    def _select_to(
        self, ranking: Ranking, costs: Mapping[str, float], holds: Callable[[Sizes], bool], part: float
    ) -> Selection:
        """Return the selection that meets all limits, minus channels that the limits leave room for.

        A block that is large beside the model (a channel of a narrow residual stream) may leave more room than a target
        allows for. Smaller ones that come later in the ranking then go in its place, if they come closer.
        """
        found: list[tuple[float, Selection]] = []
        while True:
            low, high = 0, len(ranking.walk)
            while low < high:
                middle = (low + high) // 2
                low, high = (low, middle) if holds(ranking.kept(middle)) else (middle + 1, high)
            stay = self._stay(ranking, low, holds)
            selection = ranking.selection(low, costs, stay)
            kept = {name: each.numel() - int(each.sum()) for name, each in selection.marked.items()}
            room = self._room(kept, part)
            if not found or holds(kept):
                found.append((room, selection))
            if room <= _TOLERANCE or not low or len(found) == _TRIES or not holds(kept):
                return min(found, key=lambda each: each[0])[1]
            ranking = ranking.without(low)

    def _room(self, kept: Sizes, part: float) -> float:
        """Return how far final sizes are below the limit that binds them, as a share of the whole; 0 before the end.

        Milliseconds have no such share: a device may have steps of any size.
        """
        if part < 1 or self._latency is not None:
            return 0.0
        return min(
            ((bound.most - bound.quantity.at(kept)) / bound.quantity.whole for bound in self._bounds), default=0.0
        )

    def _stay(self, ranking: Ranking, count: int, holds: Callable[[Sizes], bool]) -> dict[str, int]:
        """Return how many of the last pruned blocks each group gets back while the limits hold."""
        kept = dict(ranking.kept(count))
        back: dict[str, int] = {}
        for names, sizes in ranking.last(count):  # sizes of the groups' blocks that go, the last one first
            low, high = 0, len(sizes)
            while low < high:
                middle = (low + high + 1) // 2
                enough = holds({**kept, **{name: kept[name] + sum(sizes[:middle]) for name in names}})
                low, high = (middle, high) if enough else (low, middle - 1)
            for name in names if low else ():
                back[name] = low
                kept[name] += sum(sizes[:low])
        return back

    def described(self, kept: Sizes) -> dict[str, Any]:
        """Return plan settings: the goal, and the counts of the model after a cut to these sizes."""
        counted: dict[str, tuple[str, float, Quantity | Latency, dict[str, str]]] = {}
        if self._parameters is not None:
            counted["params"] = ("parameters", self._parameters.whole + self._lost, self._parameters, {})
        for bound in self._bounds:
            kind = "bytes" if bound.limit.in_bytes else bound.limit.kind
            counted[kind] = (bound.limit.words, bound.dense, bound.quantity, {"asked": bound.limit.asked})
        reached = {
            kind: {"of": words, "dense": dense, "left": quantity.at(kept), **asked}
            for kind, (words, dense, quantity, asked) in counted.items()
        }
        return self.settings() | ({"reached": reached} if reached else {})


def format_reached(settings: Mapping[str, Any]) -> str:
    """Format the counts in the settings of a plan: "731,234 of 1,270,000 parameters (1.74x)"."""
    return ", ".join(
        f"{_number(each['left'])} of {_number(each['dense'])} {each['of']} ({each['dense'] / (each['left'] or 1):.3g}x)"
        for each in settings.get("reached", {}).values()
    )


def _share_of_words(model: nn.Module) -> float:
    tables = {id(each.weight): each.weight.numel() for each in model.modules() if isinstance(each, nn.Embedding)}
    return max(tables.values(), default=0) / max(1, sum(each.numel() for each in model.parameters()))


def _number(count: float) -> str:
    return f"{count:,}" if isinstance(count, int) else f"{count:,.0f}" if count >= 1000 else f"{count:.3g}"


def _share(count: float, dense: float) -> float:
    """Return the share to request for a count, in four decimals."""
    return math.ceil(1e4 * count / dense - 1e-9) / 1e4


@dataclass(frozen=True)
class _Reach:
    """The smallest possible sizes of a model.

    Attributes:
        groups: the groups that are searched.
        round_to: kept channels are multiples of this.
        towers: groups that lose equally many.
        branches: names of groups that may be pruned whole, together.
        words: the share of the parameters in word embeddings.
    """

    groups: Sequence[Group]
    round_to: RoundTo
    towers: Sequence[Tower]
    branches: Sequence[tuple[str, ...]]
    words: float = 0.0

    def wider(self, bound: Bound | None = None) -> list[str]:
        """Return which settings would allow a larger reduction, in words; with a limit, also how far."""
        found = [f"a smaller round_to than {format_round_to(self.round_to)}"] if self.round_to != 1 else []
        found += ['no uniform="tower"'] if self.towers else []
        if not self.branches:
            most = ""
            if bound is not None:
                least = bound.quantity.at({group.name: 0 for group in self.groups})
                most = f", down to {bound.limit.kind}={_share(least, bound.dense):g} if all are pruned"
            found.append(f"depth=True (prunes whole branches{most})")
        if bound is not None and bound.limit.kind != "latency" and not streams_among(self.groups):
            found.append("width=True (prunes channels of the residual stream)")
        if bound is not None and bound.limit.kind == "params" and self.words >= _TOLERANCE:
            found.append(f"upop.reduce_vocabulary (embeddings have {self.words:.0%} of the parameters)")
        return [*found, "more groups (include=, exclude=)"]

    def check(self, bound: Bound) -> float:
        """Return a limit as a share of the largest possible reduction, in [0, 1]; raise if it cannot be met closely."""
        dense, words, limit = bound.quantity.whole, bound.limit.words, bound.limit
        bundles = [
            (bundle, removable_blocks(bundle[0], self.round_to, tower))
            for bundle, tower in together(self.groups, self.towers)
        ]
        whole = {name for names in self.branches for name in names}
        least = {
            group.name: 0 if group.name in whole else group.size - sum(blocks)
            for bundle, blocks in bundles
            for group in bundle
        }
        floor = bound.quantity.at(least)
        if floor > bound.most:
            left = "nothing" if len(whole) == len(self.groups) else "one channel or block"
            raise SettingError(
                f"target {limit} cannot be reached: that is {_number(bound.most)} {words}, and with {left} "
                f"left in each of the {len(self.groups)} groups the model still has {_number(floor)} of "
                f"{_number(bound.dense)}. Ask for {limit.kind}={_share(floor, bound.dense):g} or more. "
                f"These allow more: {', '.join(self.wider(bound))}. "
                + (
                    ""
                    if streams_among(self.groups)
                    else "Embeddings, heads, norms and biases are in no group, and stay."
                )
            )
        asked = max(0.0, dense - bound.most) / max(dense - floor, 1e-9 * dense)
        if isinstance(bound.quantity, Latency):
            return asked  # a device may take no note of anything smaller than its own steps
        finest = {
            dense - bound.quantity.at({group.name: group.size - blocks[-1] for group in bundle})
            for bundle, blocks in bundles
            if blocks
        } - {0}
        smallest = min(finest, default=0)
        if smallest <= _TOLERANCE * dense:
            return asked
        counts = _reachable(bound, bundles)
        below = max((each for each in counts if each <= bound.most + 1e-9 * dense), default=-math.inf)
        if bound.most - below <= _TOLERANCE * dense:
            return asked
        channels = max(channels_in_block(group, self.round_to) for group in self.groups)
        above = min((each for each in counts if bound.most < each < dense), default=-math.inf)
        near = " or ".join(f"{_share(each, bound.dense):g}" for each in (below, above) if each > 0)
        raise SettingError(
            f"target {limit} cannot be reached within 1 %: the smallest possible cut, {channels} "
            f"channel{'' if channels == 1 else 's'} of {'every group of a tower' if self.towers else 'a group'}, has "
            f"{100 * smallest / dense:.1f} % of the {words}. "
            + (f"Ask for {limit.kind}={near}, or give" if near else "Give")
            + " a smaller round_to, or a ratio."
        )


def _reachable(bound: Bound, bundles: Sequence[tuple[Sequence[Group], Sequence[int]]]) -> list[float]:
    """Return all reachable counts, if blocks are few or alike, such as key-value groups in a cache."""
    dense = bound.quantity.whole

    def without(bundle: Sequence[Group], channels: int) -> float:
        return bound.quantity.at({group.name: group.size - channels for group in bundle})

    counted = [(bundle, blocks) for bundle, blocks in bundles if blocks and without(bundle, blocks[-1]) < dense]
    if len(counted) == 1:
        ((bundle, blocks),) = counted
        return [without(bundle, sum(blocks[:pruned])) for pruned in range(len(blocks) + 1)]
    steps = {dense - without(bundle, block) for bundle, blocks in counted for block in set(blocks)}
    total = sum(len(blocks) for _, blocks in counted)
    return [dense - pruned * step for step in steps for pruned in range(total + 1)] if len(steps) == 1 else []
