"""What one forward pass knows of its tokens, handed from layer to layer with the hidden states.

It belongs to the pass: it is kept on the tensor that a layer returns and the next one takes, so that several passes at
once, layers that are recomputed in the backward pass, and replicas of a model do not meet. Where a hook puts
another tensor in its place (on another device, for instance), the thread remembers the pass that it is in.
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
    """The tokens of a pass, where a layer starts.

    Attributes:
        owner: the `Merger` that the layers belong to.
        layer: the number of the layer.
        size: how many tokens each stands for, [batch, tokens]; None for one each.
        guide: position of the token that guides the matching, where each row has its own (the end of a text), [batch].
        matches: of the layers so far, None for a layer that removed nothing.
        cross: the cross tokens of all layers, [1, layers, C], or of the first one if layers keep their own; None if
            there are none.
        crosses: the cross tokens that went into the layers so far, [batch, C] each.
    """

    owner: Any
    layer: int = 0
    size: Tensor | None = None
    guide: Tensor | None = None
    cross: Tensor | None = None
    matches: tuple[Match | None, ...] = ()
    crosses: tuple[Tensor, ...] = ()

    def sizes(self, tokens: Tensor) -> Tensor:
        """Return the sizes of tokens [batch, tokens, C], in float32 at least."""
        if self.size is not None:
            return self.size
        exact = accumulator(tokens)
        return torch.ones(tokens.shape[:2], dtype=exact, device=tokens.device)

    def on(self, device: torch.device) -> Flow:
        """Return it on the device that the tokens are on."""
        held = (self.size, self.guide, self.cross)
        if all(each is None or each.device == device for each in held):
            return self
        size, guide, cross = (None if each is None else each.to(device) for each in held)
        return replace(self, size=size, guide=guide, cross=cross)

    def with_cross(self, cross: Tensor) -> Flow:
        """Return it with the cross token that goes into this layer, [batch, C]."""
        return replace(self, crosses=(*self.crosses, cross))

    def after(self, size: Tensor | None, found: Match | None) -> Flow:
        """Return what the next layer starts with."""
        guide = self.guide
        if guide is not None and found is not None:  # it is protected, so that only its place changes
            guide = guide - (found.source < guide.unsqueeze(1)).sum(1)
        return replace(self, layer=self.layer + 1, size=size, guide=guide, matches=(*self.matches, found))

    def unmerged(self, tokens: Tensor) -> Tensor:
        """Return tokens as many as there were, [B, T, C], the merged ones at each of their places, no cross token."""
        for found in reversed(self.matches):
            tokens = tokens if found is None else unmerge(tokens, found)
        return tokens if self.cross is None else tokens[:, :-1]


def flow_of(tokens: Tensor, owner: Any) -> Flow | None:
    """Return what a pass knows of tokens that came out of a layer of the owner's, or were given to the first."""
    found = getattr(tokens, _NAME, None)
    if found is None and not torch.compiler.is_compiling():
        shape, found = getattr(_latest, "pass_", (None, None))
        if shape != tokens.shape[:2]:
            return None
    return found.on(tokens.device) if isinstance(found, Flow) and found.owner is owner else None


def carry(tokens: Tensor, flow: Flow) -> Tensor:
    """Put what a pass knows onto its tokens, and return them."""
    setattr(tokens, _NAME, flow)
    if not torch.compiler.is_compiling():
        _latest.pass_ = (tokens.shape[:2], flow)
    return tokens


def note(tokens: Tensor, flow: Flow) -> None:
    """Remember what was merged up to here in a pass, for `upop.pruning.merged`."""
    if not torch.compiler.is_compiling():
        _latest.merged = (tokens.shape[:2], flow)


def _unmerge_of(tokens: Tensor) -> Unmerge | None:
    shape, flow = getattr(_latest, "merged", (None, None))
    return flow.unmerged if shape == tokens.shape[:2] and flow is not None else None


finders.append(_unmerge_of)
