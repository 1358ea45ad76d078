"""Unshards an FSDP2 model temporarily, for operations that need whole weights.

Weights are gathered on the CPU, tensor by tensor, and the modules lose the class and hooks of FSDP. Afterwards every
process takes its shards of the changed weights, in the same parameter groups. Parameters stay the same objects for
optimizers.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from upop.pruning.again import snapshot
from upop.pruning.deprecated import older_names
from upop.pruning.duplicates import duplicate
from upop.pruning.errors import LayoutError, VerificationError
from upop.pruning.masks import unmask
from upop.pruning.sharded import (
    copied,
    gather_into,
    is_sharded_tensor,
    many_processes,
    refuse_sharded,
    reshard,
    sharded_class,
    sharded_modules,
    unsharded_class,
)


@contextmanager
def whole(model: nn.Module) -> Iterator[None]:
    """Make a sharded model an ordinary one on the CPU within the block; all processes enter and leave it together.

    A model that is not sharded stays as it is. If the block raises in any process, the model is restored.

    Raises:
        LayoutError: layers that were sharded one by one are masked.
        VerificationError: the block raised in another process.
    """
    modules = list(sharded_modules(model))
    if not modules:
        yield
        return
    if any(unsharded_class(type(module)) is None for module in modules):
        raise LayoutError(
            f"Layers of this {type(model).__name__} are masked, and fully_shard was called on each of them: it cannot "
            "be put together as it is. Give full_copy(..., like=...), the same model before it was sharded, or take "
            "the masks off (pruner.remove()) first."
        )
    from torch.distributed._composable.contract import REGISTRY_KEY, STATE_KEY

    reshard(model)
    shards = {id(part): part for module in modules for part in _shards(module)}
    kinds = {module: type(module) for module in model.modules()}
    put_back = snapshot(model)
    hooks = _without_hooks(model)
    home = _device(model)
    moved: dict[Tensor, Tensor] = {}  # buffers on the CPU -> those of the device
    states: list[tuple[nn.Module, dict[str, Any]]] = []
    failed = True
    try:
        for module in modules:
            states.append((module, {name: vars(module).pop(name) for name in (STATE_KEY, REGISTRY_KEY)}))
            module.__class__ = unsharded_class(kinds[module])
        given = {key: _gathered(part) for key, part in shards.items()}
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = buffer.cpu()
                moved[module._buffers[name]] = buffer  # type: ignore[index]
        yield
        failed = False
    finally:
        together = _any(failed, home)
        for module, state in states:
            vars(module).update(state)
        if together:
            put_back()
            for module, kind in kinds.items():
                module.__class__ = kind
        else:
            for key, part in shards.items():
                _share_out(part, given[key])
            for module in modules:
                kept = type(module) is unsharded_class(kinds[module])
                module.__class__ = kinds[module] if kept else sharded_class(type(module), kinds[module])
            for module in model.modules():
                for name, buffer in module.named_buffers(recurse=False):
                    module._buffers[name] = moved[buffer] if buffer in moved else buffer.to(home)
        for held, before in hooks:
            held.update({number: hook for number, hook in before.items() if number not in held})
            for number in before:
                held.move_to_end(number)
    if together:
        raise VerificationError("The cut failed in another process, so the model is left as it was in this one too.")


def full_copy(model: nn.Module, like: nn.Module | None = None) -> nn.Module:
    """Return an unsharded copy of a model on the CPU, without masks, on every process.

    All processes call it together. Tensors are gathered one by one, so a device needs room for the largest.

    Args:
        model: the sharded model, cut or not (a plain one is copied as it is).
        like: the same model, unsharded and without masks, on any device, including meta; it is left unchanged. Other
            attributes of modules are copied from it. By default they are copied from `model`, which takes memory for a
            second copy on the CPU meanwhile.

    Raises:
        LayoutError: the models have different parameters, or `like` is needed: masked layers are sharded one by one.
    """
    if like is None:
        with whole(model):
            return unmask(duplicate(model)).to("cpu")
    refuse_sharded(like, "The argument `like` of full_copy()")
    kept = {name for name, buffer in like.named_buffers() if not buffer.is_meta}
    found = copied(
        like, lambda name, old: old.to("cpu", copy=True) if name in kept else torch.empty_like(old, device="cpu")
    )
    gather_into(found, model)
    return found


def dense_copy(model: nn.Module) -> nn.Module:
    """Return a copy of a model, sharded like the model. All processes call it together."""
    with whole(model):
        plain = duplicate(model)
    modules = {name: module for name, module in model.named_modules() if module in set(sharded_modules(model))}
    if not modules:
        return plain
    from torch.distributed.fsdp import fully_shard

    kept = {part for name, part in plain.named_parameters() if not is_sharded_tensor(model.get_parameter(name))}
    device = _device(model)
    for part in (*kept, *plain.buffers()):
        part.data = part.data.to(device)
    done: set[int] = set()
    for name, module in reversed(modules.items()):  # what lies inside comes first
        state = module._get_fsdp_state()
        if id(state) in done:
            continue
        done.add(id(state))
        group = _parts(state)
        together = [plain.get_submodule(other) for other, each in modules.items() if each._get_fsdp_state() is state]
        settings: dict[str, Any] = {"mesh": group[0].mesh_info.mesh} if group else {}
        if kept:  # torch 2.6 has none that are left out
            settings["ignored_params"] = kept
        fully_shard(
            together if len(together) > 1 else plain.get_submodule(name),
            mp_policy=state._mp_policy,
            **settings,
        )
    return plain


def _shards(module: Any) -> Iterator[Any]:
    """Yield the FSDP record of each sharded parameter of a module."""
    for group in _parts(module._get_fsdp_state()):
        yield from group.fsdp_params


def _parts(state: Any) -> list[Any]:
    """Return the groups of parameters of a state; torch before 2.9 has one at most, under another name."""
    several = getattr(state, "_fsdp_param_groups", None)
    return several if several is not None else [each for each in [state._fsdp_param_group] if each is not None]


def _gathered(part: Any) -> tuple[Tensor, int]:
    """Replace the shards of a parameter by the full tensor; return it with its version."""
    sharded = part.sharded_param
    data = sharded.detach().full_tensor().to("cpu", copy=True).view(sharded.shape)  # empty ones come in another shape
    plain = nn.Parameter(data, requires_grad=sharded.requires_grad)
    part._setattr_on_modules(plain)
    return plain.data, plain._version


def _share_out(part: Any, given: tuple[Tensor, int]) -> None:
    """Reshard a parameter into the same object, from the changed tensor if it was changed."""
    held, (data, version) = part.sharded_param, given
    info = part._module_info
    plain = getattr(info.module, info.param_name)
    if plain.data_ptr() == data.data_ptr() and plain.shape == data.shape and plain._version == version:
        part._setattr_on_modules(held)
        return
    placement = part.fsdp_placement
    # Gradients are reduced in chunks, of which a branch without channels has none.
    learns = held.requires_grad and plain.numel() > 0
    fresh = nn.Parameter(plain.detach().to(part.device).contiguous(), requires_grad=learns)
    given_too = (part.mesh_info,) if "mesh_info" in inspect.signature(part._init_sharded_param).parameters else ()
    part._init_sharded_param(fresh, part.device, lambda _: placement, *given_too)
    if part.post_forward_mesh_info:
        part._init_sharded_post_forward_param_metadata(fresh)
    part._init_extensions()
    part.all_gather_outputs = []
    if hasattr(part, "_unsharded_param"):
        del part._unsharded_param
    part.init_dtype_attrs(part.mp_policy)
    held.grad = None
    torch.utils.swap_tensors(held, part.sharded_param)
    part.sharded_param = held
    part._setattr_on_modules(held)


def _device(model: nn.Module) -> torch.device:
    device: torch.device = next(part.device for module in sharded_modules(model) for part in _shards(module))
    return device


_FSDP = "torch.distributed.fsdp"
_HOOKS = (
    "_forward_pre_hooks",
    "_forward_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


def _without_hooks(model: nn.Module) -> list[tuple[Any, dict[int, Callable[..., Any]]]]:
    """Remove the hooks of FSDP; return the hook dictionaries with their former contents, in order."""
    found = []
    for module in model.modules():
        for held in (vars(module)[name] for name in _HOOKS):
            before = dict(held)
            ours = [number for number, hook in before.items() if _is_fsdp(hook)]
            if ours:
                found.append((held, before))
                for number in ours:
                    del held[number]
    return found


def _is_fsdp(hook: Any) -> bool:
    inner = getattr(hook, "hook", getattr(hook, "func", hook))
    return str(getattr(inner, "__module__", "")).startswith(_FSDP)


def _any(failed: bool, device: torch.device) -> bool:
    """Return whether the block failed in any process."""
    if not many_processes():
        return failed
    flag = torch.tensor([float(failed)], device=device)
    torch.distributed.all_reduce(flag)
    return bool(flag.item())


__getattr__ = older_names(__name__)
