"""Checks for common mistakes in a first call; errors state what was given and what to write instead."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from upop.pruning.errors import SettingError, StepError

MOST_BATCHES = 4096
"""Batches that `calibrate` would keep in memory at most."""
_LOSS = "loss=lambda model, batch: F.cross_entropy(model(batch[0]), batch[1])"


def check_model(model: object, what: str) -> None:
    """Raise a `SettingError` unless `model` is a module that can run.

    Args:
        model: the argument.
        what: the function that takes it, such as "Pruner".
    """
    if isinstance(model, nn.Module):
        return
    if isinstance(model, str):
        instead = (
            f"the text {model!r}. Load the model first, with timm.create_model({model!r}, pretrained=True), "
            f"transformers' from_pretrained({model!r}) or upop.load({model!r}), and give that."
        )
    elif isinstance(model, type):
        instead = f"the class {model.__name__}. Give an instance: model = {model.__name__}(...)."
    elif isinstance(model, Mapping):
        instead = (
            f"a {type(model).__name__} of {len(model)} channels. If it is a state_dict, build the model, call its "
            "load_state_dict, and give the model."
        )
    elif isinstance(model, tuple | list) and any(isinstance(part, nn.Module) for part in model):
        place = next(number for number, part in enumerate(model) if isinstance(part, nn.Module))
        instead = f"a {type(model).__name__} of {len(model)}. Its element {place} is a model: give that one."
    else:
        inner = next((name for name in ("model", "module") if isinstance(_held(model, name), nn.Module)), None)
        instead = f"a {type(model).__name__}" + (f". Its .{inner} is a model: give that." if inner else ".")
    raise SettingError(f"{what} takes a model (a torch.nn.Module), and was given {instead}")


def _held(value: object, name: str) -> object:
    try:
        return getattr(value, name, None)
    except Exception:  # a property of a foreign object may do anything
        return None


def listed(batches: object) -> list[Any]:
    """Return batches as a list.

    Raises:
        SettingError: it is no iterable of batches, or it holds none or far too many.
    """
    found = None
    if isinstance(batches, Tensor):
        found = f"a single tensor of shape {tuple(batches.shape)}. Give a list of batches; of one batch: [batch]."
    elif isinstance(batches, Mapping):
        found = f"a single {type(batches).__name__}. Give a list of batches; of one batch: [batch]."
    elif isinstance(batches, str | bytes) or not isinstance(batches, Iterable) or isinstance(batches, nn.Module):
        loadable = hasattr(batches, "__getitem__") and hasattr(batches, "__len__") and not isinstance(batches, str)
        more = "torch.utils.data.DataLoader(dataset, batch_size=32)" if loadable else "a DataLoader, or a list of them"
        found = f"{batches!r:.60} ({type(batches).__name__}). Give {more}."
    if found is not None:
        raise SettingError(f"calibrate() takes an iterable of batches, and was given {found}")
    kept = list(itertools.islice(batches, MOST_BATCHES + 1))  # type: ignore[call-overload]
    if not kept:
        spent = " A generator that was already consumed is empty: create it again." if _is_spent(batches) else ""
        raise SettingError(f"calibrate() needs batches, and there was none. Give 8 to 64.{spent}")
    if len(kept) > MOST_BATCHES:
        raise SettingError(
            f"calibrate() keeps all batches in memory, and there are more than {MOST_BATCHES}. 8 to 64 are enough: "
            "list(itertools.islice(loader, 32))."
        )
    return list(kept)


def _is_spent(batches: object) -> bool:
    return hasattr(batches, "__next__")


def check_loss(loss: object, batches: list[Any]) -> None:
    """Raise a `SettingError` unless `loss` can be called with a model and a batch, or the model alone with one."""
    if loss is None:
        one = batches[0]
        if isinstance(one, tuple | list) and len(one) == 2 and _is_labels(*one):
            raise SettingError(
                f"A batch is two tensors, {tuple(one[0].shape)} and {tuple(one[1].shape)} of whole numbers, which look "
                f"like inputs and labels; without a loss both would be arguments of the model. Give {_LOSS}, or "
                "batches of inputs only."
            )
        return
    if not callable(loss):
        raise SettingError(f"loss is a function of the model and a batch; found {loss!r:.60}. Give {_LOSS}.")
    functional = getattr(loss, "__module__", "") in ("torch.nn.functional", "torch.nn.modules.loss")
    if isinstance(loss, nn.Module) or functional or (isinstance(loss, type) and issubclass(loss, nn.Module)):
        name = getattr(loss, "__name__", type(loss).__name__)
        raise SettingError(
            f"loss is called with the model and a batch; {name} takes outputs and labels. Put it into a function: "
            f"{_LOSS.replace('F.cross_entropy', 'criterion')}."
        )
    try:
        inspect.signature(loss).bind(nn.Identity(), batches[0])
    except TypeError as error:
        raise SettingError(
            f"loss is called with the model and a batch, and {getattr(loss, '__name__', loss)!s:.60} does not take two "
            f"arguments ({error}). Give a function of (model, batch): {_LOSS}."
        ) from error
    except ValueError:  # a function whose arguments are not known
        return


def _is_labels(inputs: object, labels: object) -> bool:
    if not isinstance(inputs, Tensor) or not isinstance(labels, Tensor) or labels.is_floating_point():
        return False
    return inputs.is_floating_point() and inputs.dim() > 1 and labels.shape[:1] == inputs.shape[:1] and labels.dim() < 3


def refuse_inference_mode(what: str) -> None:
    """Raise a `StepError` within `torch.inference_mode`, which has no gradients."""
    if torch.is_inference_mode_enabled():
        raise StepError(f"{what} needs gradients, and torch.inference_mode is on. Call it outside of inference mode.")


def scalar(value: object) -> Tensor:
    """Validate the result of a loss.

    Raises:
        StepError: it is no scalar tensor with a gradient; the message says what it is.
    """
    if isinstance(value, Tensor) and value.numel() == 1 and value.requires_grad:
        return value
    if not isinstance(value, Tensor):
        more = " Return the tensor, not its .item()." if isinstance(value, float | int) else ""
        found = f"{type(value).__name__}{f' ({value!r:.40})' if isinstance(value, float | int | str) else ''}.{more}"
    elif value.numel() != 1:
        found = f"a tensor of shape {tuple(value.shape)}. Return its mean()."
    else:
        found = "a tensor without a gradient. It must not be detached, nor computed under torch.no_grad."
    raise StepError(f"loss(model, batch) must return a scalar tensor with a gradient. It returned {found}")


def tried(run: Callable[[], Any], what: str, batch: Any) -> Any:
    """Return the result of `run`; errors from wrong arguments are explained by the batch.

    Args:
        run: calls a model or a loss.
        what: the callee, in words.
        batch: the arguments.

    Raises:
        StepError: the call failed as calls with wrong arguments do.
    """
    try:
        return run()
    except (TypeError, AttributeError, KeyError, IndexError) as error:
        raise StepError(
            f"{what} failed on a batch, {described(batch)} ({type(error).__name__}: {error}). A mapping is passed as "
            "keyword arguments of the model, a tuple or a list as its arguments, a tensor as its only argument; for "
            f"anything else give a loss that unpacks the batch: {_LOSS}."
        ) from error


def described(batch: object) -> str:
    """Describe a batch in a few words."""
    if isinstance(batch, Tensor):
        return f"a tensor of shape {tuple(batch.shape)}"
    if isinstance(batch, Mapping):
        return f"a mapping of {', '.join(map(str, list(batch)[:8]))}"
    if isinstance(batch, tuple | list):
        return f"a {type(batch).__name__} of {', '.join(described(part) for part in batch[:4])}"
    return f"a {type(batch).__name__}"
