"""Our own folder: weights as safetensors, everything else as JSON, nothing pickled."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors.torch import save_file
from torch import nn

from upop.checkpoints.fit import fit
from upop.checkpoints.read import read_weights, shared_tensors
from upop.errors import CheckpointError
from upop.files import replacing_folder
from upop.models import MODELS, kind_of
from upop.pruning import Plan

WEIGHTS = "model.safetensors"
_DESCRIPTION = "upop.json"
_FORMAT = 1


def save(model: nn.Module, folder: str | Path, plan: Plan | None = None) -> Path:
    """Write a model, dense or compressed, so that `load` gives it back.

    The folder holds `model.safetensors` and `upop.json` (the model's class and dense configuration, the plan, and
    versions). It is written beside and renamed: an older one of that name stays whole until the new one is.

    Args:
        model: one of upop's models, or any other model (which `load` then needs in its dense form).
        folder: where to write.
        plan: which entries were kept, for the record; `load` reads the kept sizes off the shapes.

    Raises:
        RunFolderError: the folder cannot be written.
    """
    folder = Path(folder)
    kind = kind_of(model)
    description = {
        "format": _FORMAT,
        "model": kind,
        "class": f"{type(model).__module__}.{type(model).__qualname__}",
        "config": model.config.model_dump() if kind else None,  # type: ignore[union-attr, operator]
        "plan": json.loads(plan.to_json()) if plan is not None else None,
        "versions": {name: metadata.version(name) for name in ("upop", "torch", "timm", "transformers")},
    }
    state = model.state_dict()
    shared = shared_tensors(state)
    written = {name: value.detach().cpu().contiguous() for name, value in state.items() if name not in shared}
    with replacing_folder(folder) as fresh:
        save_file(written, fresh / WEIGHTS, metadata=shared or None)
        (fresh / _DESCRIPTION).write_text(json.dumps(description, indent=1))
    return folder


def load(folder: str | Path, model: nn.Module | None = None) -> nn.Module:
    """Return the model that `save` wrote, in evaluation mode, on the CPU.

    Args:
        folder: the folder.
        model: the dense model to cut and fill, for models that are not upop's own; changed in place.

    Raises:
        CheckpointError: the folder is not one of ours, is damaged, or does not fit the model.
    """
    folder = Path(folder)
    description = read_description(folder)
    if model is None:
        if description["model"] not in MODELS:
            raise CheckpointError(
                f"{folder} holds a {description['class']}, which upop does not build itself. "
                "Build the dense model and call upop.load(folder, model)."
            )
        built, config = MODELS[description["model"]]
        try:
            model = built(config(**description["config"]))
        except (ValidationError, TypeError) as error:
            raise CheckpointError(f"{folder / _DESCRIPTION} describes a model that cannot be built: {error}") from error
    state = read_weights(folder / WEIGHTS)
    return fit(model, state, str(folder), lambda _unit: False).eval()


def read_description(folder: Path) -> dict[str, Any]:
    """Return what `upop.json` says.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    path = folder / _DESCRIPTION
    if not path.is_file():
        raise CheckpointError(
            f"{folder} was asked for, and it holds no {_DESCRIPTION}. Give a folder that upop.save wrote "
            "(a run keeps one under best/)."
        )
    try:
        description = json.loads(path.read_text())
        fields = {name: description[name] for name in ("format", "model", "class", "config", "plan")}
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged: {error!r}. Write the model again.") from error
    if fields["format"] != _FORMAT:
        raise CheckpointError(f"{path} has format {fields['format']!r}; this upop reads {_FORMAT}. Update upop.")
    return fields


def is_folder(path: Path) -> bool:
    """Whether `path` is a folder that `save` wrote."""
    return (path / _DESCRIPTION).is_file()
