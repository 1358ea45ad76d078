"""Finds the layers of image encoders by what a model computes in one forward pass, not by names or classes.

A self-attention is a softmax over square logits, or torch's fused function. The addition that joins its output to the
tokens is the first one of two equal shapes of which only one depends on the attention. A layer is the largest module
that contains this attention and no other, and takes and returns tokens of that shape. Layers form an encoder if each
takes the very tensor that the one before returned. Marks on tensors track the origin from pixels, text and attentions
through every operation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from upop.pruning.costs import call, evaluating
from upop.tokens.layer import ADDITIONS, FUSED, PACKED, SOFTMAXES, Site

_MARKS = "_upop_marks"
_PIXELS, _WORDS = "pixels", "words"


@dataclass(eq=False)
class Call:
    """A call of a module, with its inputs, output, and enclosing calls, outermost first."""

    path: str
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    within: tuple[Call, ...]
    output: Any = None

    @property
    def tokens(self) -> Tensor | None:
        """The first tensor among the inputs."""
        return _first((self.args, self.kwargs))

    @property
    def result(self) -> Tensor | None:
        """The first tensor in the output."""
        return _first(self.output)


@dataclass(eq=False)
class Found:
    """A layer that can merge tokens."""

    call: Call
    site: Site


@dataclass(eq=False)
class Encoder:
    """Layers in the order of their calls, each taking the output of the one before.

    Attributes:
        layers: the layers.
        inputs: the origin of the tokens: "pixels", "words".
    """

    layers: list[Found]
    inputs: frozenset[str]

    @property
    def tokens(self) -> Tensor:
        """The input of the first layer, [batch, tokens, hidden]."""
        found = self.layers[0].call.tokens
        assert found is not None
        return found


@dataclass(eq=False)
class _Event:
    """An attention or an addition, with its enclosing calls."""

    within: tuple[Call, ...]
    tokens: int = 0
    shape: torch.Size | None = None
    joins: int | None = None


def encoders(model: nn.Module, example: Any) -> list[Encoder]:
    """Return the encoders in a forward pass of a model on an example, in evaluation mode."""
    recorder = _Recorder()
    for leaf in tree_leaves(example):
        if isinstance(leaf, Tensor):
            _mark(leaf, {_PIXELS if leaf.is_floating_point() else _WORDS})
    with evaluating(model), _watched(model, recorder), recorder:
        call(model, example)
    return _chains(list(recorder.layers()))


class _Recorder(TorchFunctionMode):
    """Propagates marks through operations, and records attentions and additions."""

    def __init__(self) -> None:
        super().__init__()
        self.stack: list[Call] = []
        self.events: list[_Event] = []
        self.attentions: list[int] = []  # their places among the events
        self.joined: dict[int, int] = {}  # number of an attention -> place of its addition

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run and record an operation."""
        kwargs = dict(kwargs or {})
        marks = _marks((args, kwargs))
        tokens = _attends(func, args, kwargs)
        if func in ADDITIONS:
            self._added(args)
        if tokens:
            marks = marks | {len(self.attentions)}
            self.attentions.append(len(self.events))
            self.events.append(_Event(tuple(self.stack), tokens))
        result = func(*args, **kwargs)
        if marks:
            for leaf in tree_leaves(result):
                if isinstance(leaf, Tensor) and not isinstance(leaf, nn.Parameter):
                    _mark(leaf, marks)
        return result

    def _added(self, args: tuple[Any, ...]) -> None:
        if len(args) < 2 or not all(isinstance(each, Tensor) and each.dim() == 3 for each in args[:2]):
            return
        if args[0].shape != args[1].shape:
            return
        one, other = ({each for each in _marks(arg) if isinstance(each, int)} for arg in args[:2])
        fresh = [each for each in one ^ other if each not in self.joined]
        joins = max(fresh, default=None)
        if joins is not None:
            self.joined[joins] = len(self.events)
        self.events.append(_Event(tuple(self.stack), shape=args[0].shape, joins=joins))

    def layers(self) -> Iterator[Found]:
        """Yield the layers, in the order of their attentions."""
        places = {number: self.events[place] for number, place in enumerate(self.attentions)}
        for number, event in places.items():
            if number not in self.joined:
                continue
            addition = self.events[self.joined[number]]
            shared = [each for each in event.within if each in addition.within]
            others = {each for other, at in places.items() if other != number for each in at.within}
            for each in shared:  # the outermost first
                tokens, result = each.tokens, each.result
                fits = tokens is not None and result is not None and tokens.shape == result.shape == addition.shape
                if each not in others and fits and addition.shape is not None and addition.shape[1] == event.tokens:
                    yield Found(each, self._site(each, number))
                    break

    def _site(self, layer: Call, number: int) -> Site:
        start, end = self.attentions[number], self.joined[number]
        between = [
            event
            for event in self.events[start:end]
            if event.shape is not None and layer in event.within and event.shape == self.events[end].shape
        ]
        return Site(0, len(between))


def _attends(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """Return the number of tokens of a self-attention; 0 for any other operation."""
    if func is FUSED:
        query, key = (args[place] if place < len(args) else kwargs[name] for place, name in enumerate(("query", "key")))
        return int(query.shape[-2]) if query.shape[-2] == key.shape[-2] else 0
    if func is PACKED:
        return int(args[0].shape[0]) if args[0] is args[1] is args[2] else 0
    if func in SOFTMAXES:
        logits = args[0] if args else kwargs.get("input")
        square = isinstance(logits, Tensor) and logits.dim() > 2 and logits.shape[-1] == logits.shape[-2]
        return int(logits.shape[-1]) if square else 0  # type: ignore[union-attr]
    return 0


def _chains(layers: list[Found]) -> list[Encoder]:
    chains: list[list[Found]] = []
    for layer in layers:
        before = next((each for each in chains if each[-1].call.result is layer.call.tokens), None)
        if before is None:
            chains.append([layer])
        else:
            before.append(layer)
    return [
        Encoder(each, frozenset(mark for mark in _marks(each[0].call.tokens) if isinstance(mark, str)))
        for each in chains
    ]


@contextmanager
def _watched(model: nn.Module, recorder: _Recorder) -> Iterator[None]:
    """Record the calls of modules within the block."""
    handles = []

    def enter(path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            recorder.stack.append(Call(path, module, args, kwargs, tuple(recorder.stack)))

        return hook

    def leave(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        recorder.stack.pop().output = output

    for path, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(enter(path), with_kwargs=True, prepend=False))
        handles.append(module.register_forward_hook(leave))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _first(values: Any) -> Tensor | None:
    return next((each for each in tree_leaves(values) if isinstance(each, Tensor)), None)


def _marks(values: Any) -> frozenset[Any]:
    found: frozenset[Any] = frozenset()
    for each in tree_leaves(values):
        if isinstance(each, Tensor):
            found |= getattr(each, _MARKS, frozenset())
    return found


def _mark(tensor: Tensor, marks: frozenset[Any] | set[Any]) -> None:
    setattr(tensor, _MARKS, frozenset(marks))
