"""Running a forward once and following every axis through the tensor operations that really happen."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakIdKeyDictionary

from upop.pruning.axes.axis import Axis, Dim, axes_in, doing, factors_of, fix, length, tie
from upop.pruning.axes.label import Label, Made, Rows, Step, Use, plain
from upop.pruning.axes.mode import Mode, leaves_in, name_of, tensors_in
from upop.pruning.costs import flop_formulas
from upop.pruning.errors import LayoutError


class WrittenError(BaseException):
    """A buffer is written to that was taken for numbers that stay; no `except Exception` of a forward is to hear of it.

    Attributes:
        name: of the buffer.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


class Trace(Mode):
    """Follows the axes of a model's parameters while it is the active dispatch mode.

    Args:
        model: whose parameters open axes.
        written: its buffers that are written to, as caches of keys and values are: they carry what is put there.

    Attributes:
        uses: parameter's name -> what it was seen to do.
        steps: all operations, in order.
        gates: parameters that gate what others make.
        added: parameters whose rows are added to those of others: what they make is there without any gate.
        gave: module's name -> what each of its calls gave; every tensor is a `Made`.
        readers: parameter's name -> the modules that were running when it was read.
        attending: the modules that call torch's attention function.
        multiply_adds: of all products.
    """

    def __init__(self, model: nn.Module, written: Collection[str] = ()) -> None:
        super().__init__()
        self._written = written
        self._model = model
        self.uses: dict[str, Use] = {}
        self.steps: list[Step] = []
        self.gates: set[tuple[str, Axis]] = set()
        self.added: set[tuple[str, Axis]] = set()
        self.stack: list[str] = []
        self.gave: dict[str, list[Any]] = {}
        self.readers: dict[str, set[str]] = {}
        self.attending: set[str] = set()
        self.multiply_adds = 0
        self._labels: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._names = {module: name for name, module in model.named_modules()}
        self._parameters = {id(each): name for name, each in model.named_parameters()}
        self._held = {id(each): name for name, each in model.named_buffers()} | self._parameters
        self._kept = {_storage(each): name for name, each in model.named_buffers() if each.is_floating_point()}
        self._bits: dict[str, int] = {}
        self._pairs: list[tuple[Dim, Dim]] = []
        self._sliced: dict[Axis, None] = {}
        self._queries: dict[tuple[str, int], Tensor] = {}
        self._silent: dict[tuple[str, int], Tensor] = {}

    # -- what rules use -------------------------------------------------------------------------------------------

    def label(self, tensor: Tensor, joined: bool = False) -> Label:
        """Return what is known of a tensor; one that nothing is known of is plain numbers.

        So is a buffer that no file holds, since it is computed anew in full size when a model is loaded, unless it is
        joined as it is to what follows an axis, as timm does zeros for the bias of keys.
        """
        found: Label | None = self._labels.get(tensor)
        if found is None:
            name = self._held.get(id(tensor))
            if name is None or not (joined or self._saved(name)):
                found = Label(plain(tensor))
            else:
                dims: list[Dim] = [(axis,) for axis in self.use(name, tensor).axes]
                stays = name not in self._written
                found = Label(dims, frozenset([name]), parameter=stays, past=self.bits([name]) if stays else 0)
            self._labels[tensor] = found
        return found

    def _saved(self, name: str) -> bool:
        """Whether a parameter or buffer is part of what is saved, or of what the model writes to."""
        owner, _, own = name.rpartition(".")
        return name in self._written or own not in self._model.get_submodule(owner)._non_persistent_buffers_set

    def use(self, name: str, tensor: Tensor) -> Use:
        """Return the record of a parameter (or of a buffer that follows an axis)."""
        if name not in self.uses:
            self.uses[name] = Use(name, [Axis(size) for size in tensor.shape])
        return self.uses[name]

    def set(self, tensor: Tensor, label: Label) -> None:
        """Remember what a tensor is made of."""
        if tuple(length(dim) for dim in label.dims) != tuple(tensor.shape):
            for dim in label.dims:
                fix(dim, "its shape was lost")
            label = Label(plain(tensor), past=label.past)
        self._labels[tensor] = label

    def given(self, tensors: Iterable[Tensor]) -> None:
        """Take note of what the model is given: what comes of it is no parameter."""
        for tensor in tensors:
            self._labels[tensor] = Label(plain(tensor), past=self.bits([""]))

    def bits(self, names: Iterable[str]) -> int:
        """Return some parameters as bits."""
        found = 0
        for name in names:
            found |= self._bits.setdefault(name, 1 << len(self._bits))
        return found

    def summed(self, leaf: Axis, past: int) -> bool:
        """Whether one of some parameters, given as bits, sums over an axis."""
        return any(
            "consumes" in use.roles.get(dim, ()) and leaf in set(axis.leaves())
            for name, use in self.uses.items()
            if self.bits([name]) & past
            for dim, axis in enumerate(use.axes)
        )

    def pair(self, one: Dim, other: Dim) -> None:
        """Take note of axes to be tied once the model has run: until then, queries are told apart from keys."""
        if any(True for _ in axes_in([one])) and any(True for _ in axes_in([other])):
            self._pairs.append((one, other))
            for axis in axes_in([one]):
                axis.mark("attends")

    def slices(self, label: Label, dim: Dim) -> None:
        """Take note that an activation is sliced along a dimension: equal slices of all of it are to stay alike."""
        factors = factors_of(dim)
        if label.active and len(factors) == 1 and isinstance(factors[0], Axis):
            self._sliced[factors[0].root] = None

    def opens(self, names: Iterable[str], dims: Iterable[Dim]) -> bool:
        """Whether one of some parameters was seen to produce an axis in `dims`: they are no tokens."""
        leaves = {leaf for axis in axes_in(dims) for leaf in axis.leaves()}
        uses = [self.uses[name] for name in names]
        return any(
            "produces" in use.roles.get(dim, ()) and not leaves.isdisjoint(axis.leaves())
            for use in uses
            for dim, axis in enumerate(use.axes)
        )

    def queries(self, label: Label, dim: Dim) -> None:
        """Take note that a tensor is queries, whose dimensions are `dim`; before they are tied to those of keys."""
        with unset_fake_temporarily():  # these numbers are wanted
            for key, rows in self.rows(label, [dim]).items():
                self._queries[key] = self._queries.get(key, torch.zeros_like(rows)) | rows

    def gate(self, gate: Rows, value: Rows) -> bool:
        """Take note of rows of parameters that only gate what other rows of theirs make; return whether there are."""
        with unset_fake_temporarily():
            alone = {key: rows & ~value[key] for key, rows in gate.items() if key in value}
            for key, rows in alone.items():
                self._silent[key] = self._silent.get(key, torch.zeros_like(rows)) | rows
            return any(bool(rows.any()) for rows in alone.values())

    def rows(self, label: Label, dims: Iterable[Dim]) -> Rows:
        """Return which rows of its parameters what is in some dimensions of a tensor comes from, where it is known."""
        found = {}
        with unset_fake_temporarily():
            wanted = list(axes_in([tuple(factors_of(dim)) for dim in dims]))
            for name in label.sources:
                for dim, axis in enumerate(self.uses[name].axes):
                    rows = _rows(axis, wanted)
                    for taken, place in label.places:
                        row, at = taken.root.row, axis.channels(taken.root)
                        if any(axis is part for part in row):  # a bias that was put together of several
                            rows &= axis is row[place]
                        elif (at >= 0).any():
                            rows &= at == place
                    if rows.any():
                        found[name, dim] = rows
        return found

    def query_rows(self, use: Use, dim: int) -> Tensor | None:
        """Return which positions along a dimension of a parameter are queries; None where nothing is known."""
        return self._queries.get((use.name, dim))

    def silent_rows(self, use: Use, dim: int) -> Tensor | None:
        """Return which positions along a dimension of a parameter only gate others; None where nothing is known."""
        return self._silent.get((use.name, dim))

    def finish(self, outputs: Iterable[Tensor]) -> None:
        """Fix what leaves the model, and tie the values of an attention to its queries and keys."""
        for tensor in outputs:
            for dim in self.label(tensor).dims:
                fix(dim, "it leaves the model")
        for label in self.kept():
            for dim in label.dims:
                fix(dim, "a module keeps it after the call")
        for whole in self._sliced:
            row = whole.root
            if row.joined == "row" and len({part.size for part in row.parts}) == 1:
                self._pairs += [((one,), (other,)) for one, other in pairwise(row.parts)]
        for one, other in self._pairs:
            if length(one) == length(other):
                tie(one, other, "queries and values have other sizes")

    @cached_property
    def carriers(self) -> dict[Axis, list[Use]]:
        """What carries each axis that has no parts, once the run is over."""
        found: dict[Axis, list[Use]] = {}
        for use in self.uses.values():
            for leaf in dict.fromkeys(leaf for axis in use.axes for leaf in axis.leaves()):
                found.setdefault(leaf, []).append(use)
        return found

    @cached_property
    def carrying(self) -> dict[Axis, list[int]]:
        """The places of the steps that take or give each axis that has no parts, once the run is over."""
        found: dict[Axis, list[int]] = {}
        for at, step in enumerate(self.steps):
            dims = (*step.dims, *step.inputs)
            for leaf in {leaf for each in dims for axis in axes_in(each or ()) for leaf in axis.leaves()}:
                found.setdefault(leaf, []).append(at)
        return found

    def note(self, label: Label, dim: int, role: str) -> None:
        """Take note of what a parameter's dimension is used for."""
        dim %= max(1, len(label.dims))
        for name in label.sources if label.parameter else ():
            axes = self.uses[name].axes
            for place, axis in enumerate(axes):
                if set(axis.leaves()) & {leaf for f in label.dims[dim] if isinstance(f, Axis) for leaf in f.leaves()}:
                    self.uses[name].note(place, role)

    # -- running --------------------------------------------------------------------------------------------------

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operation, and the rule for it."""
        from upop.pruning.axes.rules import follow

        result = func(*args, **kwargs)
        outputs = tensors_in(result)
        if any(each.is_nested for each in outputs):
            raise LayoutError(
                f"{type(self._model).__name__} computes with nested tensors of torch, whose axes cannot be followed. "
                "Give an example for which it does without, or pad."
            )
        if not outputs:
            return result  # it was asked something
        self._note_reading(args, kwargs)
        if name_of(func) in _WRITES:
            name = self._kept.get(_storage(args[0]), "")
            put = [dim for each in tensors_in(args[1:]) for dim in self.label(each).dims]
            if name and name not in self._written and any(True for _ in axes_in(put)):
                raise WrittenError(name)
        counted = flop_formulas().get(getattr(func, "overloadpacket", None))
        self.multiply_adds += counted(*args, **kwargs, out_val=result) // 2 if counted else 0
        line = user_line()
        with doing(name_of(func), line):
            follow(self, func, args, kwargs, result)
        given = leaves_in(args)
        self.steps.append(
            Step(
                name_of(func),
                self.stack[-1] if self.stack else "",
                tuple(self._known(each) for each in outputs),
                tuple(self._known(each) for each in given if isinstance(each, Tensor)),
                tuple(each for each in given if isinstance(each, int | float)),
                line,
            )
        )
        self._take_over(args, kwargs, outputs)
        return result

    def _take_over(self, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Iterable[Tensor]) -> None:
        """Remember where that comes from of which no rule says what it is."""
        new = [each for each in outputs if each not in self._labels]
        if new:
            past = 0
            for each in tensors_in((args, kwargs)):
                past |= self.label(each).past
            for each in new:
                self._labels[each] = Label(plain(each), past=past)

    def _known(self, tensor: Tensor) -> tuple[Dim, ...] | None:
        found = self._labels.get(tensor)
        return None if found is None or found.blank else tuple(found.dims)

    def _note_reading(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for each in tensors_in((args, kwargs)):
            name = self._parameters.get(id(each))
            if name is not None:
                self.readers.setdefault(name, set()).add(self.stack[-1] if self.stack else "")
                owner = self._model.get_submodule(name.rpartition(".")[0])
                inside = bool(self.stack) and self._names[owner] == self.stack[-1]
                plain = isinstance(owner, nn.Linear) and type(owner).forward is nn.Linear.forward
                if not (inside and plain and "forward" not in owner.__dict__) or self._fused(owner):
                    self.use(name, each).direct = True

    def _fused(self, layer: nn.Module) -> bool:
        """Whether torch hands the weights of a layer to a fused kernel in evaluation, past the layer's forward."""
        around = self._model.get_submodule(self._names[layer].rpartition(".")[0])
        return isinstance(around, nn.TransformerEncoderLayer)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Follow everything that runs inside, knowing which module is running."""
        with inside_modules(self._model, self.stack, self.gave), _Attention(self), self:
            yield

    def kept(self) -> Iterator[Label]:
        """Yield what is known of tensors that modules keep as attributes: what becomes of them, nobody follows."""
        for module in self._model.modules():
            for name, value in vars(module).items():
                if name not in ("_parameters", "_buffers", "_modules"):
                    found = (self._labels.get(each) for each in tree_leaves(value) if isinstance(each, Tensor))
                    yield from (label for label in found if label is not None)


class _Attention(TorchFunctionMode):
    """Takes note of the modules that call torch's attention function."""

    def __init__(self, trace: Trace) -> None:
        super().__init__()
        self._trace = trace

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        if func is F.multi_head_attention_forward:
            self._trace.attending.add(self._trace.stack[-1] if self._trace.stack else "")
        return func(*args, **(kwargs or {}))


_WRITES = {"copy_", "index_put_", "index_copy_", "index_add_", "scatter_", "masked_scatter_", "_index_put_impl_"}


def _storage(tensor: Tensor) -> int:
    """Return what a tensor shares with its views."""
    return int(tensor.untyped_storage()._cdata)


def _rows(axis: Axis, wanted: Iterable[Axis]) -> Tensor:
    """Return which positions of an axis carry one of some others, [size]."""
    rows = torch.zeros(axis.size, dtype=torch.bool)
    for leaf in wanted:
        rows |= axis.channels(leaf.root) >= 0
    return rows


@contextmanager
def inside_modules(model: nn.Module, stack: list[str], gave: dict[str, list[Any]] | None = None) -> Iterator[None]:
    """Keep the dotted names of the modules that are running in `stack`, the innermost last; the model is left alone.

    What the modules give is put into `gave`.
    """
    names = {module: name for name, module in model.named_modules()}

    def enter(module: nn.Module, args: Any) -> None:
        del args
        stack.append(names.get(module, stack[-1] if stack else ""))

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        del args
        if stack:
            stack.pop()
        if gave is not None and module in names:
            gave.setdefault(names[module], []).append(tree_map(_made, output))

    hooks = nn.modules.module
    handles = [hooks.register_module_forward_pre_hook(enter), hooks.register_module_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _made(value: Any) -> Any:
    return Made(tuple(value.shape), value.dtype) if isinstance(value, Tensor) else value


def user_line() -> str:
    """Return the file and line outside of torch and this library that is running."""
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if "/torch/" not in file and "/upop/pruning/" not in file and not file.startswith("<"):
            return f"{file.rpartition('site-packages/')[2]}:{frame.f_lineno}"
        if frame.f_back is None:
            break
        frame = frame.f_back
    return ""
