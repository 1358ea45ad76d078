"""Obstacles to cutting the tensors of a layer, whatever the model computes, each with a remedy."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList


def obstacle(model: nn.Module, path: str) -> str | None:
    """Return why the own tensors of a module cannot be cut, and what to do; None if they can."""
    reason = _obstacle(model.get_submodule(path) if path else model)
    return f"{path or type(model).__name__} {reason}" if reason else None


def obstacles(model: nn.Module, cut: set[str]) -> dict[str, str]:
    """Return the modules whose own weights stay whole, each with the reason.

    Args:
        model: the model.
        cut: names of all cut tensors; parametrized ones may be among them if their proof holds.
    """
    found = {}
    for path, module in model.named_modules():
        reason = None
        if isinstance(module, ParametrizationList):
            if not any(name.startswith(f"{path}.") for name in cut):
                path = path.partition(".parametrizations")[0]
                reason = f"{path} is parametrized; call torch.nn.utils.parametrize.remove_parametrizations first"
        elif any(parameter.dim() > 1 for parameter in module.parameters(recurse=False)) or _is_special(module):
            reason = obstacle(model, path)
        if reason:
            found[path] = reason
    return found


def _is_special(module: nn.Module) -> bool:
    # Packed, by torch.ao. The class is asked: to read a parametrized weight computes it, and may change buffers.
    return inspect.isfunction(getattr(type(module), "weight", None))


def _obstacle(module: nn.Module) -> str | None:
    if isinstance(module, torch.jit.ScriptModule):
        return "is TorchScript, whose tensors stay as they are; give the model that it was made of"
    if "parametrizations" in module._modules:  # where a bias lies beside, masks would have to reach both
        return "is parametrized; call torch.nn.utils.parametrize.remove_parametrizations first"
    if hasattr(module, "_hf_hook"):
        return (
            "carries hooks of Accelerate, which spread the model over devices (device_map) or offload it; call "
            "accelerate.hooks.remove_hook_from_submodules(model) and put it on one device, or shard it by fully_shard"
        )
    for leaf in ("weight", "bias"):
        if leaf not in module._parameters and {f"{leaf}_orig", f"{leaf}_g"} & module._parameters.keys():
            return (
                f"has a {leaf} that is computed from other tensors (torch.nn.utils.prune, weight_norm or "
                "spectral_norm); make it a parameter first: torch.nn.utils.prune.remove, remove_weight_norm or "
                "remove_spectral_norm"
            )
    weight = getattr(module, "weight", None)
    if inspect.ismethod(weight) or (
        isinstance(weight, Tensor) and not (weight.is_floating_point() or weight.is_complex())
    ):
        return "has quantised weights; prune the model before it is quantised"
    return None
