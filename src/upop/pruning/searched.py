"""State of a search: the groups, their masks and scores, and the inputs of the first call."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from upop.pruning.choice import chosen, refuse_frozen
from upop.pruning.costs import Arguments, Cost, channel_costs, current_cost
from upop.pruning.depth import branches_of
from upop.pruning.errors import LayoutError, StepError
from upop.pruning.frozen import partly_frozen
from upop.pruning.goal import Goal
from upop.pruning.groups import Group, Kind, tensor_of
from upop.pruning.known import know_as
from upop.pruning.masks import Masks, unwrapped
from upop.pruning.moments import Moments
from upop.pruning.plan import misfit
from upop.pruning.prunable import groups_to_search, waits_for_batch
from upop.pruning.round_to import RoundTo
from upop.pruning.scores import RowScores, Scoring
from upop.pruning.seen import FirstCall, Kept, examples_of, read_first
from upop.pruning.sharded import refuse_flattened
from upop.pruning.shrink import refuse_shared
from upop.pruning.stated import Stated
from upop.pruning.uniform import Uniform, to_keep_alike
from upop.pruning.warn import warn_of_uncovered
from upop.pruning.width import blocks_among

Patterns = str | Sequence[str] | None


class Searched(ABC):
    """A model during a search.

    A custom model is traced with its first batch, unless an example is given: generated inputs might take another path
    through its forward.

    Args:
        model: changed in place.
        goal: the requested size.
        cost: of a channel.
        round_to: kept sizes are multiples of this.
        patterns: of groups to include and to exclude.
        example: inputs for one forward pass; None waits for the first batch, if inputs are needed.
        stated: groups that the user states.
        scoring: how rows are scored.
        uniform: whether the layers of a tower keep equally many channels.
        depth: whether branches may be pruned whole.
        width: whether channels of residual streams are pruned.

    Attributes:
        rotate: whether heads are rotated to the principal axes of the first batch.
    """

    rotate: bool

    def __init__(
        self,
        model: nn.Module,
        goal: Goal,
        cost: Cost,
        round_to: RoundTo,
        patterns: tuple[Patterns, Patterns],
        example: Any,
        stated: Sequence[Stated],
        scoring: Scoring,
        uniform: Uniform | None = None,
        depth: bool = False,
        width: bool = False,
    ) -> None:
        self.model, self._wrapper = unwrapped(model), weakref.ref(model)
        refuse_flattened(self.model)
        self.cost, self.round_to, self._goal, self.uniform = current_cost(cost), round_to, goal, uniform
        self.depth, self.width = depth, width
        self._patterns, self._example, self._stated = patterns, example, stated
        self._rows: RowScores[tuple[str, int]] = RowScores(scoring.rows)
        self._moments = Moments(alone=self._is_one_step())
        self._attached = True
        self._groups: list[Group] | None = None
        self._resumed: Mapping[str, Any] | None = None  # a state that waits for the groups
        waits = example is None and waits_for_batch(self.model)
        if not waits:
            self._begin(self._read(example))
        if waits:
            self._first = FirstCall(self.model, self._begin_with, self._note)
        else:
            self._first = self._first_call()

    def _first_call(self) -> FirstCall:
        """Observe the next call; to rotate heads, the first one of training, which processes share the samples of."""
        if self.rotate:
            return FirstCall(self.model, lambda *_: None, learning=True)
        return FirstCall(self.model, wrapper=self._wrapper())

    def _begin_with(self, kept: Kept, arguments: Arguments) -> None:
        """Trace the model with the inputs of its first call, before it runs."""
        self._example = arguments
        try:
            self._begin(read_first(kept.inputs(self.model), self._read))
        finally:
            self._example = None
        if self._resumed is not None:  # before this pass is noted: what is held becomes what the state holds
            self.load_state_dict(self._resumed)

    def _note(self, arguments: Arguments) -> None:
        """Observe the pass that supplied the inputs for tracing."""
        if self._moments.observing:
            self._moments.begin(self.model, *arguments)

    def _read(self, example: Any) -> list[Group]:
        return groups_to_search(self.model, example, self._stated, width=self.width)

    def _begin(self, groups: list[Group]) -> None:
        """Mask the chosen groups."""
        found = chosen(groups, *self._patterns, depth=self.depth)
        groups, self._towers, layers = to_keep_alike(self.model, found, self.uniform, groups, depth=self.depth)
        warn_of_uncovered(self.model)
        refuse_frozen(self.model, groups)
        refuse_shared(self.model, groups)
        self._costs = channel_costs(self.model, groups, self.cost, self._example)
        branches: list[tuple[str, ...]] = []
        if self.depth:
            examples = examples_of(self.model) if self._example is None else [self._example]
            blocks = blocks_among(groups)
            branches = branches_of(self.model, blocks, examples, layers if self.uniform else None)
        self._goal.begin(self.model, groups, self._costs, self.round_to, self._example, self._towers, branches)
        self._masks = Masks(self.model, groups)
        self._groups = groups
        self._observe_gradients()
        self._scores = {name: torch.zeros_like(mask) for name, mask in self._masks.values.items()}
        self._observe_inputs()

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a saved state."""

    @abstractmethod
    def _is_one_step(self) -> bool:
        """Whether the search has a single step."""

    @abstractmethod
    def _observe_inputs(self) -> None:
        """Observe the inputs of consumers, in the steps that need them only."""

    @property
    def groups(self) -> list[Group]:
        """The searched groups, in forward order.

        Raises:
            StepError: the model is custom, without an example, and has not been called yet.
        """
        self._refuse_unread()
        return self._groups or []

    @property
    def ratio(self) -> float | None:
        """The share of the cost to remove; None with a target."""
        return self._goal.ratio

    @property
    def is_read(self) -> bool:
        """Whether the groups are known; a custom model may wait for its first call."""
        return self._groups is not None

    def _refuse_unread(self) -> None:
        if self._groups is None:
            raise StepError(
                f"The groups of {type(self.model).__name__} are found at its first call after the Pruner was made, and "
                "it has not been called as a module yet: model(batch), not model.forward(batch) or a "
                "part of it. Call it first, or give the arguments of a call: Pruner(..., example=...)."
            )

    @property
    def costs(self) -> dict[str, float]:
        """The cost of one channel of every group."""
        return {group.name: self._costs[group.name] for group in self.groups}

    @property
    def scores(self) -> dict[str, Tensor]:
        """The accumulated scores per group, [size]; with stages, since the last stage."""
        return {group.name: self._scores[group.name].clone() for group in self.groups}

    @property
    def masks(self) -> dict[str, Tensor]:
        """The mask per group, shape [size], channels in [0, 1]."""
        return {group.name: self._masks.values[group.name].clone() for group in self.groups}

    def mask_sum(self, kind: Kind) -> float:
        """Return the sum of all masks of a kind, the sparsity term of the published loss."""
        return float(sum(self._masks.values[group.name].sum() for group in self.groups if group.kind == kind))

    def kept_share(self, modality: str | None = None, kind: Kind | None = None) -> float:
        """Return the unmasked share of the cost, of all groups or of a modality or kind; 1 at first."""
        kept = total = 0.0
        for group in self.groups:
            if (modality is None or group.modality == modality) and (kind is None or group.kind == kind):
                kept += self._costs[group.name] * int((self._masks.values[group.name] == 1).sum())
                total += self._costs[group.name] * group.size
        return kept / total if total else 1.0

    def _inputs(self) -> Iterator[Any]:
        """Yield possible inputs of the model."""
        if self._first.kept is not None:
            yield from self._first.kept.inputs(self.model)
        if self._example is not None:
            yield self._example
        yield from examples_of(self.model)

    def move_to(self, model: nn.Module) -> None:
        """Continue the search with another copy of the model, sharded or whole.

        The masks move from the old copy to the new one; scores and steps stay.

        Args:
            model: a copy with the same groups; `upop.full_copy` makes a whole copy of a sharded model.

        Raises:
            LayoutError: it has other groups, or belongs to another Pruner; the search continues with the old copy.
        """
        wrapper, model = weakref.ref(model), unwrapped(model)
        refuse_flattened(model)
        if any(misfit(model, group) for group in self.groups):
            raise LayoutError(
                f"This {type(model).__name__} has other groups than the searched model. Give a copy of that model."
            )
        masks = None if model is self.model else Masks(model, self.groups)  # refused before the old one is let go
        know_as(model, self.model)
        seen = self._moments.state()  # the stage's passes count for its correction, wherever it ends
        self._detach()
        self.model, self._wrapper = model, wrapper
        self._attach(masks)
        self._moments.resume(seen)
        if self._first.kept is None:
            self._first = self._first_call()

    def remove(self) -> None:
        """Remove the masks without a cut; corrections of layers stay."""
        self._detach()
        self._first.forget()

    def _detach(self) -> None:
        self._first.release()
        if self._attached:
            if self._groups is not None:
                self._masks.remove()
            self._rows.release()
            self._moments.release()
            self._attached = False

    def _attach(self, fresh: Masks | None = None) -> None:
        masks = self.masks
        self._masks = fresh or Masks(self.model, self.groups)
        self._masks.set(masks)
        self._observe_gradients()
        self._attached = True
        self._observe_inputs()

    def _observe_gradients(self) -> None:
        self._rows.observe((tensor_of(self.model, p.tensor), p.dim) for group in self.groups for p in group.scored)
        self._rows.observe_frozen(self.model, partly_frozen(self.model, self.groups))
