"""The graph of one call of any model, with dynamic batch and lengths."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from upop.checkpoints.export.graphs import Graph
from upop.errors import LayoutError, SettingError
from upop.libraries import is_pretrained
from upop.pruning import find_prunable
from upop.pruning.axes.examples import Calls, example_for
from upop.pruning.costs import evaluating

_MASK = "attention_mask"
_LEFT_OUT = ("cache", "past_key_values", "encoder_past_key_values", "cache_params")
"""Outputs that only a next call needs."""
_MOST = 2**31
_TRIED = (2, 15)


@dataclass(frozen=True)
class AnyGraph(Graph):
    """A traced graph.

    Attributes:
        traced: the exported program.
        example: the inputs of the trace.
        symbols: torch's symbol of a size -> name of the axis.
        ranges: name of an axis -> smallest and largest size.
    """

    traced: Any = None
    example: tuple[Tensor, ...] = ()
    symbols: Mapping[str, str] = field(default_factory=dict)
    ranges: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    def draw(self, batch: int, tokens: int) -> tuple[Tensor, ...]:
        """Return inputs like the example, of other sizes.

        With a fixed batch, texts are longer than the example's and keep its tokens, so that the number of image
        placeholders matches the images.
        """
        generator = torch.Generator().manual_seed(batch)
        drawn = []
        fixed = all("batch" not in axes for axes in self.inputs.values())
        for (name, axes), value in zip(self.inputs.items(), self.example, strict=True):
            for place, axis in enumerate(axes):
                if isinstance(axis, str):
                    (least, most), has = self.ranges[axis], value.shape[place]
                    size = batch if axis == "batch" else min(max(has + 2 if fixed else tokens, least), most)
                    places = torch.arange(size)
                    value = value.index_select(place, places.clamp(max=has - 1) if fixed else places % has)
            if value.is_floating_point():
                value = value + 0.1 * torch.randn(value.shape, generator=generator)
            elif name == _MASK and value.dim() == 2:
                value[-1, value.shape[1] // 2 + 1 :] = 0  # padding in the last text
            drawn.append(value)
        return tuple(drawn)

    def program(self, module: nn.Module) -> torch.export.ExportedProgram:
        """Return the exported program."""
        del module
        traced: torch.export.ExportedProgram = self.traced
        return traced


class _OneCall(nn.Module):
    """A model with positional inputs and tensor outputs alone."""

    def __init__(self, model: nn.Module, names: tuple[str, ...], fixed: Mapping[str, Any], *, by_name: bool) -> None:
        super().__init__()
        self.model = model
        self._names, self._fixed, self._by_name = names, dict(fixed), by_name

    def called(self, *inputs: Tensor) -> Any:
        """Return the outputs of the model."""
        if self._by_name:
            return self.model(**dict(zip(self._names, inputs, strict=True)), **self._fixed)
        return self.model(*inputs)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(value for _, value in _tensors(self.called(*inputs)))


def graph_of_any(model: nn.Module, example: Any = None) -> AnyGraph:
    """Return the graph of one call of a model.

    Args:
        model: a model of any library, on the CPU, in evaluation mode and in float32.
        example: its inputs: a tensor, a tuple, or a mapping of keyword arguments; by default those with which its
            groups were found, or generated ones. If the model's code fixes the batch, it is that of the example, or 1.

    Raises:
        SettingError: no call of the whole model is known, or torch.export cannot trace it; the message gives the reason
            and alternatives.
    """
    names, inputs, fixed, by_name = _call(model, example)
    module = _OneCall(model, names, fixed, by_name=by_name).eval()
    try:
        with evaluating(model):
            single = all(len(value) == 1 for value in inputs)
            # torch.export specialises a batch of 1.
            traced = _traced(module, tuple(torch.cat([value] * 2) for value in inputs) if single else inputs)
            if all(_number(shape[0]) is not None for shape in _shapes(traced)) and (single or example is None):
                inputs = tuple(value[:1].clone() for value in inputs)
                traced = _traced(module, inputs, None)
            elif single:
                inputs = tuple(torch.cat([value] * 2) for value in inputs)
            outputs = tuple(name for name, _ in _tensors(module.called(*inputs)))
    except Exception as error:  # a model's own, or one of the many of torch.export
        raise untraceable(model, error) from error
    axes, symbols, ranges = axes_of(traced, names)
    return AnyGraph(
        lambda model, *given: _OneCall(model, names, fixed, by_name=by_name)(*given),
        axes,
        outputs,
        traced=traced,
        example=inputs,
        symbols=symbols,
        ranges=ranges,
    )


def untraceable(model: nn.Module, error: Exception) -> SettingError:
    """Return the error for a model that torch.export cannot trace."""
    message = " ".join(str(error).split())[:300]
    return SettingError(
        f"torch.export cannot trace this {type(model).__name__}: {type(error).__name__}: {message} Give `example`, "
        "one batch of inputs, if it was called with the wrong ones; otherwise run it in PyTorch (torch.compile works "
        f"on compressed models as on any other).{_older_torch()}"
    )


def _older_torch() -> str:
    """Return the advice for a version of torch older than the tested ones; "" otherwise."""
    known = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if known >= _TRIED:
        return ""
    return (
        f" torch.export of torch 2.6 fails on most models; this is {torch.__version__}, and 2.15 was tried: update it."
    )


def _call(model: nn.Module, example: Any) -> tuple[tuple[str, ...], tuple[Tensor, ...], dict[str, Any], bool]:
    """Return names and values of a call's tensors, its other arguments, and whether they are keyword arguments."""
    asked = inspect.signature(model.forward).parameters
    if example is None:
        example = _known(model)
    if isinstance(example, Mapping):
        given, by_name = dict(example), True
    else:
        values = example if isinstance(example, tuple | list) else (example,)
        given, by_name = dict(zip(_places(asked), values, strict=False)), False
    tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}
    fixed = {name: value for name, value in given.items() if name not in tensors}
    if is_pretrained(model):
        ids = tensors.get("input_ids")
        if _MASK in asked and ids is not None:
            tensors.setdefault(_MASK, torch.ones_like(ids))
        fixed |= {"use_cache": False} if by_name and "use_cache" in asked else {}
    if not tensors or (fixed and not by_name):
        raise SettingError(
            f"A graph of a {type(model).__name__} takes only tensors, and its example has {list(given)}. Give a "
            "mapping of keyword arguments, or a tuple of tensors."
        )
    small = next((name for name, value in tensors.items() if value.dim() == 0 or value.shape[0] < 2), None)
    if small is not None and not all(value.dim() and len(value) == 1 for value in tensors.values()):
        raise SettingError(
            f"The example's {small} has shape {tuple(tensors[small].shape)}: tracing specialises a batch of 1. Give a "
            "batch of 2 or more."
        )
    return tuple(tensors), tuple(value.detach().clone() for value in tensors.values()), fixed, by_name


def _known(model: nn.Module) -> Any:
    try:
        found = find_prunable(model).source
        example = found[1] if found is not None and found[1] is not None else example_for(model)
    except LayoutError as error:
        raise SettingError(f"{error} For a graph: upop.export(model, folder, example=...).") from error
    if isinstance(example, Calls) or callable(example):
        raise SettingError(
            f"No single call of a {type(model).__name__} is known that runs all of it. Give one: "
            "upop.export(model, folder, example=...)."
        )
    return example


def _traced(module: nn.Module, inputs: tuple[Tensor, ...], batch: Any = "any") -> torch.export.ExportedProgram:
    """Trace a call with dynamic lengths and batch; None for `batch` fixes it to that of the inputs.

    Sizes that the model's code fixes stay static.
    """
    auto = torch.export.Dim.AUTO
    lengths = [{} if value.dim() > 3 else dict.fromkeys(range(1, min(2, value.dim())), auto) for value in inputs]
    alike = len({value.shape[0] for value in inputs}) == 1 and batch is not None

    def traced(batch: Any) -> torch.export.ExportedProgram:
        free = tuple({0: batch, **each} for each in lengths)
        return torch.export.export(module, inputs, dynamic_shapes={"inputs": free}, strict=False)

    if alike:
        try:
            return traced(torch.export.Dim("batch"))  # one size for all inputs
        except Exception:  # the model's code may fix it
            pass
    program = traced(auto if batch is not None else None)
    fixed = {_number(shape[0]) is not None for shape in _shapes(program)}
    # Where the number of images is fixed, that of texts is: their model counts one by the other.
    return traced(None) if alike and len(fixed) > 1 else program


def _places(asked: Mapping[str, inspect.Parameter]) -> Iterator[str]:
    """Yield names of positional arguments, without end."""
    by_place = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    yield from (name for name, each in asked.items() if each.kind in by_place)
    count = 0
    while True:
        yield f"input{count}"
        count += 1


def _tensors(outputs: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield name and value of the tensors in the outputs of a call."""
    if isinstance(outputs, Tensor):
        yield name or "output", outputs
    elif isinstance(outputs, Mapping):
        for key, value in outputs.items():
            if key not in _LEFT_OUT:
                yield from _tensors(value, f"{name}.{key}" if name else str(key))
    elif isinstance(outputs, tuple | list):
        for place, value in enumerate(outputs):
            yield from _tensors(value, f"{name or 'output'}.{place}")


def axes_of(
    traced: torch.export.ExportedProgram, names: tuple[str, ...], called: Callable[[str, int], str] | None = None
) -> tuple[dict[str, tuple[str | int, ...]], dict[str, str], dict[str, tuple[int, int]]]:
    """Return the axes of the inputs, torch's symbol -> name, and name -> range of sizes.

    Args:
        traced: the exported program.
        names: names of its inputs.
        called: (input, axis) -> name, for sizes that are equal in every call though torch keeps them apart. By
            default every symbol of torch has a name of its own.
    """
    shapes = _shapes(traced)
    symbols: dict[str, str] = {}
    axes: dict[str, tuple[str | int, ...]] = {}
    for name, shape in zip(names, shapes, strict=True):
        sizes: list[str | int] = []
        for place, size in enumerate(shape):
            number = _number(size)
            if number is not None:
                sizes.append(number)
            else:
                if called is None:
                    usual = "batch" if place == 0 else "tokens"
                    free = usual if usual not in symbols.values() else f"{name}_{place}"
                else:
                    free = called(name, place)
                sizes.append(symbols.setdefault(str(size), free))
        axes[name] = tuple(sizes)
    found = {str(key): _range(value) for key, value in traced.range_constraints.items()}
    return axes, symbols, {name: found.get(symbol, (2, _MOST)) for symbol, name in symbols.items()}


def _shapes(traced: torch.export.ExportedProgram) -> list[Any]:
    """Return the shapes of the inputs, with a symbol for every free size."""
    placeholders = {node.name: node for node in traced.graph.nodes if node.op == "placeholder"}
    return [placeholders[name].meta["val"].shape for name in traced.graph_signature.user_inputs]


def _number(size: Any) -> int | None:
    """Return the size of a static axis; some dynamic ones are fixed during the trace."""
    known: Any = size if isinstance(size, int) else size.node.expr
    return int(known) if isinstance(size, int) or known.is_number else None


def _range(value: Any) -> tuple[int, int]:
    upper = value.upper
    return int(value.lower), int(upper) if upper.is_finite and upper < _MOST else _MOST
