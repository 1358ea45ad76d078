"""Traces one forward: follows every axis through the tensor operations that run."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from itertools import pairwise
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

from upop.pruning.axes.axis import Axis, Dim, axes_in, doing, factors_of, fix, leaves_of, length, tie
from upop.pruning.axes.label import Label, Made, Rows, Step, Use, plain
from upop.pruning.axes.mode import Mode, kept_by, leaves_in, name_of, tensors_in
from upop.pruning.axes.rule import follow, past_of
from upop.pruning.costs import flop_formulas
from upop.pruning.errors import LayoutError


class WrittenError(BaseException):
    """The forward writes to a buffer that was assumed constant; a BaseException, which forwards do not catch.

    Attributes:
        name: of that buffer.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


class Trace(Mode):
    """Follows the axes of the parameters through all operations, as a dispatch mode.

    Args:
        model: its parameters produce the axes.
        written: buffers that the forward writes to, such as key-value caches; they carry axes.

    Attributes:
        uses: parameter name -> its uses.
        steps: all operations, in order.
        gates: parameters that gate others.
        added: parameters whose rows are added to those of others, so that they produce without a gate.
        gave: module name -> the outputs of each call, with tensors as `Made`.
        readers: parameter name -> the modules that read it.
        attending: modules that call torch's attention function.
        query_rows: the positions of queries along dimensions of parameters.
        silent_rows: the positions of gates.
        norms: modules that take a mean or a variance, and the dimensions that they take it over.
        multiply_adds: of all matrix products.
    """

    def __init__(self, model: nn.Module, written: Collection[str] = ()) -> None:
        super().__init__()
        self._written = written
        self._model = model
        self.uses: dict[str, Use] = {}
        self.steps: list[Step] = []
        self.gates: set[tuple[str, Axis]] = set()
        self.added: set[tuple[str, Axis]] = set()
        self.stack = [""]
        self.gave: dict[str, list[Any]] = {}
        self.readers: dict[str, set[str]] = {}
        self.attending: set[str] = set()
        self.norms: list[tuple[str, Dim]] = []
        self.multiply_adds = 0
        self._labels: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._names = {module: name for name, module in model.named_modules()}
        self._parameters = {id(each): name for name, each in model.named_parameters()}
        self._held = {id(each): name for name, each in model.named_buffers()} | self._parameters
        self._kept = {_storage(each): name for name, each in model.named_buffers() if each.is_floating_point()}
        self._bits: dict[str, int] = {}
        self._pairs: list[tuple[Dim, Dim]] = []
        self._sliced: dict[Axis, None] = {}
        self.query_rows: Rows = {}
        self.silent_rows: Rows = {}

    # -- what rules use -------------------------------------------------------------------------------------------

    def label(self, tensor: Tensor, joined: bool = False) -> Label:
        """Return the label of a tensor; unknown tensors are plain numbers.

        So are non-persistent buffers, which are recomputed in full size when a model is loaded, unless they are
        concatenated to a tensor that follows an axis, as timm does with zeros for the bias of keys.
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
        """Whether a parameter or buffer is saved, or written to by the forward."""
        owner, _, own = name.rpartition(".")
        return name in self._written or own not in self._model.get_submodule(owner)._non_persistent_buffers_set

    def use(self, name: str, tensor: Tensor) -> Use:
        """Return the record of a parameter (or of a buffer that follows an axis)."""
        if name not in self.uses:
            self.uses[name] = Use(name, [Axis(size) for size in tensor.shape])
        return self.uses[name]

    def set(self, tensor: Tensor, label: Label) -> None:
        """Set the label of a tensor."""
        if tuple(length(dim) for dim in label.dims) != tuple(tensor.shape):
            for dim in label.dims:
                fix(dim, "its shape was lost")
            label = Label(plain(tensor), past=label.past)
        self._labels[tensor] = label

    def given(self, tensors: Iterable[Tensor]) -> None:
        """Label the inputs of the model: results that depend on them are no parameters."""
        for tensor in tensors:
            self._labels[tensor] = Label(plain(tensor), past=self.bits([""]))

    def bits(self, names: Iterable[str]) -> int:
        """Encode parameters as bits."""
        found = 0
        for name in names:
            found |= self._bits.setdefault(name, 1 << len(self._bits))
        return found

    def summed(self, leaf: Axis, past: int) -> bool:
        """Whether any of these parameters (bits) consumes an axis."""
        return _any_is((use for name, use in self.uses.items() if self.bits([name]) & past), "consumes", {leaf})

    def pair(self, one: Dim, other: Dim) -> None:
        """Tie axes after the run; until then, queries and keys stay distinguishable."""
        if any(axes_in([one])) and any(axes_in([other])):
            self._pairs.append((one, other))
            for axis in axes_in([one]):
                axis.mark("attends")

    def slices(self, label: Label, dim: Dim) -> None:
        """Record a slice of an activation; equal slices that cover it must keep the same channels."""
        factors = factors_of(dim)
        if label.active and len(factors) == 1 and isinstance(factors[0], Axis):
            self._sliced[factors[0].root] = None

    def norm(self, dim: Dim) -> None:
        """Take note that the module which is running takes a mean or a variance over a dimension."""
        self.norms.append((self.stack[-1], dim))

    def opens(self, names: Iterable[str], dims: Iterable[Dim]) -> bool:
        """Whether any of these parameters produces an axis in `dims`, so that it is no token axis."""
        return _any_is((self.uses[name] for name in names), "produces", leaves_of(dims))

    def queries(self, label: Label, dim: Dim) -> None:
        """Record a tensor as queries with head dims `dim`, before they are tied to the keys."""
        with unset_fake_temporarily():  # these numbers are wanted
            for key, rows in self.rows(label, [dim]).items():
                self.query_rows[key] = self.query_rows.get(key, torch.zeros_like(rows)) | rows

    def gate(self, gate: Rows, value: Rows) -> bool:
        """Record parameter rows that only gate other rows of the same parameters; return whether there are any."""
        with unset_fake_temporarily():
            alone = {key: rows & ~value[key] for key, rows in gate.items() if key in value}
            for key, rows in alone.items():
                self.silent_rows[key] = self.silent_rows.get(key, torch.zeros_like(rows)) | rows
            return any(bool(rows.any()) for rows in alone.values())

    def rows(self, label: Label, dims: Iterable[Dim]) -> Rows:
        """Return the parameter rows that dimensions of a tensor come from, where known."""
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

    def finish(self, outputs: Iterable[Tensor], beside: Iterable[Tensor] = ()) -> None:
        """Fix the axes of the outputs, and tie the values of each attention to its queries and keys.

        Args:
            outputs: of the model.
            beside: what it returns beside them, inside the outputs of its parts.
        """
        for tensors, bars in ((outputs, True), (beside, False)):
            for tensor in tensors:
                for dim in self.label(tensor).dims:
                    fix(dim, "it leaves the model", bars=bars)
        for module in self._model.modules():
            for label in (self._labels.get(each) for each in tree_leaves(kept_by(module)) if isinstance(each, Tensor)):
                for dim in label.dims if label is not None else ():
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
        """The tensors that carry each leaf axis; valid after the run."""
        found: dict[Axis, list[Use]] = {}
        for use in self.uses.values():
            for leaf in dict.fromkeys(leaf for axis in use.axes for leaf in axis.leaves()):
                found.setdefault(leaf, []).append(use)
        return found

    @cached_property
    def carrying(self) -> dict[Axis, list[int]]:
        """The indices of the steps that involve each leaf axis; valid after the run."""
        found: dict[Axis, list[int]] = {}
        for at, step in enumerate(self.steps):
            for leaf in leaves_of(dim for dims in (*step.dims, *step.inputs) for dim in dims or ()):
                found.setdefault(leaf, []).append(at)
        return found

    def note(self, label: Label, dim: int, role: str) -> None:
        """Record the role of a parameter dimension."""
        dim %= max(1, len(label.dims))
        for name in label.sources if label.parameter else ():
            for place, axis in enumerate(self.uses[name].axes):
                if not leaves_of([label.dims[dim]]).isdisjoint(axis.leaves()):
                    self.uses[name].note(place, role)

    # -- running --------------------------------------------------------------------------------------------------

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operation and its rule."""
        result = func(*args, **kwargs)
        outputs = tensors_in(result)
        if any(each.is_nested for each in outputs):
            raise LayoutError(
                f"{type(self._model).__name__} uses torch's nested tensors, whose axes cannot be traced. "
                "Give an example without them, or pad it."
            )
        if not outputs:
            return result  # it was asked something
        self._note_reading(args, kwargs)
        if name_of(func) in _WRITES:
            name = self._kept.get(_storage(args[0]), "")
            put = [dim for each in tensors_in(args[1:]) for dim in self.label(each).dims]
            if name and name not in self._written and any(axes_in(put)):
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
                self.stack[-1],
                tuple(self._known(each) for each in outputs),
                tuple(self._known(each) for each in given if isinstance(each, Tensor)),
                tuple(each for each in given if isinstance(each, int | float)),
                line,
            )
        )
        self._take_over(args, kwargs, outputs)
        return result

    def _take_over(self, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Iterable[Tensor]) -> None:
        """Keep the origin of outputs that the rule did not label."""
        new = [each for each in outputs if each not in self._labels]
        if new:
            past = past_of([self.label(each) for each in tensors_in((args, kwargs))])
            for each in new:
                self._labels[each] = Label(plain(each), past=past)

    def _known(self, tensor: Tensor) -> tuple[Dim, ...] | None:
        found = self._labels.get(tensor)
        return None if found is None or found.blank else tuple(found.dims)

    def _note_reading(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for each in tensors_in((args, kwargs)):
            name = self._parameters.get(id(each))
            if name is not None:
                self.readers.setdefault(name, set()).add(self.stack[-1])
                owner = self._model.get_submodule(name.rpartition(".")[0])
                inside = self._names[owner] == self.stack[-1]
                plain = isinstance(owner, nn.Linear) and type(owner).forward is nn.Linear.forward
                around = self._model.get_submodule(self._names[owner].rpartition(".")[0])
                fused = isinstance(around, nn.TransformerEncoderLayer)  # in evaluation it may pass by its layers
                if not (inside and plain and "forward" not in owner.__dict__) or fused:
                    self.use(name, each).direct = True

    @contextmanager
    def running(self) -> Iterator[None]:
        """Trace the block, with the stack of running modules."""
        with inside_modules(self._model, self.stack, self.gave), _Attention(self), self:
            yield


class _Attention(TorchFunctionMode):
    """Records the modules that call torch's attention function."""

    def __init__(self, trace: Trace) -> None:
        super().__init__()
        self._trace = trace

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        if func is F.multi_head_attention_forward:
            self._trace.attending.add(self._trace.stack[-1])
        return func(*args, **(kwargs or {}))


_WRITES = {"copy_", "index_put_", "index_copy_", "index_add_", "scatter_", "masked_scatter_", "_index_put_impl_"}


def _any_is(uses: Iterable[Use], role: str, leaves: set[Axis]) -> bool:
    """Whether a parameter has a role for any of these axes."""
    return any(
        role in use.roles.get(dim, ()) and not leaves.isdisjoint(axis.leaves())
        for use in uses
        for dim, axis in enumerate(use.axes)
    )


def _storage(tensor: Tensor) -> int:
    """Return the storage, which identifies a tensor and its views."""
    return int(tensor.untyped_storage()._cdata)


def _rows(axis: Axis, wanted: Iterable[Axis]) -> Tensor:
    """Return which positions of an axis carry any of the given axes, [size]."""
    rows = torch.zeros(axis.size, dtype=torch.bool)
    for leaf in wanted:
        rows |= axis.channels(leaf.root) >= 0
    return rows


@contextmanager
def inside_modules(model: nn.Module, stack: list[str], gave: dict[str, list[Any]] | None = None) -> Iterator[None]:
    """Maintain `stack`, the dotted names of the running modules from "" on; the model is left unchanged.

    Outputs of modules are collected in `gave`.
    """
    names = {module: name for name, module in model.named_modules()}

    def enter(module: nn.Module, args: Any) -> None:
        del args
        stack.append(names.get(module, stack[-1]))

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        del args
        if len(stack) > 1:
            stack.pop()
        if gave is not None and module in names:
            made = tree_map_only(Tensor, lambda each: Made(tuple(each.shape), each.dtype), output)
            gave.setdefault(names[module], []).append(made)

    hooks = nn.modules.module
    handles = [hooks.register_module_forward_pre_hook(enter), hooks.register_module_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def user_line() -> str:
    """Return the innermost file and line outside of torch and upop."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if "/torch/" not in file and "/upop/pruning/" not in file and not file.startswith("<"):
            return f"{file.rpartition('site-packages/')[2]}:{frame.f_lineno}"
        frame = frame.f_back
    return ""
