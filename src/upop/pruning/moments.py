"""What the layers that read a unit are given: second moments, of two parts of what a model saw, kept apart.

Tokens of a sequence resemble each other, so what holds for some of them says little of others. Whole batches go to one
part or the other, and each part tells how well what was learnt from the other does.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.hooks import RemovableHandle

from upop.pruning.again import (
    AsWritten,
    autocast,
    buffers_kept,
    is_transformed,
    precision_now,
    random_numbers_kept,
    repeated,
    uncompiled,
)
from upop.pruning.costs import evaluating
from upop.pruning.errors import StepError
from upop.pruning.sharded import many_processes, reshard
from upop.pruning.units import Unit, owner_of

PARTS = 2
_TOKENS = 8192
"""Most tokens of a forward pass that are looked at, at even distances."""


def readers(model: nn.Module, unit: Unit) -> list[nn.Linear]:
    """Return the layer that reads the unit's axis and then its momentum copies, if it is a plain linear layer."""
    reader = unit.online[-1]
    copies = [part for part in unit.slices if part.follows and not part.produces and part.dim == 1]
    modules = [owner_of(model, part.tensor)[0] for part in (reader, *copies) if part.tensor.endswith(".weight")]
    plain = reader.dim == 1 and modules and all(type(each).forward is nn.Linear.forward for each in modules)
    return [each for each in modules if isinstance(each, nn.Linear)] if plain else []


class Moments:
    """Second moments of what the readers of some units are given, without padding and, where asked, without drop-out.

    Tokens that the loss does not depend on (padding, all but the class token in a last layer) are left out. Forward
    passes without gradients are not looked at.

    Args:
        again: the model trains, with drop-out and the like: its forward pass only tells which tokens matter, and
            `look_again` takes the moments from a second pass in evaluation mode. Otherwise they are taken at once.

    Attributes:
        values: unit's name -> the sums of `x x^T`, with a 1 behind each x, [PARTS, n + 1, n + 1]; float64 where x is,
            else float32. Tokens whose outputs are larger than usual count for so much less.
        sizes: unit's name -> the sum of logarithms of the squares of its reader's outputs, over the tokens that were
            seen first, and how many they were, [2]: what is usual.
        part: which part the next batch belongs to; None gives half of its samples to each.
    """

    def __init__(self, *, again: bool = False) -> None:
        self.values: dict[str, Tensor] = {}
        self.sizes: dict[str, Tensor] = {}
        self.part: int | None = None
        self._again = again
        self._hooks: dict[str, RemovableHandle] = {}
        self._root: list[RemovableHandle] = []
        self._unhook: Callable[[], Any] = lambda: None
        self._as_written: AsWritten | None = None
        self._leave: Callable[[], Any] = lambda: None
        self._touched = False  # whether any hook was called since the last step
        self._passed_by = False  # whether code that was compiled elsewhere ran the model without its hooks
        self._passes: list[_Pass] = []
        self._running = self._clean = self._sizing = False
        self._agreed = False  # whether the processes know how large outputs are
        self._calls: dict[str, list[Tensor | None]] = {}  # by unit, which rows of each call matter to the loss
        self._unhooked: dict[str, list[int]] = {}  # calls that a checkpoint made without gradients
        self._counts: dict[str, int] = {}  # by unit, calls of a second pass so far

    def watch(self, model: nn.Module, units: Iterable[Unit], wrapper: nn.Module | None = None) -> None:
        """Look at forward passes from now on, at what the readers of `units` are given, and at nothing else.

        As long as anything is looked at, the model runs as it was written where it, or a part of it, was compiled.
        Other compiled code does so only once it was found to run the model past its hooks.

        Args:
            model: the model.
            units: whose readers are looked at.
            wrapper: what is called in place of the model, if anything is.
        """
        wanted = {unit.name: layers[0] for unit in units if (layers := readers(model, unit))}
        if set(wanted) == set(self._hooks):
            return
        self.release()
        self._hooks = {name: layer.register_forward_hook(_Look(self, name)) for name, layer in wanted.items()}
        if self._hooks:
            if self._again:
                self._root = [
                    model.register_forward_pre_hook(_Begin(self), with_kwargs=True),
                    model.register_forward_hook(_End(self)),
                ]
            self._unhook = weakref.finalize(self, _remove, [*self._hooks.values(), *self._root])
            self._as_written = AsWritten(model if wrapper is None else wrapper)
            self._touched = False
            if self._passed_by:
                self._look_into_all()

    def _look_into_all(self) -> None:
        uncompiled.enter()
        self._leave = weakref.finalize(self, uncompiled.leave)

    @property
    def looks(self) -> bool:
        """Whether anything is looked at."""
        return bool(self._hooks)

    def release(self) -> None:
        """Look no longer; no trace is left on the model."""
        self._unhook()
        self._hooks.clear()
        self._root.clear()
        self.forget()
        if self._as_written is not None:
            self._as_written.end()
            self._as_written = None
        self._leave()

    def resume(self, values: Mapping[str, Tensor], sizes: Mapping[str, Tensor]) -> None:
        """Go on from what was kept of earlier passes."""
        self.values = {name: value.clone() for name, value in values.items()}
        self.sizes = {name: value.clone() for name, value in sizes.items()}
        self._agreed = bool(sizes)

    def forget(self) -> None:
        """Forget the forward passes since the last step, but not the moments."""
        self._passes.clear()
        self._calls.clear()
        self._unhooked.clear()
        self._running = self._touched = False

    @torch.no_grad()
    def look_again(self, model: nn.Module) -> None:
        """Take the moments of the forward passes since the last call, in evaluation mode; buffers stay as they are.

        Raises:
            StepError: the model does not take in evaluation mode what it took in training.
        """
        if self._hooks and not self._touched and not self._passed_by:  # by a wrapper, or a function, unknown to us
            self._passed_by = True
            self._look_into_all()
        passes = self._passes.copy()
        self._sizing = bool(passes) and not self._agreed
        device = next(model.parameters()).device
        self._clean = True
        # torch's own encoder has kernels for evaluation that pass by its layers, and by whoever looks at them.
        fast = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            with buffers_kept(model) if passes else nullcontext():
                for _ in range(2 if self._sizing else 1):
                    self._counts = {}
                    for each in passes:
                        with evaluating(model), random_numbers_kept(device), autocast(device, each.precision):
                            model(*each.args, **each.kwargs)
                    if self._sizing:
                        self._agree(device)
        except Exception as error:
            raise StepError(
                f"The correction looks at {type(model).__name__} in evaluation mode, where its forward pass failed on "
                f"the arguments that it was given in training ({type(error).__name__}: {error}). Give "
                "Pruner(correct=False)."
            ) from error
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)
            self._clean = self._sizing = False
            self.forget()
            if passes:
                reshard(model)

    def _agree(self, device: torch.device) -> None:
        """Add up over all processes how large outputs are."""
        self._sizing, self._agreed = False, True
        names = list(self._hooks)
        nothing = torch.zeros(2, dtype=torch.float64 if device.type != "mps" else torch.float32, device=device)
        if many_processes():
            sums = torch.stack([self.sizes.get(name, nothing).to(nothing) for name in names])
            torch.distributed.all_reduce(sums)
            self.sizes = {name: row for name, row in zip(names, sums, strict=True) if row[1] > 0}

    def add(self, name: str, inputs: Tensor, counts: Tensor, squares: Tensor) -> None:
        """Add what the reader of a unit was given, [..., n].

        Args:
            name: of the unit.
            inputs: [..., n].
            counts: where rows are not padding, bool, [rows].
            squares: sum of squares of the reader's outputs, [rows].
        """
        for held in (self.values, self.sizes):  # a search may be resumed on another device
            if name in held:
                held[name] = held[name].to(inputs.device)
        if self._sizing or name not in self.sizes:
            logs = squares.clamp_min(torch.finfo(squares.dtype).tiny).log() * counts
            size = torch.stack([logs.sum(), counts.sum()])
            self.sizes[name] = self.sizes[name] + size if name in self.sizes else size
        if self._sizing:
            return
        total, number = self.sizes[name]
        # Some tokens are thousands of times as large as others and say as little: no token counts more for being large.
        weights = counts * ((total / number.clamp_min(1)).exp() / squares).clamp_max(1).nan_to_num(0.0)
        rows = inputs.detach().flatten(0, -2)
        apart = -(-len(rows) // _TOKENS)
        parts = self._parts(inputs)[::apart]
        rows, weights = rows[::apart], weights[::apart]
        rows = rows if rows.dtype == torch.float64 else rows.float()
        rows = torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1)
        if name not in self.values:
            self.values[name] = rows.new_zeros(PARTS, rows.shape[1], rows.shape[1])
        for part in range(PARTS) if self.part is None else [self.part]:
            # Weighed, not picked: picking waits for the device.
            product = rows.t() @ (rows * (weights * (parts == part)).to(rows).unsqueeze(1))
            self.values[name][part] += torch.where(product.isfinite().all(), product, 0.0)

    def _parts(self, inputs: Tensor) -> Tensor:
        """Return the part of every row."""
        count = inputs.numel() // inputs.shape[-1]
        if self.part is not None:
            return torch.full((count,), self.part, device=inputs.device)
        first = -(-len(inputs) // PARTS) * (count // len(inputs))  # rows of the first samples
        return torch.arange(count, device=inputs.device) // first

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note what the model is given, if it is to learn from it."""
        self._running = torch.is_grad_enabled() and not self._clean and not is_transformed()
        if self._running:
            args, kwargs = tree_map(
                lambda value: value.detach() if isinstance(value, Tensor) else value, (args, kwargs)
            )
            kinds = [value.device.type for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
            self._passes.append(_Pass(args, kwargs, precision_now(kinds[0]) if kinds else None))

    def end(self, model: nn.Module) -> None:
        """Note how the model chose at random in the pass that ends, if it tells."""
        if self._running:
            last = self._passes[-1]
            last.args, last.kwargs = repeated(model, last.args, last.kwargs)
        self._running = False

    def see(self, name: str, inputs: Tensor, output: Tensor) -> None:
        """See one call of a reader."""
        self._touched = True
        if self._clean:
            number = self._counts.get(name, 0)
            self._counts[name] = number + 1
            calls = self._calls.get(name, [])
            counts = calls[number] if number < len(calls) else None
            if counts is not None and counts.numel() == inputs.numel() // inputs.shape[-1]:
                self.add(name, inputs, counts, _squares(output))
        elif not self._again:
            if output.requires_grad:
                self._see_now(name, inputs, output)
        elif self._running:
            calls = self._calls.setdefault(name, [])
            calls.append(None)
            if output.requires_grad:
                output.register_hook(self._noting(name, len(calls) - 1))
            else:
                self._unhooked.setdefault(name, []).append(len(calls) - 1)
        elif output.requires_grad and self._unhooked.get(name):  # a checkpoint computes it again, the last call first
            output.register_hook(self._noting(name, self._unhooked[name].pop()))

    def _noting(self, name: str, number: int) -> Callable[[Tensor], None]:
        calls = self._calls[name]

        def note(gradient: Tensor) -> None:
            calls[number] = (gradient != 0).any(-1).flatten()

        return note

    def _see_now(self, name: str, inputs: Tensor, output: Tensor) -> None:
        # Saved as autograd saves tensors, so that checkpointing keeps none of them, and offloading works.
        held = _Held.apply(inputs.detach(), torch.empty((), requires_grad=True))
        squares = _squares(output)

        def look(gradient: Tensor) -> None:
            (saved,) = held.grad_fn.saved_tensors
            self.add(name, saved, (gradient != 0).any(-1).flatten(), squares)

        output.register_hook(look)


def _squares(outputs: Tensor) -> Tensor:
    """Return the sum of squares of every row of outputs, [rows]; float64 where they are, else float32."""
    outputs = outputs.detach().flatten(0, -2)
    return (outputs if outputs.dtype == torch.float64 else outputs.float()).square().sum(1)


@dataclass
class _Pass:
    """A forward pass: what the model was given, and the precision of autocast."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    precision: tuple[str, torch.dtype] | None


def _remove(hooks: list[RemovableHandle]) -> None:
    for hook in hooks:
        hook.remove()


class _Hook:
    """A hook that tells its `Moments` as long as anyone holds them; a copy, or a pickled one, does nothing any more."""

    def __init__(self, moments: Moments | None = None, name: str = "") -> None:
        self._moments, self._name = None if moments is None else weakref.ref(moments), name

    def _told(self) -> Moments | None:
        """Return who is to be told; code that is being compiled tells nobody."""
        return None if self._moments is None or torch.compiler.is_compiling() else self._moments()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return type(self)()

    def __reduce__(self) -> tuple[type[Self], tuple[()]]:
        return type(self), ()


class _Look(_Hook):
    """The hook on a reader."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        del module
        moments = self._told()
        if moments is not None:
            moments.see(self._name, args[0], output)


class _Begin(_Hook):
    """The hook before the model's forward pass."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        del module
        moments = self._told()
        if moments is not None:
            moments.begin(args, kwargs)


class _End(_Hook):
    """The hook after the model's forward pass."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        del args, output
        moments = self._told()
        if moments is not None:
            moments.end(module)


class _Held(torch.autograd.Function):
    """Holds a tensor as other functions hold what their backward passes need."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, anchor: Tensor) -> Tensor:
        ctx.save_for_backward(value)
        return anchor.clone()
