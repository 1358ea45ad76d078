"""Settings that a checkpoint decides: the preparation of its images and texts.

Flags and config files override the checkpoint, and the checkpoint overrides the defaults.
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
"""Settings that models of different tasks share."""
_CLOSE = 1e-4  # tolerance of statistics, which files round to different numbers of digits

S = TypeVar("S", bound=RunSettings)


def resolved(task: Task[Any], settings: S, path: Path) -> tuple[S, list[str]]:
    """Return the settings completed by the checkpoint at `path`, and notes for the user.

    Raises:
        CheckpointError: there is no checkpoint, or its input preparation is not valid.
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
            notes.append(f"tokenizer={given['tokenizer']} was given, and replaces the one of {path}, which differs.")
    result = _checked(settings, {**given, **taken}, path)
    whole = _checked(settings, {**given, **{name: value for name, value in found.items() if "." not in name}}, path)
    values = {name: getattr(result, name) for name in taken if name != "model"}
    if news := [
        f"{name}={_shown(value)}" for name, value in values.items() if not _same(value, getattr(settings, name))
    ]:
        notes.append(f"From {path}: {', '.join(news)}")
    for name in found:
        if name in given and not _same(getattr(whole, name), given[name]):
            resizes = name == "image_size" and _is_like(settings)
            then = "; the model's position embeddings are resized" if resizes else ""
            notes.append(
                f"{name}={_shown(given[name])} was given, and replaces {_shown(getattr(whole, name))} of {path}{then}."
            )
    return result, notes


def sample(task: Task[Any], settings: RunSettings) -> dict[str, Any]:
    """Return the settings to store in a checkpoint: those that an evaluation elsewhere needs."""
    values = settings.model_dump(mode="json", include=set(type(settings).recorded))
    return {"task": task.name, **{name: value for name, value in values.items() if value is not None}}


def _of_this_task(task: Task[Any], settings: RunSettings, stated: StatedInputs) -> dict[str, Any]:
    """Return the settings that a checkpoint states; of another task's checkpoint, those that both tasks share."""
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
    """Whether the model sees whole images, with one position embedding per patch."""
    return isinstance(settings, ImageSettings)


def _checked(settings: S, values: Mapping[str, Any], path: Path) -> S:
    try:
        return type(settings)(**values)
    except ValidationError as error:
        raise CheckpointError(
            f"The input preparation in {path} is not valid:\n  "
            + "\n  ".join(problems(error))
            + "\nSet these values (--set KEY=VALUE, or a config file), or write the checkpoint again."
        ) from error


def _same_words(task: Task[Any], settings: RunSettings, folder: Path) -> bool:
    """Whether the given tokenizer and the checkpoint's own have the same vocabulary."""
    given = task.tokenizer(settings)
    try:
        own = task.tokenizer(settings.model_copy(update={"tokenizer": str(folder)}))
    except DataError:  # the checkpoint's own is not used, so it need not be readable
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
