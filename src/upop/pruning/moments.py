"""Second moments of the inputs of consumers, in two separate parts of the samples.

Tokens of one sequence are correlated, so a split by tokens would not validate anything. Whole batches go to one part or
the other, and each part validates the correction that was fitted on the other.

Between steps only the inputs of the last steps are kept, with the tokens that mattered to the loss. To correct layers,
the model runs again on these inputs, as often as the memory limit requires.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from upop.pruning.again import AsWritten, buffers_kept, is_transformed, random_numbers_kept, repeated, uncompiled
from upop.pruning.compiled import all_compiled, in_compiled_function
from upop.pruning.costs import evaluating
from upop.pruning.errors import StepError
from upop.pruning.groups import Group, owner_of
from upop.pruning.least_squares import PARTS, ConsumerInputs, moments_bytes
from upop.pruning.observers import BeginHook, EndHook, LayerHook, remove_all
from upop.pruning.passes import Pass, device_of, logs_of, noting, squares_of
from upop.pruning.precision import accumulator
from upop.pruning.sharded import many_processes, reshard

OBSERVATIONS = 4
"""Most steps, the last ones, that are looked at."""
_TOKENS = 8192
"""Most tokens of a forward pass that are looked at, at even distances."""
_ENOUGH = 4
"""Times as many tokens as a layer has inputs: with so many, of two steps, earlier steps are let go."""
_SHARE, _SMALL = 4, 2**28
"""One in so many bytes of the weights may be held for the correction, and so many bytes where that is more."""

Correct = bool | Literal["auto"]


def consumers(model: nn.Module, group: Group) -> list[nn.Linear]:
    """Return the consumer of a group and its momentum copies, if the consumer is a plain linear layer."""
    reader = group.online[-1]
    copies = [part for part in group.slices if part.follows and not part.produces and part.dim == 1]
    modules = [owner_of(model, part.tensor)[0] for part in (reader, *copies) if part.tensor.endswith(".weight")]
    plain = reader.dim == 1 and modules and all(type(each).forward is nn.Linear.forward for each in modules)
    return [each for each in modules if isinstance(each, nn.Linear)] if plain else []


def allowed_bytes(model: nn.Module, correct: Correct) -> float:
    """Return the memory limit of a correction on the model's device, in bytes; none if `correct` is True.

    With "auto" it is a quarter of the weights' bytes, and at least 256 MiB on the CPU.
    """
    if correct is True:
        return float("inf")
    return least_allowed(sum(each.nbytes for each in model.parameters()), next(model.parameters()).device)


def least_allowed(weights: int, device: torch.device) -> int:
    """Return the bytes that the correction of a model may always take, for the bytes of its weights."""
    return max(weights // _SHARE, _SMALL if device.type == "cpu" else 0)


class Moments:
    """Collects second moments of the inputs that consumers of groups get in forward passes.

    Tokens without influence on the loss (padding, all but the class token in a last layer) do not count. Forward passes
    without gradients are ignored. Passes with gradients show which tokens matter; the inputs themselves are recorded
    when the model runs again, in evaluation mode.

    Args:
        at_once: record inputs in the pass itself, for a model in evaluation mode; there must be memory for all of them.
        alone: there is only one step or batch: half of its samples go to each part. Otherwise whole batches do.

    Attributes:
        sizes: group name -> sum of the log squares of the consumer's outputs over the first tokens, and their number,
            [2]: tokens with larger outputs than usual count for less.
        step: number of the step, or batch, of the next passes.
    """

    def __init__(self, *, at_once: bool = False, alone: bool = False) -> None:
        self.sizes: dict[str, Tensor] = {}
        self.step = 0
        self._at_once, self._alone = at_once, alone
        self._seen: dict[str, ConsumerInputs] = {}
        self._hooks: dict[str, RemovableHandle] = {}
        self._root: list[RemovableHandle] = []
        self._unhook: Callable[[], Any] = lambda: None
        self._as_written: AsWritten | None = None
        self._leave: Callable[[], Any] = lambda: None
        self._touched = False  # whether any hook was called since the last step
        self._passed_by: bool | None = None  # whether code that was compiled elsewhere runs the model past its hooks
        self._passes: list[Pass] = []
        self._reused: bool | None = None  # whether the training loop writes to what it gave in an earlier step
        self._given: Pass | None = None  # the first one, with the loop's own tensors, until that is known
        self._overwritten = 0
        self._running = self._ignoring = False
        self._widths: dict[str, int] = {}
        self._unhooked: dict[str, list[tuple[Pass, str, int]]] = {}  # calls that a checkpoint made without gradients

    def observe(
        self, model: nn.Module, groups: Iterable[Group], wrapper: nn.Module | None = None, *, announced: bool = False
    ) -> None:
        """Observe the inputs of the consumers of `groups`, and of no others, in the forward passes from now on.

        Meanwhile the model runs eagerly, even if it or a part of it is compiled. Other compiled code runs eagerly in
        the first step, and later only if it runs the model.

        Args:
            model: the model.
            groups: their consumers are observed.
            wrapper: the module that is called in place of the model, if any.
            announced: the caller announces passes by `expect` and `end`; the model gets no hooks.
        """
        wanted = {group.name: layers[0] for group in groups if (layers := consumers(model, group))}
        if set(wanted) == set(self._hooks):
            return
        self.release()
        self._hooks = {name: layer.register_forward_hook(LayerHook(self, name)) for name, layer in wanted.items()}
        self._widths = {name: layer.in_features for name, layer in wanted.items()}
        if self._hooks:
            if not announced:
                self._root = [
                    model.register_forward_pre_hook(BeginHook(self), with_kwargs=True),
                    model.register_forward_hook(EndHook(self)),
                ]
            self._unhook = weakref.finalize(self, remove_all, [*self._hooks.values(), *self._root])
            wrappers, any_function = all_compiled()
            self._as_written = AsWritten(model if wrapper is None else wrapper, wrappers)
            self._touched = False
            if self._passed_by is None and not any_function:
                self._passed_by = False
            if self._passed_by is not False:  # in the first step, unless nothing was compiled that could run it
                self._run_eagerly()

    def _run_eagerly(self) -> None:
        uncompiled.enter()
        self._leave = weakref.finalize(self, uncompiled.leave)

    def advance(self, step: int) -> None:
        """Set the step of the next passes."""
        if step != self.step and self._hooks and self._passed_by is None:
            self._passed_by = False  # it was run by none of the functions that were compiled
            self._leave()
        elif step != self.step and self._hooks and not self._touched and not self._passed_by:
            self._passed_by = True  # by a wrapper, or a function, unknown to us
            self._run_eagerly()
        self.step, self._touched = step, False

    @property
    def advice(self) -> str:
        """What to do if there were too few tokens for a correction."""
        if self._overwritten:
            return (
                f"{self._overwritten} of the batches that were to be run again were overwritten: give "
                "each step tensors of its own."
            )
        return "Search over more steps, or with larger batches."

    @property
    def observing(self) -> bool:
        """Whether anything is observed."""
        return bool(self._hooks)

    def release(self) -> None:
        """Stop observing, and remove all hooks from the model."""
        self._unhook()
        self._hooks.clear()
        self._root.clear()
        self.forget()
        if self._as_written is not None:
            self._as_written.end()
            self._as_written = None
        self._leave()

    def forget(self, step: int | None = None) -> None:
        """Drop the recorded passes, all of them or those of one step."""
        self._passes = [each for each in self._passes if step is not None and each.step != step]
        self._unhooked.clear()
        self._running = False

    @contextmanager
    def ignoring(self) -> Iterator[None]:
        """Ignore all passes within the block, of the model and of copies of it."""
        self._ignoring = True
        try:
            yield
        finally:
            self._ignoring = False

    def begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Record the inputs of a pass, if it has gradients."""
        self._running = torch.is_grad_enabled() and not is_transformed() and not self._ignoring
        if self._running:
            self.expect(model, *args, **kwargs)

    def expect(self, model: nn.Module, *args: Any, function: Callable[..., Any] | None = None, **kwargs: Any) -> None:
        """Record the start of a pass, of the model or of a function in its place, and drop passes that are too old.

        Args:
            model: the model.
            args: its arguments.
            function: (model, *args), runs it.
            kwargs: its keyword arguments.
        """
        self._running = True
        if self._root and not many_processes():
            self._trim()
        self._passes.append(self._kept(Pass.of(model, args, kwargs, self.step, function)))

    def _kept(self, found: Pass) -> Pass:
        """Return a pass to keep, with copies of inputs that the loop overwrites."""
        if self._given is not None and self._given.step != self.step:
            self._reused, self._given = not self._given.is_whole, None
        if not self._reused and any(not each.is_whole for each in self._passes):
            self._reused = True
        if self._reused is None and self._given is None:
            self._given = replace(found)
        if self._reused is not False:
            found.own()
        return found

    def end(self, model: nn.Module | None = None) -> None:
        """Record the end of a pass, and the samples that the model drew, if it reports them."""
        if self._running and model is not None:
            last = self._passes[-1]
            last.args, last.kwargs = repeated(model, last.args, last.kwargs)
            last.note_versions()
        self._running = False

    def _trim(self, many: bool = False) -> None:
        """Drop steps that are too old, or made redundant by at least two later ones.

        Args:
            many: sum the tokens over all processes, which must call this together.
        """
        self._passes = [each for each in self._passes if each.step > self.step - OBSERVATIONS]
        steps = sorted({each.step for each in self._passes})
        tokens = torch.zeros(len(steps), len(self._widths), dtype=torch.long)
        for each in self._passes:
            tokens[steps.index(each.step)] += torch.tensor([each.tokens(name) for name in self._widths])
        if many:
            device = self._passes[0].home if self._passes else torch.device("cpu")
            together = tokens.to(device)
            torch.distributed.all_reduce(together)
            tokens = together.cpu()
        needed = _ENOUGH * torch.tensor(list(self._widths.values()))
        seen = tokens.sum(0) > 0
        for place in range(len(steps) - PARTS):
            if bool((tokens[place + 1 :].sum(0) >= needed)[seen].all()):
                self._passes = [each for each in self._passes if each.step > steps[place]]

    def see(self, name: str, inputs: Tensor, output: Tensor) -> None:
        """Record one call of a consumer."""
        if not self._touched and self._passed_by is None and in_compiled_function():
            self._passed_by = True
        self._touched = True
        if self._at_once:
            if output.requires_grad:
                self._see_now(name, inputs, output)
        elif self._running:
            calls = self._passes[-1].calls.setdefault(name, [])
            calls.append(None)
            if output.requires_grad:
                output.register_hook(noting(self._passes[-1], name, len(calls) - 1, squares_of(output)))
            else:
                self._unhooked.setdefault(name, []).append((self._passes[-1], name, len(calls) - 1))
        elif output.requires_grad and self._unhooked.get(name):  # a checkpoint computes it again, the last call first
            output.register_hook(noting(*self._unhooked[name].pop(), squares_of(output)))

    def portions(
        self, model: nn.Module, groups: list[Group], correct: Correct
    ) -> Iterator[tuple[list[Group], dict[str, ConsumerInputs]]]:
        """Yield the inputs of consumers, for as many groups at a time as the memory limit allows.

        The last groups come first, since correcting them does not change the inputs of earlier ones.

        Args:
            model: the observed model.
            groups: the requested groups, in forward order.
            correct: see `allowed_bytes`.

        Raises:
            StepError: the model rejects in evaluation mode inputs that it accepted in training.
        """
        if self._at_once:
            yield groups[::-1], self._seen
            return
        if self._root:
            self._trim(many_processes())
        self._agree(model)
        device, allowed = device_of(model), allowed_bytes(model, correct)
        sizes = {group.name: self._bytes(model, group) for group in groups}
        # On other devices one layer is seen at a time, and the rest waits on the CPU.
        home = torch.device("cpu") if device.type not in ("cpu", "meta") and sum(sizes.values()) > allowed else None
        portion: list[Group] = []
        for group in groups[::-1]:
            if portion and home is None and sum(sizes[each.name] for each in (*portion, group)) > allowed:
                yield portion, self._observed_inputs(model, portion, home)
                portion = []
            portion.append(group)
        if portion:
            yield portion, self._observed_inputs(model, portion, home)

    def _bytes(self, model: nn.Module, group: Group) -> int:
        """Return the bytes held for a group."""
        weight = consumers(model, group)[0].weight
        most = moments_bytes(weight.shape[1], accumulator(weight))
        if many_processes():  # all of them see the same portions, however many tokens each has
            return most
        tokens = sum(each.tokens(group.name) for each in self._passes)
        return min(most, tokens * weight.shape[1] * weight.itemsize)

    @torch.no_grad()
    def _observed_inputs(
        self, model: nn.Module, groups: list[Group], home: torch.device | None
    ) -> dict[str, ConsumerInputs]:
        """Repeat the passes in evaluation mode, and return the inputs of the consumers; buffers are restored."""
        found: dict[str, ConsumerInputs] = {}
        held = [each for each in self._passes if each.is_whole]
        self._overwritten += len(self._passes) - len(held)
        steps = sorted({each.step for each in held})
        now: list[tuple[Pass, dict[str, int]]] = []

        def see(name: str, inputs: Tensor, output: Tensor) -> None:
            each, counts = now[-1]
            number = counts[name] = counts.get(name, -1) + 1
            calls = each.calls.get(name, [])
            matter = calls[number] if number < len(calls) else None
            if matter is None or matter.numel() != inputs.numel() // inputs.shape[-1]:
                return
            if name not in found:
                found[name] = ConsumerInputs(inputs.shape[-1], accumulator(inputs), home)
            part = None if self._alone else steps.index(each.step) % PARTS
            self._add(found[name], name, inputs, matter.to(inputs.device), squares_of(output), part)

        hooks = [
            layer.register_forward_hook(lambda _, args, output, name=group.name: see(name, args[0], output))
            for group in groups
            for layer in consumers(model, group)[:1]
        ]
        # torch's own encoder has kernels for evaluation that pass by its layers, and by whoever looks at them.
        fast = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            with buffers_kept(model) if held else nullcontext():
                for each in held:
                    now.append((each, {}))
                    with evaluating(model), random_numbers_kept(device_of(model)):
                        each.run(model)
        except Exception as error:
            raise StepError(
                f"The correction runs {type(model).__name__} in evaluation mode, where its forward pass failed on "
                f"the arguments from training ({type(error).__name__}: {error}). Set "
                "Pruner(correct=False)."
            ) from error
        finally:
            for hook in hooks:
                hook.remove()
            torch.backends.mha.set_fastpath_enabled(fast)
            if held:
                reshard(model)
        return found

    def _agree(self, model: nn.Module) -> None:
        """Fix the usual size of outputs, from the first tokens of all processes."""
        if self.sizes:
            return
        nothing = torch.zeros(2, dtype=torch.float64, device="cpu")
        first = [each.logs for each in self._passes if each.step == self._passes[0].step]
        logs = [[each[name].to(nothing) for each in first if name in each] for name in self._hooks]
        sums = torch.stack([sum(each, nothing) for each in logs])
        if many_processes():
            device = device_of(model)
            sums = sums.to(device, torch.float32 if device.type == "mps" else None)
            torch.distributed.all_reduce(sums)
        self.sizes = {name: row for name, row in zip(self._hooks, sums.cpu(), strict=True) if row[1] > 0}

    def _add(
        self, found: ConsumerInputs, name: str, inputs: Tensor, counts: Tensor, squares: Tensor, part: int | None
    ) -> None:
        """Add inputs of a consumer.

        Args:
            found: the inputs collected so far.
            name: of the group.
            inputs: [..., n].
            counts: which rows matter, bool, [rows].
            squares: sum of squares of the consumer's outputs, [rows].
            part: index of the part; None splits the samples into halves.
        """
        if name not in self.sizes:
            self.sizes[name] = logs_of(squares, counts)
        total, number = self.sizes[name].to(inputs.device)
        # Some tokens are thousands of times as large as others and say as little: no token counts more for being large.
        weights = counts * ((total / number.clamp_min(1)).exp() / squares).clamp_max(1).nan_to_num(0.0)
        rows = inputs.detach().flatten(0, -2)
        apart = -(-len(rows) // _TOKENS)
        first = -(-len(inputs) // PARTS) * (len(rows) // len(inputs))  # rows of the first samples
        ends = [(0, first, 0), (first, len(rows), 1)] if part is None else [(0, len(rows), part)]
        for begin, end, which in ends:
            if begin < end:
                found.add(rows[begin:end:apart], weights[begin:end:apart], which)

    def _see_now(self, name: str, inputs: Tensor, output: Tensor) -> None:
        # Saved as autograd saves tensors, so that checkpointing keeps none of them, and offloading works.
        held = _Held.apply(inputs.detach(), torch.empty((), requires_grad=True))
        squares, part = squares_of(output), None if self._alone else self.step % PARTS

        def look(gradient: Tensor) -> None:
            (saved,) = held.grad_fn.saved_tensors
            if name not in self._seen:
                self._seen[name] = ConsumerInputs(saved.shape[-1], accumulator(saved))
            self._add(self._seen[name], name, saved, (gradient != 0).any(-1).flatten(), squares, part)

        output.register_hook(look)

    def state(self) -> dict[str, Any]:
        """Return the recorded passes as plain tensors, numbers and containers.

        Passes with other arguments are left out.
        """
        found = [state for each in self._passes if (state := each.state()) is not None]
        return {"passes": found, "sizes": {name: value.clone() for name, value in self.sizes.items()}}

    def resume(self, state: Mapping[str, Any]) -> None:
        """Restore a state."""
        self.sizes = {name: value.clone() for name, value in state["sizes"].items()}
        self._passes = [Pass.from_state(each) for each in state["passes"]]


class _Held(torch.autograd.Function):
    """Saves a tensor for backward, without computing anything."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, anchor: Tensor) -> Tensor:
        ctx.save_for_backward(value)
        return anchor.clone()
