"""Functions of single entries: what may stand between the layer that makes an axis and the one that consumes it."""

from __future__ import annotations

import copy
import functools
import weakref

import torch
from torch import Tensor, nn

# Functions and methods of torch that act on every entry alone, and whether they leave 0 at 0.
FUNCTIONS = {
    "relu": True,
    "relu_": True,
    "relu6": True,
    "gelu": True,
    "silu": True,
    "mish": True,
    "tanh": True,
    "hardswish": True,
    "leaky_relu": True,
    "elu": True,
    "selu": True,
    "celu": True,
    "square": True,
    "sigmoid": False,
    "hardsigmoid": False,
    "softplus": False,
}
# Methods of a tensor that change no entry.
METHODS = ("to", "type_as", "contiguous", "float", "half", "bfloat16", "double", "clone")
_PROBE = (0.0, 1.5, -0.7, 0.0, 3.0, -2.0)
_TRUSTED = ("torch", "transformers", "timm", "open_clip", "functools", "torchvision")
_known: weakref.WeakKeyDictionary[object, bool | None] = weakref.WeakKeyDictionary()


def is_neutral(function: object) -> bool:
    """Whether the module changes nothing where nothing is drawn at random."""
    return isinstance(function, nn.Identity | nn.modules.dropout._DropoutNd)


def element_function(function: object) -> bool | None:
    """Say whether an activation leaves 0 at 0; None for what is no function of single entries.

    Activations are tried on a few numbers, on the CPU: together, and one by one.
    """
    if not callable(function) or not _trusted(function):
        return None
    try:
        if function not in _known:
            _known[function] = _try(function)
        return _known[function]
    except TypeError:  # no weak reference to it
        return _try(function)


def _trusted(function: object) -> bool:
    if isinstance(function, functools.partial):
        return _trusted(function.func)
    if isinstance(function, nn.Module):
        if any(parameter.numel() > 1 for parameter in function.parameters()) or list(function.buffers()):
            return False
        if any(_has_weights(module) for module in function.modules()):
            return False
        name = type(function).__module__
    else:
        # Builtins of torch name no module of their own.
        name = getattr(function, "__module__", None) or "torch"
    return name.partition(".")[0] in _TRUSTED


def _has_weights(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | nn.modules.conv._ConvNd | nn.LayerNorm | nn.Embedding)


@torch.no_grad()
def _try(function: object) -> bool | None:
    if not isinstance(function, nn.Module):
        return _probe(function)
    if any(parameter.is_meta for parameter in function.parameters()):
        return None
    function = copy.deepcopy(function).float().cpu().eval()
    found = _probe(function)
    # What is learned may come to move 0, whatever it does now.
    generator = torch.Generator().manual_seed(0)
    for parameter in function.parameters():
        parameter.copy_(torch.rand(parameter.shape, generator=generator, device="cpu") + 0.5)
    learned = found if next(function.parameters(), None) is None else _probe(function)
    return None if found is None or learned is None else found and learned


def _probe(function: object) -> bool | None:
    """Say whether a function leaves 0 at 0, as it is; None if it is none of single entries."""
    assert callable(function)
    with torch.device("cpu"):  # models may be built with another one as the default
        probe = torch.tensor([_PROBE])
        # Functions that shift or normalise happen to pass on one row; entries of other rows must not matter either.
        rows = torch.cat([probe, probe.flip(1)])
        try:
            together = function(probe.clone())
            alone = [function(entry.clone().view(1, 1)) for entry in probe[0]]
            among_others = function(rows)
        except Exception:
            return None
    if not isinstance(together, Tensor) or together.shape != probe.shape:
        return None
    if not all(isinstance(value, Tensor) and value.shape == (1, 1) for value in alone):
        return None
    if not torch.allclose(together, torch.cat(alone, dim=1), atol=1e-6):
        return None
    if not torch.allclose(among_others[:1], together, atol=1e-6):
        return None
    return bool((together[probe == 0] == 0).all())
