"""Data parallelism after a cut: DDP wrappers fix the sizes of their gradient buckets when they are created."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from upop.pruning.again import held_anywhere
from upop.pruning.masks import unwrapped


def rebuild_replicas(model: nn.Module) -> None:
    """Rebuild every DDP wrapper of a model for the current shapes of its parameters, wherever it is referenced.

    Every process must call this with its own copy. Without a wrapper, nothing happens.

    Args:
        model: the model, or its wrapper; the parameters inside are the same objects as before.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    inner = unwrapped(model)
    # A training loop may hold the wrapper, and hand on the model inside.
    own = [each for each in model.modules() if isinstance(each, DistributedDataParallel)]
    wrappers = {id(each): each for each in (*own, *held_anywhere(DistributedDataParallel))}
    for wrapper in wrappers.values():
        if unwrapped(wrapper) is inner:
            _rebuild(wrapper)


def _rebuild(wrapper: DistributedDataParallel) -> None:
    """Recreate the reducer, with its gradient buckets and hooks, as unpickling a wrapper does."""
    parameters, sparse = wrapper._build_params_for_reducer()
    names = wrapper._build_debug_param_to_name_mapping(parameters)
    hooks = wrapper._comm_hooks
    del wrapper.reducer  # takes its hooks off the parameters
    wrapper._ddp_init_helper(parameters, sparse, names, wrapper.static_graph)
    wrapper._comm_hooks = []
    for hook, state in hooks:
        wrapper.register_comm_hook(state, hook)
