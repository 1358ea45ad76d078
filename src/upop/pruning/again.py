"""Repeats forward passes with the same precision and the same random numbers."""

from __future__ import annotations

import gc
import inspect
import random
import sys
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import nn

from upop.pruning.traits import replay_arguments

_CPU = torch.device("cpu")


@contextmanager
def random_numbers_kept(device: torch.device = _CPU) -> Iterator[None]:
    """Restore the random generators of Python, NumPy, the CPU and `device` after the block."""
    python, numpy = random.getstate(), sys.modules.get("numpy")  # what is not imported draws nothing
    drawn = None if numpy is None else numpy.random.get_state()
    try:
        with torch.random.fork_rng([device.index or 0] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python)
        if numpy is not None:
            numpy.random.set_state(drawn)


@contextmanager
def drawing_the_same(device: torch.device) -> Iterator[None]:
    """Seed torch, Python and NumPy within the block, and restore their generators afterwards."""
    with random_numbers_kept(device):
        random.seed(0)
        torch.manual_seed(0)
        if numpy := sys.modules.get("numpy"):
            numpy.random.seed(0)
        yield


@contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Restore the buffers of a model after the block: the same tensors with the same values."""
    held = [
        (module, name, buffer, buffer.clone(), 0 if buffer.is_inference() else buffer._version)
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for module, name, buffer, old, version in held:
                if buffer.is_inference() or buffer._version != version:
                    buffer.copy_(old)
                module._buffers[name] = buffer


def is_transformed() -> bool:
    """Whether a torch.func transform or forward-mode differentiation is active."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def snapshot(model: nn.Module) -> Callable[[], None]:
    """Return a function that restores the present attributes of every module, lists and mappings included."""
    held: dict[int, tuple[Any, Any]] = {}
    for module in model.modules():
        for name, value in vars(module).items():
            if name not in _HOOKS:
                _hold(value, held)
        held[id(vars(module))] = vars(module), dict(vars(module))

    def put_back() -> None:
        for container, content in held.values():
            container.clear()
            (container.extend if isinstance(container, list | deque) else container.update)(content)

    return put_back


def _hold(container: Any, held: dict[int, tuple[Any, Any]]) -> None:
    if isinstance(container, dict | list | set | deque) and id(container) not in held:
        held[id(container)] = container, container.copy()
        for each in container.values() if isinstance(container, dict) else container:
            _hold(each, held)


_HOOKS = vars(nn.Module()).keys() - {"_parameters", "_buffers", "_modules"}


def precision_now(kind: str) -> tuple[str, torch.dtype] | None:
    """Return the device type and dtype of the active autocast, or None."""
    on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return (kind, torch.get_autocast_dtype(kind)) if on else None


def autocast(device: torch.device, precision: tuple[str, torch.dtype] | None) -> AbstractContextManager[Any]:
    """Return the autocast context for a result of `precision_now`; None turns autocast off."""
    if precision is not None:
        return torch.autocast(precision[0], precision[1])
    known = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if known else nullcontext()


def repeated(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], like: nn.Module | None = None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return arguments that repeat the last forward pass, its random choices included.

    A model that samples in its forward returns the samples by `ModelTraits.replay_arguments`.

    Args:
        model: the model that ran.
        args: its positional arguments.
        kwargs: its keyword arguments.
        like: the copy that will get the arguments; by default `model` itself.
    """
    changed = replay_arguments(model)
    if not changed:
        return args, kwargs
    bound = inspect.signature((like or model).forward).bind(*args, **kwargs)
    bound.arguments.update(changed)
    return bound.args, bound.kwargs


Kind = TypeVar("Kind")


def with_subclasses(kind: type[Kind]) -> dict[type[Kind], None]:
    """Return a class and all of its subclasses."""
    kinds = [kind]
    for each in kinds:
        kinds += [inner for inner in type.__subclasses__(each) if inner not in kinds]
    return dict.fromkeys(kinds)


def held_anywhere(kind: type[Kind]) -> list[Kind]:
    """Return all live instances of a class and its subclasses; instances of static classes are not found."""
    kinds = with_subclasses(kind)
    return [each for each in referring_to(*kinds) if type(each) in kinds]  # others may answer to isinstance with code


def referring_to(*objects: Any) -> list[Any]:
    """Return all referrers of the objects, including those frozen by `gc.freeze`.

    `gc.get_objects` would reference the objects of all threads: a tuple under construction in another thread could then
    not grow, and that thread would fail with a SystemError.
    """
    frozen = gc.get_freeze_count()
    if frozen:
        gc.unfreeze()
    found = gc.get_referrers(*objects)
    if frozen:
        gc.freeze()
    return found


class AsWritten:
    """Runs one model eagerly although `torch.compile` compiled it; other models stay compiled.

    Wrappers are found wherever they are referenced: a training loop may call its own wrapper and pass the inner model.

    Args:
        model: with its known wrappers.
        wrappers: all wrappers of modules by `torch.compile`.
    """

    def __init__(self, model: nn.Module, wrappers: Iterable[nn.Module]) -> None:
        changed: list[tuple[weakref.ref[nn.Module], str, Any]] = []
        parts = set(model.modules())
        for module in {*parts, *(each for each in wrappers if not parts.isdisjoint(each.modules()))}:
            inner = dict(module._modules.items()).get("_orig_mod")  # TorchScript's own mapping has no `get`
            if inner is not None and "forward" in vars(module):  # a wrapper of torch.compile
                changed.append((weakref.ref(module), "forward", vars(module)["forward"]))
                vars(module)["forward"] = inner.__call__
            if getattr(module, "_compiled_call_impl", None) is not None:  # of module.compile()
                changed.append((weakref.ref(module), "_compiled_call_impl", vars(module)["_compiled_call_impl"]))
                vars(module)["_compiled_call_impl"] = None
        self.end = weakref.finalize(self, self._put_back, changed)

    @staticmethod
    def _put_back(changed: list[tuple[weakref.ref[nn.Module], str, Any]]) -> None:
        for reference, name, value in changed:
            module = reference()
            if module is not None:
                vars(module)[name] = value


class _Uncompiled:
    """Runs all compiled code eagerly while anyone observes a model, since compiled code skips hooks.

    Observers may start and end in any order, nested or not: a Pruner that is garbage-collected during a verification
    must not restore the state that the verification started from.
    """

    def __init__(self) -> None:
        self._users = 0
        self._stance: Any = None

    def enter(self) -> None:
        if not self._users:
            self._stance = torch.compiler.set_stance("force_eager")
        self._users += 1

    def leave(self) -> None:
        self._users -= 1
        if not self._users:
            self._stance.__exit__(None, None, None)

    @contextmanager
    def __call__(self) -> Iterator[None]:
        self.enter()
        try:
            yield
        finally:
            self.leave()


uncompiled = _Uncompiled()
