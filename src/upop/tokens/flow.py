"""The state of token merging in one forward pass, which travels from layer to layer with the hidden states.

The state is an attribute of the tensor that a layer returns and the next one takes, so that concurrent passes, layers
recomputed in the backward pass, and replicas of a model do not interfere. If a hook replaces the tensor (to move it to
another device, for instance), the state is found by thread.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from upop.pruning.merged import Unmerge, finders
from upop.pruning.precision import accumulator
from upop.tokens.matching import Match, unmerge

_NAME = "_upop_tokens"
_latest = threading.local()


@dataclass(frozen=True)
class Flow:
    """The state at the input of a layer.

    Attributes:
        owner: the `Merger` of the layers.
        layer: index of the layer.
        size: number of original tokens in each token, [batch, tokens]; None if all are 1.
        guide: position of the guiding token if rows differ in it (the end of a text), [batch].
        matches: matches of the previous layers; None for a layer that removed nothing.
        cross: the cross tokens of all layers, [1, layers, hidden], or of the first one if layers keep their own; None
            if there are none.
        crosses: the cross tokens of the previous layers, [batch, hidden] each.
    """

    owner: Any
    layer: int = 0
    size: Tensor | None = None
    guide: Tensor | None = None
    cross: Tensor | None = None
    matches: tuple[Match | None, ...] = ()
    crosses: tuple[Tensor, ...] = ()

    def sizes(self, tokens: Tensor) -> Tensor:
        """Return the sizes of tokens, [batch, tokens], at least in float32."""
        if self.size is not None:
            return self.size
        exact = accumulator(tokens)
        return torch.ones(tokens.shape[:2], dtype=exact, device=tokens.device)

    def on(self, device: torch.device) -> Flow:
        """Return the state on a device."""
        held = (self.size, self.guide, self.cross)
        if all(each is None or each.device == device for each in held):
            return self
        size, guide, cross = (None if each is None else each.to(device) for each in held)
        return replace(self, size=size, guide=guide, cross=cross)

    def with_cross(self, cross: Tensor) -> Flow:
        """Return the state with the cross token of this layer, [batch, hidden]."""
        return replace(self, crosses=(*self.crosses, cross))

    def after(self, size: Tensor | None, found: Match | None) -> Flow:
        """Return the state at the input of the next layer."""
        guide = self.guide
        if guide is not None and found is not None:  # it is protected, so only its position changes
            guide = guide - (found.source < guide.unsqueeze(1)).sum(1)
        return replace(self, layer=self.layer + 1, size=size, guide=guide, matches=(*self.matches, found))

    def masked(self, mask: Tensor, tokens: int) -> Tensor:
        """Return an attention mask for the remaining tokens, [batch, heads, 1 or tokens, tokens].

        Some models make one mask for all layers, [batch or 1, heads or 1, 1 or T, T], at least while they are exported.
        """
        for found in self.matches if mask.shape[-1] != tokens and mask.dim() == 4 else ():
            if found is not None:
                left, (_, heads, rows, _) = found.kept, mask.shape
                mask = mask.expand(left.shape[0], -1, -1, -1)  # len() would fix the batch of a graph
                mask = mask.gather(3, left[:, None, None, :].expand(-1, heads, rows, -1))
                mask = (
                    mask if rows == 1 else mask.gather(2, left[:, None, :, None].expand(-1, heads, -1, left.shape[1]))
                )
        return mask

    def unmerged(self, tokens: Tensor) -> Tensor:
        """Restore all tokens but the cross token, [batch, tokens, hidden]; merged ones are at all their positions."""
        for found in reversed(self.matches):
            tokens = tokens if found is None else unmerge(tokens, found)
        return tokens if self.cross is None else tokens[:, :-1]


def flow_of(tokens: Tensor, owner: Any) -> Flow | None:
    """Return the state of tokens that a layer of the owner returned, or that its first layer takes."""
    found = getattr(tokens, _NAME, None)
    if found is None and not torch.compiler.is_compiling():
        shape, found = getattr(_latest, "pass_", (None, None))
        if shape != tokens.shape[:2]:
            return None
    return found.on(tokens.device) if isinstance(found, Flow) and found.owner is owner else None


def carry(tokens: Tensor, flow: Flow) -> Tensor:
    """Attach the state to tokens, and return them."""
    setattr(tokens, _NAME, flow)
    if not torch.compiler.is_compiling():
        _latest.pass_ = (tokens.shape[:2], flow)
    return tokens


def note(tokens: Tensor, flow: Flow) -> None:
    """Record the state after merging for `upop.pruning.merged`."""
    if not torch.compiler.is_compiling():
        _latest.merged = (tokens.shape[:2], flow)


def _unmerge_of(tokens: Tensor) -> Unmerge | None:
    shape, flow = getattr(_latest, "merged", (None, None))
    return flow.unmerged if shape == tokens.shape[:2] and flow is not None else None


finders.append(_unmerge_of)
