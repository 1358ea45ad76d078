"""One row of the registry."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pruning.families import randomise

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Architecture:
    """How to build a tiny model of an architecture, and inputs that run all of it.

    Attributes:
        library: "timm", "transformers", "torch" or "open_clip".
        name: what the library calls it.
        make: builds it, with the library's own initial weights.
        inputs: arguments for a forward pass, from a model and a generator.
        generates: whether it writes text word by word, with a cache.
        exact: whether it computes in float64 when asked to; some kernels and layers do not.
    """

    library: str
    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[nn.Module, torch.Generator], Inputs]
    generates: bool = False
    exact: bool = True

    def build(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        """Return the model, the same at every call, with random weights, biases and norms, in evaluation mode."""
        torch.manual_seed(0)
        model = self.make()
        randomise(model, 0)
        return model.to(dtype).eval()

    def batch(self, model: nn.Module, dtype: torch.dtype = torch.float64) -> Inputs:
        """Return inputs, the same at every call."""
        inputs = self.inputs(model, torch.Generator().manual_seed(0))
        return {
            name: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
            for name, value in inputs.items()
        }

    def ways(self, model: nn.Module) -> list[tuple[str, AbstractContextManager[None]]]:
        """Return the ways in which the model can compute attention: as it does by itself, and step by step."""
        if hasattr(model, "set_attn_implementation"):
            return [
                ("fused", _transformers_attention(model, "sdpa")),
                ("eager", _transformers_attention(model, "eager")),
            ]
        fused = [module for module in model.modules() if hasattr(module, "fused_attn")]
        if fused:
            return [("fused", nullcontext()), ("eager", _timm_eager(fused))]
        return [("its own", nullcontext())]


@contextmanager
def _transformers_attention(model: Any, way: str) -> Iterator[None]:
    before = model.config._attn_implementation
    try:
        model.set_attn_implementation(way)
    except ValueError:
        way = before  # it has no fused attention
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@contextmanager
def _timm_eager(modules: list[Any]) -> Iterator[None]:
    before = [module.fused_attn for module in modules]
    for module in modules:
        module.fused_attn = False
    try:
        yield
    finally:
        for module, value in zip(modules, before, strict=True):
            module.fused_attn = value


def image(size: int = 32, channels: int = 3, batch: int = 2) -> Callable[[nn.Module, torch.Generator], Inputs]:
    """Return inputs of one argument: random images, [batch, channels, size, size], under the name `x`."""

    def make(_model: nn.Module, generator: torch.Generator) -> Inputs:
        return {"x": torch.randn(batch, channels, size, size, generator=generator)}

    return make
