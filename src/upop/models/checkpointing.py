"""Gradient checkpointing: blocks recompute their activations in the backward pass instead of storing them.

Losses and gradients stay the same, also with masks, at the cost of one more forward pass. Saved files do not change.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from timm.models.vision_transformer import Block
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from upop.errors import SettingError
from upop.tokens.layer import place_of, set_merging


class CheckpointedBlock(Block):
    """A block of timm's vision transformer with checkpointing in training."""

    wraps_forward = True
    """The checkpoint recomputes the forward passes of all base classes; see `upop.tokens.layer.set_merging`."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the block's output, recomputed in the backward pass."""
        if not (self.training and torch.is_grad_enabled()):
            return super().forward(*args, **kwargs)
        return checkpoint(super().forward, *args, use_reentrant=False, **kwargs)


_checkpoint = partial(checkpoint, use_reentrant=False)


def checkpoint_blocks(model: nn.Module) -> None:
    """Enable checkpointing for all blocks of a model, of timm and of transformers.

    Raises:
        SettingError: the model does not support it.
    """
    found = False
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            # Like transformers' `gradient_checkpointing_enable`, whose name changes in version 6.
            module.gradient_checkpointing = True
            module._gradient_checkpointing_func = _checkpoint  # type: ignore[assignment]
            found = True
        elif type(module) is Block:
            module.__class__ = CheckpointedBlock
        elif (place := place_of(module)) is not None and type(module).__mro__[1] is Block:
            set_merging(module, None)
            module.__class__ = CheckpointedBlock
            set_merging(module, place)
        found = found or isinstance(module, CheckpointedBlock)
    if found:
        return
    try:
        model.set_grad_checkpointing(True)  # type: ignore[operator]  # timm's other architectures
    except (AttributeError, AssertionError, TypeError) as error:
        raise SettingError(
            f"grad_checkpointing is set, and {type(model).__name__} does not support gradient checkpointing. Leave it "
            "out; smaller batches (batch_size_train, accumulate) and amp save memory, too."
        ) from error
