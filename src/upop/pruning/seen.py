"""Keeps a few inputs of a model's first batch, for tracing groups and verifying cuts."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.hooks import RemovableHandle

from upop.pruning.again import is_transformed, uncompiled
from upop.pruning.costs import Arguments
from upop.pruning.errors import LayoutError

Found = TypeVar("Found")

_FEW = 2
"""Samples of a batch that are kept."""
_MOST_BYTES = 2**24
"""Of a whole batch that is kept beside its first samples, for models that do not take a part of one."""

_PLAIN = (Tensor, nn.Parameter, nn.Buffer)


class Kept:
    """Copies of inputs: the first samples of a batch, and the whole batch if it is small.

    Args:
        model: the model.
        inputs: as `call` takes them.
    """

    def __init__(self, model: nn.Module, inputs: Any) -> None:
        self._home = _device_of(model)
        inputs = dict(inputs) if isinstance(inputs, Mapping) else inputs
        held = [_first_samples(inputs)]
        size = sum(each.nbytes for each in tree_leaves(inputs) if isinstance(each, Tensor))
        if held[0] is not inputs and size <= _MOST_BYTES:
            held.append(inputs)
        self._held = tree_map(lambda each: each.detach().clone() if isinstance(each, Tensor) else each, held)

    def inputs(self, model: nn.Module) -> Iterator[Any]:
        """Yield inputs on the device and in the precision of the model, smallest first."""
        for each in self._held:
            yield fitted(each, model, self._home)


def fitted(inputs: Any, model: nn.Module, home: torch.device | None = None) -> Any:
    """Convert inputs to the precision of a model's weights; tensors on `home` move to the device of the model."""
    dtypes = {each.dtype for each in model.parameters() if each.is_floating_point()}

    def fit(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        value = value.to(_device_of(model)) if value.device == home else value
        return value.to(*dtypes) if value.is_floating_point() and len(dtypes) == 1 else value

    return tree_map(fit, inputs)


def _device_of(model: nn.Module) -> torch.device:
    return next((each.device for each in model.parameters()), torch.device("cpu"))


def _first_samples(inputs: Any) -> Any:
    """Return the first samples of a batch; its size is the first dimension of its first tensor."""
    tensors = [each for each in tree_leaves(inputs) if isinstance(each, Tensor) and each.dim()]
    size = len(tensors[0]) if tensors else 0
    if size <= _FEW:
        return inputs

    def is_sentences(value: Any) -> bool:
        return isinstance(value, list) and len(value) == size and all(isinstance(each, str) for each in value)

    def few(value: Any) -> Any:
        batched = is_sentences(value) or (isinstance(value, Tensor) and value.dim() and len(value) == size)
        return value[:_FEW] if batched else value

    return tree_map(few, inputs, is_leaf=is_sentences)


class FirstCall:
    """Keeps a small part of the inputs of a model's first call, and observes no later call.

    The model does not hold it: nothing is left of one that was let go of.

    Args:
        model: the model.
        then: called before the model runs, with the kept inputs and all arguments. With it, compiled code runs eagerly
            until then; without it, a compiled call is not observed.
        last: called after that, with all arguments, in the precision and modes of the call.
        wrapper: the module that is called in place of the model, if any.
        learning: wait for the first call with gradients.
    """

    def __init__(
        self,
        model: nn.Module,
        then: Callable[[Kept, Arguments], None] | None = None,
        last: Callable[[Arguments], None] | None = None,
        *,
        wrapper: nn.Module | None = None,
        learning: bool = False,
    ) -> None:
        self.kept: Kept | None = None
        self._learning = learning
        self._model, self._then, self._last = weakref.ref(model), then, last
        called = model if wrapper is None else wrapper
        self._hook: RemovableHandle | None = called.register_forward_pre_hook(_FirstCallHook(self), with_kwargs=True)
        weakref.finalize(self, self._hook.remove)
        self._leave: Callable[[], Any] = lambda: None
        if then is not None:
            uncompiled.enter()
            self._leave = weakref.finalize(self, uncompiled.leave)

    def let_compiled(self) -> None:
        """Let compiled code run compiled again."""
        self._leave()

    def release(self) -> None:
        """Observe no longer."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        self._leave()

    def forget(self) -> None:
        """Stop observing, and drop the kept inputs."""
        self.release()
        self.kept = None

    def see(self, arguments: Arguments) -> None:
        """Keep a part of the inputs, if they are real tensors."""
        model = self._model()
        tensors = [each for each in tree_leaves(arguments) if isinstance(each, Tensor)]
        if self._hook is None or model is None or any(type(each) not in _PLAIN or each.is_meta for each in tensors):
            return  # of another tool that looks at the model, with tensors of its own
        if self._learning and not torch.is_grad_enabled():
            return
        self.release()
        # The call may be one without gradients, in lower precision, or be counted.
        kind = _device_of(model).type
        with torch.inference_mode(False), torch.autocast(kind, enabled=False), _disable_current_modes():
            self.kept = Kept(model, arguments if arguments.kwargs else arguments.args)
            remember_inputs(model, self.kept)
            if self._then is not None:
                self._then(self.kept, arguments)
        if self._last is not None:
            self._last(arguments)


class _FirstCallHook:
    """The hook of a `FirstCall`; a copied or unpickled hook does nothing."""

    def __init__(self, first: FirstCall | None = None) -> None:
        self._first = None if first is None else weakref.ref(first)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return type(self)()

    def __reduce__(self) -> tuple[type[Self], tuple[()]]:
        return type(self), ()

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        del module
        if torch.compiler.is_compiling() or is_transformed():
            return
        first = None if self._first is None else self._first()
        if first is not None:
            first.see(Arguments(args, kwargs))


def read_first(inputs: Iterable[Any], read: Callable[[Any], Found]) -> Found:
    """Return the groups read with the first inputs that work.

    Raises:
        LayoutError: no inputs work; the error is that of the first.
    """
    failure: LayoutError | None = None
    for each in inputs:
        try:
            return read(each)
        except LayoutError as error:
            failure = failure or error
    assert failure is not None
    raise failure


_of_models: weakref.WeakKeyDictionary[nn.Module, Kept] = weakref.WeakKeyDictionary()
_of_classes: weakref.WeakKeyDictionary[type[nn.Module], Kept] = weakref.WeakKeyDictionary()
_made_up: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def remember_inputs(model: nn.Module, kept: Kept, *, made_up: bool = False) -> None:
    """Cache the inputs with which a model was called or traced, also for other models of its class.

    Args:
        model: the model.
        kept: the inputs.
        made_up: whether they were generated.
    """
    _of_models[model] = kept
    if made_up:
        _made_up.add(model)
    else:
        _made_up.discard(model)
        _of_classes[type(model)] = kept


def was_made_up(model: nn.Module) -> bool:
    """Whether a model was traced with generated inputs."""
    return model in _made_up


def examples_of(model: nn.Module) -> Iterator[Any]:
    """Yield possible inputs of a model: those of earlier calls, of models of its class, and generated ones."""
    from upop.pruning.axes import example_for

    known = [each for each in (_of_classes.get(type(model)), _of_models.get(model)) if each is not None]
    for each in known if was_made_up(model) else reversed(known):
        yield from each.inputs(model)
    if not was_made_up(model):
        with suppress(LayoutError):
            yield from Kept(model, example_for(model)).inputs(model)
