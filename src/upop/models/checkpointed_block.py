"""timm's block with gradient checkpointing; apart, because it imports timm."""

from __future__ import annotations

from typing import Any

import torch
from timm.models.vision_transformer import Block
from torch.utils.checkpoint import checkpoint


class CheckpointedBlock(Block):
    """A block of timm's vision transformer with checkpointing in training."""

    wraps_forward = True
    """The checkpoint recomputes the forward passes of all base classes; see `upop.tokens.layer.set_merging`."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the block's output, recomputed in the backward pass."""
        if not (self.training and torch.is_grad_enabled()):
            return super().forward(*args, **kwargs)
        return checkpoint(super().forward, *args, use_reentrant=False, **kwargs)
