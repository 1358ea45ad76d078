"""Copies of a model for trials: with shapes only (fake tensors), or with their own numbers."""

from __future__ import annotations

import copy
import functools
import gc
import logging
import math
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from upop.pruning.again import held_anywhere, uncompiled
from upop.pruning.axes.mode import Mode, defined, kept_by, leaves_in, tensors_in
from upop.pruning.costs import call, evaluated, runs_in_training
from upop.pruning.duplicates import duplicate
from upop.pruning.errors import LayoutError
from upop.pruning.groups import tensor_of
from upop.pruning.masks import unmask
from upop.pruning.sharded import is_sharded_tensor, sharded_modules, unsharded_class

_MOST_COPIED = 500_000_000
"""Parameters of the largest model of which copies with numbers are made because a forward asks for them."""
_MOST_DRAWN = 2**22
"""Random numbers that are drawn for a copy; every tensor has them from another place on, a larger one over again."""
_MOST_COUNTED = 2**24
"""Channels of the largest tensor of whole numbers that is kept as it is."""


def changed(model: nn.Module, change: Callable[[Tensor], Tensor]) -> dict[int, Any]:
    """Apply `change` to every tensor of a model; return the results by tensor id.

    Sharded parameters are passed to `change` as full tensors on the meta device.

    Raises:
        LayoutError: a lazy layer has no weights yet.
    """
    found: dict[int, Any] = {}
    for name, parameter in model.named_parameters():
        if nn.parameter.is_lazy(parameter):
            raise LayoutError(f"{name} is of a lazy layer and has no shape yet. Call the model once with a batch.")
        whole: Tensor = parameter
        if is_sharded_tensor(parameter):
            whole = nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype, device="meta"))
        found[id(parameter)] = nn.Parameter(change(whole), requires_grad=False)
    for buffer in model.buffers():
        if id(buffer) not in found:
            found[id(buffer)] = change(buffer)
    for module in model.modules():
        for value in leaves_in(kept_by(module)):
            if isinstance(value, Tensor) and not value.is_leaf and id(value) not in found:  # torch copies none of these
                found[id(value)] = change(value.detach())
    return found


def copied(model: nn.Module, tensors: dict[int, Any]) -> nn.Module:
    """Return a copy of a model with the tensors of `changed`; the model is left unchanged.

    A sharded model gives an unsharded copy. Objects that cannot be copied (locks, open files) are shared and added to
    `tensors`.

    Raises:
        LayoutError: the model cannot be copied.
    """
    with _unsharded(model):
        try:
            return _copy(model, dict(tensors))
        except Exception:
            _share(model, tensors)
        try:
            return _copy(model, dict(tensors))
        except Exception as error:
            raise LayoutError(
                f"{type(model).__name__} cannot be copied, which finding its groups needs: {message_of(error)}."
            ) from error


def _copy(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    duplicated = duplicate(model, memo)
    unmask(duplicated)
    return evaluated(duplicated)


def _share(model: nn.Module, memo: dict[int, Any]) -> None:
    """Share attributes that cannot be copied with the copy."""
    for module in model.modules():
        for value in kept_by(module).values():
            try:
                copy.deepcopy(value, dict(memo))
            except Exception:
                memo[id(value)] = value


@contextmanager
def _unsharded(model: nn.Module) -> Iterator[None]:
    """Restore the classes of modules that `fully_shard` wrapped, and remove its hooks."""
    held = [(module, type(module), {name: vars(module)[name] for name in _HOOKS}) for module in sharded_modules(model)]
    try:
        for module, kind, hooks in held:
            module.__class__ = unsharded_class(kind)
            for name, each in hooks.items():
                vars(module)[name] = type(each)((key, hook) for key, hook in each.items() if not _shards(hook))
        yield
    finally:
        for module, kind, hooks in held:
            module.__class__ = kind
            vars(module).update(hooks)


_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks")


def _shards(hook: Any) -> bool:
    return type(getattr(hook, "__self__", None)).__module__.startswith("torch.distributed.")


def message_of(error: Exception) -> str:
    """Return an error as one line; the message of an assertion may be empty."""
    first = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {first[:200]}" if first else type(error).__name__


class Shapes:
    """Runs a model on fake tensors: with shapes only, or with numbers if its forward depends on them.

    Args:
        model: the model to copy.
        example: the arguments of a call.
        numbers: whether to fall back to real numbers if the forward depends on them.
        training: whether to fall back to training mode if the forward does not run in evaluation mode.
        run: False skips the check that the forward runs without numbers.

    Attributes:
        read: names of the parameters that the forward reads.
        silent: names of parameters that are zero in every copy with numbers.

    Raises:
        LayoutError: the model cannot be run with the example.
    """

    def __init__(
        self, model: nn.Module, example: Any, *, numbers: bool = True, training: bool = True, run: bool = True
    ) -> None:
        self._model, self._given = model, example
        self._tensors: dict[int, Tensor] = {}
        self.read: set[str] = set()
        self.silent: set[str] = set()
        self.mode: FakeTensorMode | None = FakeTensorMode(allow_non_fake_inputs=True)
        self.example = self._example()
        error, faked = self._raises() if run else None, self.mode
        if error is not None and numbers and _is_small(model):  # what depends on numbers has no shape without them
            self.mode = None
            self.example = self._example()
            error = self._raises()
        if error is not None and training and self._trains(faked):
            error = None
        if error is not None:
            raise LayoutError(
                f"{type(model).__name__} cannot be run with the example: {message_of(error)}. Give the arguments of a "
                "call: a tensor, a tuple of arguments, or a mapping of keyword arguments."
            ) from error

    def _trains(self, faked: FakeTensorMode | None) -> bool:
        """Whether the model runs in training mode, on fake tensors or else as the last try was."""
        for mode in dict.fromkeys((faked, self.mode)):
            self.mode = mode
            self.example = self._example()
            if runs_in_training(self._model, self._call, self.copy()):
                return True
        return False

    def _example(self) -> Any:
        mode = self.mode
        if mode is None:
            return self._given
        return tree_map_only(Tensor, lambda each: each if _counts(each) else mode.from_tensor(each), self._given)

    def _raises(self) -> Exception | None:
        try:
            self._call(self.copy())
        except Exception as error:
            return error
        return None

    def _call(self, duplicated: nn.Module) -> None:
        reading = _Reading(duplicated)
        with self.running(), torch.no_grad(), reading:
            call(duplicated, self.example)
        self.read = reading.read

    def copy(self) -> nn.Module:
        """Return a copy; fake tensors are shared by all copies, since a run cannot change them."""
        if self.mode is None:
            duplicated = copied(self._model, changed(self._model, self._copied))
            for name in self.silent:
                tensor_of(duplicated, name).detach().zero_()
            return duplicated
        self._tensors = self._tensors or changed(self._model, self._copied)
        shared = (FakeTensor, nn.Parameter)
        own = {key: each if isinstance(each, shared) else each.clone() for key, each in self._tensors.items()}
        return copied(self._model, own)

    def _copied(self, tensor: Tensor) -> Tensor:
        tensor = tensor.detach()
        if self.mode is None:
            return with_memory(tensor).clone()
        if not tensor.is_meta:
            return tensor.clone() if _counts(tensor) else self.mode.from_tensor(tensor)
        with self.mode:  # on the device that the example is on
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")

    @contextmanager
    def running(self) -> Iterator[None]:
        """Run the block on fake tensors."""
        mode = self.mode
        with written_out(), forgetting(), mode or nullcontext(), _Counting(mode) if mode else nullcontext():
            yield


def _is_small(model: nn.Module) -> bool:
    return sum(each.numel() for each in model.parameters() if not nn.parameter.is_lazy(each)) <= _MOST_COPIED


def _counts(tensor: Tensor) -> bool:
    """Whether a tensor holds integers or booleans that can steer the forward: token ids, positions, masks."""
    return not isinstance(tensor, FakeTensor) and _could_count(tensor) and not tensor.is_meta


def _could_count(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex()) and tensor.numel() <= _MOST_COUNTED


class _Counting(Mode):
    """Computes integers among fake tensors: real ones where known, drawn ones where they depend on fake tensors.

    A forward that routes tokens to experts thus makes the same choices in the dense and in the cut copy.
    """

    def __init__(self, mode: FakeTensorMode) -> None:
        super().__init__()
        self._mode = mode

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operation, on real numbers where its inputs have them."""
        schema = getattr(func, "_schema", None)  # operators of higher order write nothing
        func = defined(func)
        known = [_counts(each) for each in tensors_in((args, kwargs))]
        if not all(known):
            for argument, value in zip(schema.arguments if schema else (), args, strict=False):
                if argument.is_write and isinstance(value, Tensor) and _counts(value):
                    raise NotImplementedError(f"{func} writes what has no numbers into whole numbers")
            return self._without(func, args, kwargs)
        if not known:
            made = func(*args, **kwargs)
            if not all(_could_count(each) for each in tensors_in(made)):
                return made
        return self._with(func, args, kwargs)

    def _with(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with unset_fake_temporarily():
            found = func(*args, **kwargs)
        return tree_map_only(Tensor, lambda each: each if _counts(each) else self._mode.from_tensor(each), found)

    def _without(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        try:
            made = func(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException):
            return self._with(func, *self._made_up(args, kwargs))
        leaves, form = tree_flatten(made)
        if not any(isinstance(each, FakeTensor) and _could_count(each) for each in leaves):
            return made
        others = tree_leaves(self._with(func, *self._made_up(args, kwargs)))
        return tree_unflatten(
            [b if isinstance(b, Tensor) and _counts(b) else a for a, b in zip(leaves, others, strict=True)], form
        )

    def _made_up(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with unset_fake_temporarily():
            drawn = torch.Generator().manual_seed(0)
            return tree_map_only(
                FakeTensor,
                lambda each: torch.rand(each.shape, generator=drawn).to(each.dtype),
                (args, kwargs),
            )


class _Reading(Mode):
    """Records the parameters that operations read."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._names: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            self._names.setdefault(id(parameter), []).append(name)
        self.read: set[str] = set()

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operation."""
        for each in tensors_in((args, kwargs)):
            self.read.update(self._names.get(id(each), ()))
        return func(*args, **kwargs)


def with_memory(tensor: Tensor) -> Tensor:
    """Move a meta tensor to the CPU, filled with nonzero numbers; return any other tensor as it is."""
    if not tensor.is_meta:
        return tensor
    return torch.full_like(tensor, tensor.is_floating_point() or tensor.dtype == torch.bool, device="cpu")


@contextmanager
def forgetting() -> Iterator[None]:
    """Clear `lru_cache` functions of tensors from other runs, which may be fake or hold other numbers."""
    _forget()
    try:
        yield
    finally:
        _forget()


def _forget() -> None:
    caches = _caches()
    for each, misses in caches.items():
        if each.cache_info().misses != misses:  # it holds something that was not looked at
            if any(isinstance(held, Tensor) for held in leaves_in(gc.get_referents(each))):
                each.cache_clear()
            caches[each] = each.cache_info().misses


_found: dict[Any, int] = {}
"""Cached functions -> how many of their calls were looked at."""
_found_of = (0, 0)
"""How many modules there were, and how many references to the class of cached functions when these were found."""


def _caches() -> dict[Any, int]:
    """Return all cached functions; they are looked for again once modules were imported that hold some."""
    global _found, _found_of
    modules, before = _found_of
    if len(sys.modules) != modules:
        references = sys.getrefcount(functools._lru_cache_wrapper)  # of each of them there is one
        if references != before:
            _found = dict.fromkeys(held_anywhere(functools._lru_cache_wrapper), 0)
        _found_of = len(sys.modules), references
    return _found


@contextmanager
def written_out() -> Iterator[None]:
    """Run attention and compiled code as separate operations, not as one opaque kernel."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    fast, silent = torch.backends.mha.get_fastpath_enabled(), log.disabled
    log.disabled = True  # what a forward cannot do without numbers is tried with them
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with uncompiled():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        log.disabled = silent


def _drawn(pool: Tensor, like: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Return random numbers from a pool at a random offset: fresh draws would dominate the time of a copy."""
    start = int(torch.randint(len(pool), (), generator=generator))
    found = rest = torch.empty(like.numel(), dtype=dtype)
    while len(rest):
        part = pool[start : start + len(rest)]
        rest[: len(part)].copy_(part)
        rest, start = rest[len(part) :], 0
    return found.view(like.shape)


def numbered(
    model: nn.Module,
    dtype: torch.dtype = torch.float64,
    without: Collection[str] = (),
    cut: Collection[str] = (),
) -> nn.Module:
    """Return a copy in `dtype`, with random numbers where the model's own could hide a difference.

    Args:
        model: the original model.
        dtype: of all floating-point parameters and buffers.
        without: unused parameters, which take no memory.
        cut: tensors to cut; buffers among them are perturbed, since their values may all be equal.
    """
    generator = torch.Generator().manual_seed(0)
    sizes = [each.numel() for each in model.parameters()]
    pool = torch.randn(min(_MOST_DRAWN, max(sizes, default=1)), generator=generator)
    left_out = {id(model.get_parameter(name)) for name in without}
    met = {id(each) for name, each in model.named_buffers() if name in cut}

    def change(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return with_memory(tensor).clone()
        device = "cpu" if tensor.is_meta else tensor.device
        if id(tensor) in left_out:
            return torch.zeros((), dtype=dtype, device=device).expand(tensor.shape)
        if not isinstance(tensor, nn.Parameter):
            held = with_memory(tensor).to(dtype, copy=True)
            if id(tensor) in met:  # variances stay above 0, and what is infinite infinite
                noise = 0.1 * _drawn(pool, tensor, dtype, generator).abs_().to(device)
                held.mul_(1 + noise).add_(noise)
            return held
        noise = _drawn(pool, tensor, dtype, generator)
        noise *= max(1, math.prod(tensor.shape[1:])) ** -0.5 if tensor.dim() > 1 else 0.3
        if not tensor.is_meta:
            return noise.to(device).add_(tensor, alpha=0.5)
        return noise if tensor.dim() > 1 else noise + 0.5

    with torch.no_grad():
        return copied(model, changed(model, change))
