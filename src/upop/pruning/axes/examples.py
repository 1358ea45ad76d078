"""Finds example inputs for a model, from its declared inputs or from the shapes of its layers.

Any input that runs will do, since groups are proved numerically for any input. If one call does not reach all
weights, further calls are added.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import register_pytree_node

from upop.pruning.again import random_numbers_kept
from upop.pruning.axes.copies import Shapes, message_of
from upop.pruning.axes.inputs import BATCH, arguments_of, channels_of, described, image_sizes, placed, words
from upop.pruning.costs import call
from upop.pruning.errors import LayoutError
from upop.pruning.traits import momentum_prefixes

_TOKENS = 5
_MOST, _MORE = 24, 6
"""How many inputs are tried, and how many more once some ran."""
_WRAPPED = 2
"""How many models in a wrapper are asked what it may be given."""
_GIVEN = ("dummy_inputs", "example_input_array")
"""Where models keep an example: those of transformers and upop, those of Lightning."""


@dataclass(frozen=True)
class Calls:
    """An example of several calls to a model or its submodules; pass it to `call` as a function of the model.

    Attributes:
        paths: dotted names of the called modules; "" is the model.
        inputs: the inputs of each call.
    """

    paths: tuple[str, ...]
    inputs: tuple[Any, ...]

    def __call__(self, model: nn.Module) -> list[Any]:
        """Make the calls and return their outputs."""
        return [call(model.get_submodule(path), given) for path, given in zip(self.paths, self.inputs, strict=True)]


register_pytree_node(
    Calls, lambda calls: (list(calls.inputs), calls.paths), lambda inputs, paths: Calls(paths, tuple(inputs))
)


def example_for(model: nn.Module) -> Any:
    """Return small example inputs for the model, on its device and in its precision.

    Raises:
        LayoutError: no attempt ran; the message says what to pass.
    """
    with random_numbers_kept(), torch.device("cpu"):
        torch.manual_seed(0)
        try:
            return _found(model)
        except (RuntimeError, MemoryError) as error:
            if "allocate" not in str(error) and isinstance(error, RuntimeError):
                raise
            # Inputs as large as the model says cannot be made.
            raise LayoutError(_advice(model, LayoutError(message_of(error)))) from error


def _found(model: nn.Module) -> Any:
    copies = momentum_prefixes(model)
    left = {name for name in _weights(model) if not name.startswith(copies)}
    taken: list[tuple[str, Any]] = []
    error: LayoutError | None = None
    tries = _MOST
    for path, given in _tried(model, left, taken):
        if tries == 0:
            break
        tries -= 1
        example = placed(model, given)
        try:
            shapes = Shapes(model, example if not path else Calls((path,), (example,)), training=False)
        except LayoutError as failure:
            error = error or failure
            continue
        if not taken:
            tries = min(tries, _MORE)
        if left & shapes.read or not taken:
            taken.append((path, example))
        left -= shapes.read
        if not left:
            break
    if not taken:
        raise LayoutError(_advice(model, error)) from error
    if len(taken) == 1 and not taken[0][0]:
        return taken[0][1]
    return Calls(tuple(path for path, _ in taken), tuple(example for _, example in taken))


def _weights(model: nn.Module) -> Iterator[str]:
    """Yield the names of the weight matrices that calls should reach; embeddings are left to token inputs."""
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(path, recurse=False):
            if not isinstance(module, nn.Embedding) and sum(size > 1 for size in parameter.shape) > 1:
                yield name


def _tried(model: nn.Module, left: set[str], taken: list[Any]) -> Iterator[tuple[str, Any]]:
    """Yield candidate inputs, the likeliest first, with the name of the module to call.

    Args:
        model: the model.
        left: names of weights that no call has reached; a submodule is called alone if all its weights are among them.
        taken: calls that ran so far.
    """
    for given in _stated(model):
        yield "", given
    parts = [(path, part) for path, part in model.named_modules() if path and _speaks(part)]
    for _, part in parts[:_WRAPPED] if not _speaks(model) else []:
        for given in _stated(part):  # a wrapper may hand on what it is given
            if not taken:
                yield "", given
    for given in _by_layers(model) if not taken else []:
        if not taken:
            yield "", given
    if hasattr(model, "main_input_name") or type(model).forward is nn.Module.forward:
        for path, part in parts:
            inside = {f"{path}.{name}" for name in _weights(part)}
            for given in itertools.chain(_stated(part), _by_layers(part)):
                if not inside or not inside <= left:
                    break
                yield path, given


def _speaks(module: nn.Module) -> bool:
    """Whether a module is a library model that declares its inputs."""
    return any(hasattr(module, name) for name in ("main_input_name", "default_cfg", *_GIVEN))


def _stated(model: nn.Module) -> Iterator[Any]:
    """Yield inputs that the model provides or declares."""
    if hasattr(model, "main_input_name"):  # transformers' dummy inputs are words alone
        yield from described(model)
    for name in _GIVEN:
        try:
            given = getattr(model, name, None)
        except Exception:  # a property of a library, which may not be meant for this model
            continue
        if given is not None:
            yield given
    if not hasattr(model, "main_input_name"):
        yield from described(model)


def _by_layers(model: nn.Module) -> Iterator[Any]:
    """Yield inputs that fit the first layers: images for convolutions, ids for embeddings, tokens for linear layers."""
    layers = list(model.modules())
    first = next((each for each in layers if isinstance(each, nn.Conv2d | nn.Embedding | nn.Linear)), None)
    by_place = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    asked = arguments_of(model).values()
    count = max(1, sum(each.kind in by_place and each.default is inspect.Parameter.empty for each in asked))
    embeds = any(isinstance(each, nn.Embedding) for each in layers)
    if isinstance(first, nn.Conv2d) or hasattr(model, "default_cfg"):
        own = first.in_channels if isinstance(first, nn.Conv2d) else channels_of(model)
        # The first layer may take patches of the channels that are stated.
        stated = channels_of(model) if hasattr(model, "default_cfg") else own
        for channels, size in itertools.product(dict.fromkeys((own, stated)), image_sizes(model)):
            image = torch.randn(BATCH, channels, size, size)
            yield (image, *(words(model) if embeds else image for _ in range(count - 1)))
    if embeds:
        for length in (_TOKENS, 2 * _TOKENS, *_positions(model)):
            yield (torch.zeros(BATCH, length, dtype=torch.long),) * count
    widths = dict.fromkeys(each.embed_dim for each in layers if isinstance(each, nn.MultiheadAttention))
    widths |= dict.fromkeys(each.in_features for each in layers if isinstance(each, nn.Linear))
    for width in widths:
        yield tuple(torch.randn(BATCH, _TOKENS, width) for _ in range(count))
        if count > 1:  # what says which of the tokens are padding
            padding = torch.zeros(BATCH, _TOKENS, dtype=torch.bool)
            yield (torch.randn(BATCH, _TOKENS, width), *(padding for _ in range(count - 1)))
        yield tuple(torch.randn(BATCH, width) for _ in range(count))


def _positions(model: nn.Module) -> Iterator[int]:
    """Yield lengths of position tables; some models accept only sequences of that length."""
    tables = [each for each in model.parameters() if each.dim() >= 2]
    yield from dict.fromkeys(each.shape[-2] for each in tables if 1 < each.shape[-2] <= 1024)


def _advice(model: nn.Module, error: LayoutError | None) -> str:
    """Return what to pass, as the end of an error message."""
    needed = [
        name
        for name, each in arguments_of(model).items()
        if each.default is inspect.Parameter.empty and each.kind is not inspect.Parameter.VAR_KEYWORD
    ]
    shown = ", ".join(f'"{name}": ...' for name in needed if name not in ("args", "kwargs")) or '"images": ...'
    seen = f" The first of those that were tried: {error}" if error is not None else ""
    return (
        f"{type(model).__name__} is read off one call of it, and no inputs are known for it. Give one batch of what it "
        f"takes, for instance upop.find_prunable(model, example={{{shown}}}); Pruner and calibrate take `example` as "
        f"well.{seen}"
    )
