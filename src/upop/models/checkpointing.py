"""Gradient checkpointing: blocks recompute their activations in the backward pass instead of storing them.

Losses and gradients stay the same, also with masks, at the cost of one more forward pass. Saved files do not change.
"""

from __future__ import annotations

import sys
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

from upop.errors import SettingError
from upop.tokens.layer import place_of, set_merging

_checkpoint = partial(checkpoint, use_reentrant=False)


def checkpoint_blocks(model: nn.Module) -> None:
    """Enable checkpointing for all blocks of a model, of timm and of transformers.

    Raises:
        SettingError: the model does not support it.
    """
    if any([_checkpoint_layers(model), _checkpoint_timm(model)]):
        return
    try:
        model.set_grad_checkpointing(True)  # type: ignore[operator]  # timm's other architectures
    except (AttributeError, AssertionError, TypeError) as error:
        raise SettingError(
            f"grad_checkpointing is set, and {type(model).__name__} does not support gradient checkpointing. Leave it "
            "out; smaller batches (batch_size_train, accumulate) and amp save memory, too."
        ) from error


def _checkpoint_layers(model: nn.Module) -> bool:
    """Enable it for the layers of transformers; return whether there are any."""
    if "transformers" not in sys.modules:  # then the model has none; the import takes seconds
        return False
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for layer in layers:
        # Like transformers' `gradient_checkpointing_enable`, whose name changes in version 6.
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = _checkpoint  # type: ignore[assignment]
    return bool(layers)


def _checkpoint_timm(model: nn.Module) -> bool:
    """Enable it for the blocks of timm's vision transformers; return whether there are any."""
    if "timm" not in sys.modules:
        return False
    from timm.models.vision_transformer import Block

    from upop.models.checkpointed_block import CheckpointedBlock

    found = False
    for module in model.modules():
        if type(module) is Block:
            module.__class__ = CheckpointedBlock
        elif (place := place_of(module)) is not None and type(module).__mro__[1] is Block:
            set_merging(module, None)
            module.__class__ = CheckpointedBlock
            set_merging(module, place)
        found = found or isinstance(module, CheckpointedBlock)
    return found
