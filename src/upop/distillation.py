"""Distillation: the dense model is the teacher of the model that is searched or retrained.

The loss compares the outputs of norms on the residual stream, layer by layer, for any model and task. Where the stream
itself was pruned, only its kept channels are compared.
"""

from __future__ import annotations

import inspect
import warnings
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from upop.pruning.again import autocast, precision_now, random_numbers_kept, repeated
from upop.pruning.carried import plan_of
from upop.pruning.choice import check_whole
from upop.pruning.errors import LayoutError, SettingError, StepError, some_of
from upop.pruning.groups import tensor_of
from upop.pruning.known import know_as
from upop.pruning.logits import divergence, logits_of, similarities
from upop.pruning.masks import unwrapped
from upop.pruning.merged import Unmerge, unmerge_of
from upop.pruning.norms import kept_by
from upop.pruning.precision import precise
from upop.pruning.prunable import find_groups
from upop.pruning.scores import is_checkpointed_whole
from upop.pruning.sharded import reshard
from upop.pruning.slips import check_model
from upop.pruning.width import blocks_among

_FLOOR = 1e-6
"""Smallest mean square to divide a difference by."""
_HIGHEST = 1e4
"""A first loss that no trained teacher gives; even unrelated features differ by only a few times their mean square."""


def distill(
    model: nn.Module,
    teacher: nn.Module,
    *,
    features: float = 5.0,
    logits: float = 0.0,
    temperature: float = 2.0,
    layers: int = 1,
) -> Distillation:
    """Run `teacher` on every training batch of `model`, and return the distance between the two as a loss.

        teacher = copy.deepcopy(model)                   # the dense model, before the Pruner
        distill = upop.distill(model, teacher)
        loss = task_loss(model(x), y) + distill.loss()   # in the search and in the training after it

    It helps most when training is short and data are scarce. It costs one forward pass of the dense model per step,
    about half of a step's time, and memory for its weights and the outputs of its norms until the backward pass (two of
    [batch, tokens, hidden] per transformer layer; fewer with `layers`), but none for gradients or optimizer state. The
    teacher is converted to the model's precision if its own is wider.

    The loss compares the outputs of all norms on the residual stream that the task loss depends on: their mean squared
    difference per sample, as a share of the teacher's mean square; a token that the model merged counts at each of its
    positions. The teacher runs after each forward pass of `model` in training mode with gradients, on the same
    arguments and under the same autocast, in evaluation mode; evaluation costs nothing, and random generators are not
    advanced. Tokens that an argument named `...mask` excludes (integers or bool, [batch, tokens], the only one of that
    shape) do not count; other padding does.

    Norms inside of reentrant gradient checkpoints (`use_reentrant=True`) cannot be compared; a warning names them.

    Args:
        model: a timm, transformers or upop model, before, during or after the search; wrappers of DDP and
            torch.compile are unwrapped (compile it after this). It works across `shrink`; a copy of the model, as by
            `upop.full_copy`, needs a `distill` of its own. The model must be called as a module (`model(...)`); other
            methods, and DataParallel's copies, are not observed.
        teacher: the dense model, of the same architecture, with its own weights. It is frozen, put into evaluation
            mode, and moved to the model's device; it is not part of the model, its parameters or its files.
        features: weight of the mean difference of the norms' outputs.
        logits: weight of the Kullback-Leibler divergence of the model's logits from the teacher's, times the squared
            temperature. The model returns them as a tensor, or as `.logits`; classes lie along the last axis, or along
            axis 1 of maps [batch, classes, H, W].
        temperature: divisor of the logits.
        layers: compare only every so many-th norm, including the last; 1 compares all.

    Raises:
        SettingError: a setting is out of range, or the teacher shares weights with the model.
        LayoutError: the teacher is of another architecture, or has no norms on its residual stream.
    """
    check_model(model, "distill()")
    check_model(teacher, "distill(), for its teacher,")
    check_whole("layers", layers)
    return Distillation(model, teacher, features=features, logits=logits, temperature=temperature, layers=layers)


class Distillation:
    """The result of `distill`; holds the teacher and the hooks on the model.

    Attributes:
        teacher: the dense model.
        norms: names of the modules whose outputs are compared.
    """

    def __init__(
        self, model: nn.Module, teacher: nn.Module, *, features: float, logits: float, temperature: float, layers: int
    ) -> None:
        if not (features >= 0 and logits >= 0 and features + logits > 0):
            raise SettingError(
                f"features and logits must be weights of at least 0, and not both 0; found {features!r} and "
                f"{logits!r}. Leave them out for features alone."
            )
        if not temperature > 0:
            raise SettingError(f"temperature must be above 0; found {temperature!r}.")
        self._model, self.teacher = unwrapped(model), unwrapped(teacher)
        _refuse_shared_weights(self._model, self.teacher)
        know_as(self.teacher, self._model)
        self._features, self._logits, self._temperature = features, logits, temperature
        self.norms: tuple[str, ...] = tuple(_residual_norms(self.teacher))[::-1][::layers][::-1]
        _refuse_other_architecture(self._model, self.teacher, self.norms)
        self.teacher.eval().requires_grad_(False)
        self._running = self._teaching = False
        self._precision: tuple[str, torch.dtype] | None = None  # device and dtype of the model's autocast
        # By norm: the model's outputs in one forward pass, each with the function that restores merged tokens.
        self._seen: dict[str, list[tuple[Tensor, Unmerge | None] | None]] = {}
        self._found: dict[str, list[Tensor | None]] = {}  # by norm: their distance from the teacher's
        self._cut: dict[str, Tensor] | None = None  # by norm: the channels that a cut model keeps of the stream
        self._masks: list[Tensor] = []  # arguments of the forward pass that may mask padding
        self._pending: dict[int, Tensor] = {}  # losses of forward passes since the last loss()
        self._passes = 0
        self._described: str | None = None  # the reason if the last forward pass had nothing to compare
        self._handles = [
            self._model.register_forward_pre_hook(_Hook(self, "_begin"), with_kwargs=True),
            # Before other hooks, which may add this loss to the model's.
            self._model.register_forward_hook(_Hook(self, "_teach"), with_kwargs=True, prepend=True),
        ]
        for name in self.norms:
            for owner, method in ((self._model, "_see"), (self.teacher, "_compare")):
                hook = _Hook(self, method, name)
                self._handles.append(owner.get_submodule(name).register_forward_hook(hook))

    def begin(self) -> None:
        """Observe the current forward pass, if a hook that ran before it created this object."""
        self._begin(self._model, (), {})

    def loss(self) -> Tensor:
        """Return the distance from the teacher, a scalar: the mean over the forward passes since the last call.

        Call it after the forward pass (or all of them, if the loss needs several) and before `backward()`. A forward
        pass whose backward pass has already run does not count.

        Raises:
            StepError: no forward pass ran in training mode with gradients, or none of its features can be compared.
        """
        if not self._handles:
            raise StepError("The teacher was removed by remove(); call upop.distill again.")
        if not self._pending:
            raise StepError(
                self._described
                or "loss() found no forward pass of the model in training mode with gradients since the last call. "
                "Call model.train() and model(...) first, and loss() before backward(), once per step."
            )
        passes = list(self._pending.values())
        self._pending.clear()
        return torch.stack(passes).mean()

    def remove(self) -> None:
        """Remove all hooks from the model and the teacher."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._pending.clear()
        self._forget()

    # In a compiled model, `_see` is traced with it, and the rest is not. torch.compiler.disable would import the
    # compiler, which takes seconds, when this class is defined.
    @_disable_dynamo
    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        del args, kwargs
        if module is self._model:
            self._forget()
            self._running = module.training and torch.is_grad_enabled()

    def _see(self, name: str, output: Any) -> None:
        """Keep the output of a norm of the model, if the loss can depend on it."""
        # Recomputation in the backward pass is outside of the forward pass, and is not observed.
        if not self._running or not isinstance(output, Tensor):
            return
        seen = (output, unmerge_of(output)) if output.requires_grad else None
        self._seen.setdefault(name, []).append(seen)
        self._precision = precision_now(output.device.type) or self._precision

    @_disable_dynamo
    def _teach(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Run the teacher on the inputs of the model, and keep the loss of this pass."""
        if module is not self._model or not self._running:
            return
        self._running = False
        device = next(module.parameters()).device
        if next(self.teacher.parameters()).device != device:
            self.teacher.to(device)
        if not self._passes:
            _narrow(self.teacher, self._model)
        args, kwargs = repeated(self._model, args, kwargs, self.teacher)
        self._masks = [value for key, value in _named(self.teacher, args, kwargs) if _may_mask(key, value)]
        self._teaching = True
        try:
            with torch.no_grad(), random_numbers_kept(device), autocast(device, self._precision):
                taught = self.teacher(*args, **kwargs)
            self._keep(output, taught)
        finally:
            self._forget()
            reshard(self.teacher)  # without a backward pass, FSDP keeps its outermost weights gathered

    def _compare(self, name: str, output: Any) -> None:
        """Compare the output of a teacher's norm with that of the model's norm in the same call."""
        if not self._teaching or not self._features or not isinstance(output, Tensor):
            return
        calls, seen = self._found.setdefault(name, []), self._seen.get(name, [])
        found = seen[len(calls)] if len(calls) < len(seen) else None
        kept = self._kept(name)
        if found is not None and kept is not None:  # only kept channels of the stream are compared
            kept = kept.to(output.device)
            with torch.enable_grad():
                narrow = found[0] if found[0].shape[-1] == len(kept) else found[0].index_select(-1, kept)
            found, output = (narrow, found[1]), output.index_select(-1, kept)
        with torch.enable_grad():
            own = None if found is None else _like(output, *found)
            if own is None:
                calls.append(None)
                return
            calls.append(feature_loss(own, output.detach(), self._mask(own.shape[:-1])))

    def _keep(self, output: Any, taught: Any) -> None:
        # If a norm was called a different number of times, its calls cannot be paired.
        same = [name for name, calls in self._found.items() if len(calls) == len(self._seen.get(name, []))]
        terms = [term for name in same for term in self._found[name] if term is not None]
        parts = []
        self._described = None
        if self._features and terms:
            parts.append(self._features * torch.stack(terms).mean())
        elif self._features:
            self._described = (
                "The teacher has nothing to compare: no norm on the residual stream has outputs of the same shape in "
                "both models, with gradients. Is any weight trained, and is the teacher of the same architecture? "
                "Otherwise compare logits alone (features=0, logits=1)."
            )
        if self._logits:
            own, aim = logits_of(output), logits_of(taught)
            if own is None or aim is None or own.shape != aim.shape or not own.requires_grad:
                self._described = (
                    f"logits={self._logits:g} needs logits with gradients, as the teacher's, and "
                    f"{type(self._model).__name__} returns {type(output).__name__}. Use logits=0."
                )
            else:
                mask = None if similarities(output) is not None else self._mask(own.shape[:-1])
                parts.append(self._logits * divergence(own, aim.detach(), self._temperature, mask))
        if self._described or not parts:
            return
        if not self._passes:
            self._warn_of_hidden(output)
        loss = torch.stack(parts).sum()
        if not self._passes and not loss.is_meta:
            self._refuse_exploding(float(loss.detach()))  # once, since it waits for the device
        self._passes += 1
        number = self._passes
        # A weak reference, since the loss holds the graph that holds the hook.
        held = weakref.ref(self)
        anchor = next(value for value in self._anchors(output) if value.requires_grad)
        anchor.register_hook(lambda _: _drop(held(), number))
        self._pending[number] = loss

    def _refuse_exploding(self, loss: float) -> None:
        """Raise a `StepError` if the first loss shows that the teacher is unusable."""
        if loss < _HIGHEST:  # it is neither that high nor NaN
            return
        terms = {
            name: [float(term.detach()) for term in calls if term is not None] for name, calls in self._found.items()
        }
        bad = [name for name, values in terms.items() if not all(value < _HIGHEST for value in values)]
        where = f" at {some_of(bad, 3)}" if bad else ""
        raise StepError(
            f"The first distance from the teacher, {type(self.teacher).__name__}, is {loss:.3g}{where}: its features "
            "are not finite, or so close to 0 that any relative difference is large. Does it have trained weights? "
            "Load them, or leave the teacher out."
        )

    def _warn_of_hidden(self, output: Any) -> None:
        """Warn of norms inside of reentrant gradient checkpoints."""
        hidden = [name for name, calls in self._seen.items() if None in calls]
        if hidden and is_checkpointed_whole(next(self._anchors(output))):
            warnings.warn(
                f"The teacher cannot compare {len(hidden)} of {len(self.norms)} norms ({some_of(hidden, 2)}): gradient "
                "checkpointing with use_reentrant=True runs them without gradients. Use use_reentrant=False "
                '(in a Trainer: gradient_checkpointing_kwargs={"use_reentrant": False}).',
                stacklevel=2,
            )

    def _anchors(self, output: Any) -> Iterator[Tensor]:
        """Yield tensors in the graph of the model's backward pass."""
        for calls in self._seen.values():
            yield from (value[0] for value in calls if value is not None)
        if (logits := logits_of(output)) is not None:
            yield logits

    def _kept(self, name: str) -> Tensor | None:
        """Return the teacher's channels that a norm on a pruned stream keeps; None if the stream is whole."""
        masked = kept_by(self._model.get_submodule(name))
        if masked is not None:
            return masked
        if self._cut is None:  # once in a pass: it walks all modules
            self._cut = _kept_of_cut(self._model)
        return self._cut.get(name)

    def _mask(self, shape: torch.Size) -> Tensor | None:
        """Return the mask of tokens that count in features or logits [batch, tokens, ...]; None if unknown."""
        found = [mask for mask in self._masks if mask.shape == shape]
        return found[0] != 0 if len(found) == 1 else None

    def _forget(self) -> None:
        """Clear the state of the forward pass."""
        self._running = self._teaching = False
        self._seen, self._found, self._masks, self._precision = {}, {}, [], None
        self._cut = None


class _Hook:
    """A hook that calls a method of its `Distillation`; a copied or unpickled hook does nothing."""

    def __init__(self, distillation: Distillation | None = None, method: str = "", name: str | None = None) -> None:
        self._distillation, self._method, self._name = distillation, method, name

    def __call__(self, module: nn.Module, *given: Any) -> None:
        if self._distillation is None:
            return
        method = getattr(self._distillation, self._method)
        if self._name is None:
            method(module, *given)
        else:
            method(self._name, given[-1])

    def __deepcopy__(self, memo: dict[int, Any]) -> _Hook:
        return _Hook()

    def __reduce__(self) -> tuple[type[_Hook], tuple[()]]:
        return _Hook, ()


def _drop(distillation: Distillation | None, number: int) -> None:
    if distillation is not None:
        distillation._pending.pop(number, None)


def _narrow(teacher: nn.Module, model: nn.Module) -> None:
    """Convert teacher weights of a wider precision to the precision of the model."""
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, tensor in (*teacher.named_parameters(), *teacher.named_buffers()):
        like = own.get(name)
        if like is not None and tensor.is_floating_point() and tensor.itemsize > like.itemsize:
            tensor.data = tensor.data.to(like.dtype)


def _residual_norms(teacher: nn.Module) -> Iterator[str]:
    """Yield the names of norms whose width is that of the residual stream.

    Raises:
        LayoutError: there is no such norm.
    """
    parts = (part for group in blocks_among(find_groups(teacher)) for part in group.slices)
    shapes = ((tensor_of(teacher, part.tensor).shape, part.dim) for part in parts)
    widths = {shape[1 - dim] for shape, dim in shapes if len(shape) == 2}
    none = True
    for name, module in teacher.named_modules():
        if _norm_width(module) in widths:
            none = False
            yield name
    if none:
        raise LayoutError(
            f"{type(teacher).__name__} has no norms on its residual stream whose outputs could be compared. Leave the "
            "teacher out (in a run: --set distill=0)."
        )


def _norm_width(module: nn.Module) -> int | None:
    """Return the width of a layer norm or RMS norm of any library."""
    if any(True for _ in module.children()) or "norm" not in type(module).__name__.lower():
        return None
    if isinstance(module, nn.modules.batchnorm._NormBase | nn.GroupNorm):
        return None
    shape = getattr(module, "normalized_shape", None)
    if shape is None:
        weight = getattr(module, "weight", None)
        shape = weight.shape if isinstance(weight, Tensor) else ()
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    return int(shape[0]) if len(shape) == 1 else None


def _kept_of_cut(model: nn.Module) -> dict[str, Tensor]:
    """Return, by norm, the channels of the dense model's stream that a cut model keeps, int64."""
    plan = plan_of(model)
    found: dict[str, Tensor] = {}
    if plan is None:
        return found
    for name, content in plan.slices.items():
        if len(plan[name]) < plan.sizes[name]:
            found.update(dict.fromkeys(content.get("norms", ()), torch.tensor(plan[name], dtype=torch.long)))
    return found


def _refuse_shared_weights(model: nn.Module, teacher: nn.Module) -> None:
    own = {id(parameter) for parameter in model.parameters()}
    if any(id(parameter) in own for parameter in teacher.parameters()):
        raise SettingError(
            "The teacher shares weights with the model, so it would change with it. Give a copy that is made before "
            "the model is pruned: teacher = copy.deepcopy(model)."
        )


def _refuse_other_architecture(model: nn.Module, teacher: nn.Module, norms: tuple[str, ...]) -> None:
    widths = {name: _norm_width(module) for name, module in model.named_modules()}
    for name, kept in _kept_of_cut(model).items():
        if widths.get(name) == len(kept):
            widths[name] = _norm_width(teacher.get_submodule(name))
    other = [name for name in norms if widths.get(name) != _norm_width(teacher.get_submodule(name))]
    if other:
        raise LayoutError(
            f"The teacher, {type(teacher).__name__}, is of another architecture than the model, "
            f"{type(model).__name__}, which has no norm of the same name and width as {some_of(other)}. Give the dense "
            "model that this one was cut from."
        )


def _like(aim: Tensor, own: Tensor, unmerge: Unmerge | None) -> Tensor | None:
    """Return an output of the model in the shape of the teacher's, with merged tokens restored; None if impossible."""
    if own.shape != aim.shape and unmerge is not None and own.dim() == 3:
        own = unmerge(own)
    return own if own.shape == aim.shape else None


def feature_loss(own: Tensor, aim: Tensor, mask: Tensor | None) -> Tensor:
    """Return the mean over samples of the mean square of `own - aim` as a share of that of `aim`.

    It is computed per sample, so that it does not depend on how a batch is split over steps or processes.

    Args:
        own: features of the model, [batch, ..., hidden], with gradients.
        aim: features of the teacher, of the same shape.
        mask: which tokens count, [batch, ...]; None counts all.
    """
    size = precise(aim).square()
    weight = None if mask is None else mask.unsqueeze(-1)
    count: Tensor | int = aim[0].numel()
    if weight is not None:
        # Multiplied by the mask, since indexing would synchronise with the device.
        size = size * weight
        count = (weight.flatten(1).sum(1) * aim.shape[-1]).clamp_min(1)
    apart: Tensor = _SquaresApart.apply(own, aim, weight)
    return (apart / count / (size.flatten(1).sum(1) / count).clamp_min(_FLOOR)).mean()


class _SquaresApart(torch.autograd.Function):
    """Sum of squares of `own - aim` per sample, [batch]; saves the inputs, not their difference in float32."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, aim: Tensor, weight: Tensor | None) -> Tensor:
        ctx.save_for_backward(own, aim, weight)
        squares = (precise(own) - precise(aim)).square()
        return (squares if weight is None else squares * weight).flatten(1).sum(1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        own, aim, weight = ctx.saved_tensors
        apart = (precise(own) - precise(aim)) * (2 * grad).view(-1, *[1] * (own.dim() - 1))
        return (apart if weight is None else apart * weight).to(own.dtype), None, None


def _named(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the named arguments of a forward pass."""
    yield from kwargs.items()
    if args:
        yield from zip(inspect.signature(model.forward).parameters, args, strict=False)


def _may_mask(name: str, value: Any) -> bool:
    """Return whether an argument says which tokens are padding."""
    return name.endswith("mask") and isinstance(value, Tensor) and value.dim() == 2 and not value.is_floating_point()
