"""Builds models from descriptions on the meta device, before any memory is allocated."""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from upop.errors import CheckpointError
from upop.meta import on_meta

# Modules, parameters and buffers that a model may have per tensor of its file, and on top: libraries build some layers
# twice, and many layers have no weights.
_PARTS_PER_TENSOR, _PARTS_BESIDE = 8, 4096


@contextmanager
def drawing_nothing() -> Iterator[None]:
    """Restore the random generators of torch, NumPy and Python, which constructors advance."""
    numpy, python = sys.modules.get("numpy"), random.getstate()  # what is not imported draws no numbers
    before = None if numpy is None else numpy.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        if numpy is not None:
            numpy.random.set_state(before)
        random.setstate(python)


def meta_model(build: Callable[[], nn.Module], tensors: int | None = None, source: str = "The file") -> nn.Module:
    """Build a model on the meta device.

    Args:
        build: builds the model.
        tensors: number of tensors in its file; a constructor that makes many times more is stopped.
        source: the file, for messages.

    Raises:
        CheckpointError: the model has too many parts.
    """
    with drawing_nothing(), _counted(tensors, source):
        return on_meta(build)


def empty_model(build: Callable[[], nn.Module], tensors: int | None = None, source: str = "The file") -> nn.Module:
    """Build a model with its parameters on the meta device and its buffers on the CPU.

    Shared parameters stay shared. `materialize` allocates them.

    Raises:
        CheckpointError: as `meta_model`.
    """

    def without_memory(_module: nn.Module, _name: str, parameter: Tensor | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta:
            return None  # unchanged
        return nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)

    with drawing_nothing(), _counted(tensors, source), _watching(parameters=without_memory):
        return build()


def materialize(model: nn.Module) -> nn.Module:
    """Allocate meta parameters on the CPU, uninitialised."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if parameter.is_meta:
                if id(parameter) not in made:
                    empty = torch.empty_like(parameter, device="cpu")
                    made[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
                setattr(module, name, made[id(parameter)])
    return model


@contextmanager
def _counted(tensors: int | None, source: str) -> Iterator[None]:
    """Stop a constructor that makes many times more parts than the file has tensors."""
    most = None if tensors is None else _PARTS_PER_TENSOR * tensors + _PARTS_BESIDE
    count = 0

    def one_more(_module: nn.Module, _name: str, _part: object) -> None:
        nonlocal count
        count += 1
        if most is not None and count > most:
            raise CheckpointError(
                f"{source} describes a model of more than {most} parts, and holds {tensors} tensors. Was it damaged? "
                "Fetch or write it again."
            )

    with _watching(parameters=one_more, buffers=one_more, modules=one_more):
        yield


@contextmanager
def _watching(**hooks: Callable[..., object]) -> Iterator[None]:
    """Call hooks when this thread registers parameters, buffers or modules."""
    me = threading.get_ident()

    def in_this_thread(hook: Callable[..., object]) -> Callable[..., object]:
        return lambda *part: hook(*part) if threading.get_ident() == me else None

    handles = [_REGISTER[kind](in_this_thread(hook)) for kind, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


_REGISTER: dict[str, Callable[..., torch.utils.hooks.RemovableHandle]] = {
    "parameters": register_module_parameter_registration_hook,
    "buffers": register_module_buffer_registration_hook,
    "modules": register_module_module_registration_hook,
}
