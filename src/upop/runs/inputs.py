"""Settings that a checkpoint decides: how its images and texts are prepared, unless a flag or a file says so.

What is given beats what the checkpoint says, and that beats the defaults.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from upop.checkpoints.inputs import StatedInputs, stated_inputs
from upop.errors import CheckpointError, DataError
from upop.runs.task import Task
from upop.settings import ImageSettings, RunSettings
from upop.values import problems

_LIKE = frozenset(ImageSettings.recorded)
"""What models of different tasks may have in common."""
_CLOSE = 1e-4  # of statistics, which are written with more and fewer digits

S = TypeVar("S", bound=RunSettings)


def resolved(task: Task[Any], settings: S, path: Path) -> tuple[S, list[str]]:
    """Return the settings with what the checkpoint at `path` decides, and what a person should know of it.

    Raises:
        CheckpointError: there is none, or what it says of its inputs cannot be used.
    """
    stated = stated_inputs(path)
    found = _of_this_task(task, settings, stated)
    given = {name: getattr(settings, name) for name in settings.model_fields_set}
    taken = {name: value for name, value in found.items() if name not in given}
    nested = {name.partition(".")[2]: taken.pop(name) for name in list(taken) if "." in name}
    if nested:
        taken["model"] = {**nested, **settings.model}
    notes = list(stated.notes)
    if stated.tokenizer is not None and "tokenizer" in type(settings).model_fields:
        if "tokenizer" not in given:
            taken["tokenizer"] = str(stated.tokenizer)
        elif not _same_words(task, settings, stated.tokenizer):
            notes.append(f"tokenizer={given['tokenizer']} was given; {path} has another one, which is not used.")
    result = _checked(settings, {**given, **taken}, path)
    whole = _checked(settings, {**given, **{name: value for name, value in found.items() if "." not in name}}, path)
    described = {name: getattr(result, name) for name in taken if name != "model"}
    if news := [
        f"{name}={_shown(value)}" for name, value in described.items() if not _same(value, getattr(settings, name))
    ]:
        notes.append(f"As {path} says: {', '.join(news)}")
    for name in found:
        if name in given and not _same(getattr(whole, name), given[name]):
            resizes = name == "image_size" and _is_like(settings)
            then = "the model's positions are resized" if resizes else "what was given is used"
            notes.append(
                f"{name}={_shown(given[name])} was given, and {path} says {_shown(getattr(whole, name))}: {then}."
            )
    return result, notes


def sample(task: Task[Any], settings: RunSettings) -> dict[str, Any]:
    """Return what a checkpoint keeps of a run's settings: all that an evaluation of it elsewhere needs."""
    values = settings.model_dump(mode="json", include=set(type(settings).recorded))
    return {"task": task.name, **{name: value for name, value in values.items() if value is not None}}


def _of_this_task(task: Task[Any], settings: RunSettings, stated: StatedInputs) -> dict[str, Any]:
    """Return what a checkpoint says by the names of settings; of another task's, what both have in common."""
    kind = type(settings)
    names = set(kind.recorded)
    sizes = dict(kind.of_model)
    if stated.task != task.name:
        images = _LIKE if _is_like(settings) and stated.task != "segmentation" else {"mean", "std"}
        names &= images
        sizes = {name: size for name, size in sizes.items() if name in names}
    found = {name: stated.sizes[size] for name, size in sizes.items() if stated.sizes.get(size) is not None}
    return found | {name: value for name, value in stated.settings.items() if name in names and value is not None}


def _is_like(settings: RunSettings) -> bool:
    """Whether the model sees whole images, whose side it knows by its positions."""
    return isinstance(settings, ImageSettings)


def _checked(settings: S, values: Mapping[str, Any], path: Path) -> S:
    try:
        return type(settings)(**values)
    except ValidationError as error:
        raise CheckpointError(
            f"What {path} says of its inputs cannot be used:\n  "
            + "\n  ".join(problems(error))
            + "\nGive these settings (--set KEY=VALUE, or a config file), or write the checkpoint again."
        ) from error


def _same_words(task: Task[Any], settings: RunSettings, folder: Path) -> bool:
    """Whether the tokenizer that was given and the checkpoint's own know the same words by the same numbers."""
    given = task.tokenizer(settings)
    try:
        own = task.tokenizer(settings.model_copy(update={"tokenizer": str(folder)}))
    except DataError:  # what is not used need not be readable
        return False
    return bool(given.get_vocab() == own.get_vocab())


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, tuple) and isinstance(other, tuple) and len(one) == len(other):
        return all(math.isclose(first, second, abs_tol=_CLOSE) for first, second in zip(one, other, strict=True))
    return bool(one == other)


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(f'{each:.4g}' for each in value)})"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
