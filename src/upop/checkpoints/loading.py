"""Checkpoints of every format into models."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from upop.checkpoints.fitting.fit import fit
from upop.checkpoints.opening import Checkpoint, open_checkpoint
from upop.errors import CheckpointError, SettingError, nearest
from upop.libraries import is_pretrained, naming_missing
from upop.packaged import exists, located
from upop.pruning.masks import unwrapped

_TIMM_NAME = re.compile(r"[\w-]+")


def load(source: str | Path | Checkpoint, model: nn.Module | None = None, *, strict: bool = True) -> nn.Module:
    """Load the model in a checkpoint, in evaluation mode, on the CPU, in the saved precision.

    The content of a checkpoint cannot trigger downloads, run code, or allocate more memory than its weights take.

    Args:
        source: a folder that `save` wrote, or that transformers, open_clip or timm did; the name of such a model on the
            hub; or a published checkpoint (`.pth` or `.safetensors`), whose tensors tell the task: see `load_official`.
        model: the dense model to cut and fill, if upop cannot build it; changed in place, see `load_into`.
        strict: False only warns of weights that are missing, unexpected, of another shape, not finite, or changed
            since they were saved; missing ones keep their initial values.

    Raises:
        CheckpointError: the checkpoint is missing, damaged, or does not fit the model; misfits are listed.
    """
    if model is not None:
        return load_into(model, source, strict=strict)
    return open_checkpoint(source).load(strict=strict)


def load_named(
    source: str | Path, task: str | None = None, *, own: bool = False, strict: bool = True, **overrides: Any
) -> nn.Module:
    """Return the model that a person names: that of a checkpoint, or of a name of timm, with initial weights.

    Args:
        source: as `load` takes it, or the name of a model of timm ("vit_tiny_patch16_224").
        task: whose model a published file holds; read off the names of its tensors if not given.
        own: whether a model of transformers with a counterpart among upop's own models is read as that.
        strict: False warns of what does not fit, as `load` does.
        overrides: arguments of a model of timm, or what the shapes in a published file do not tell.

    Raises:
        CheckpointError: it is nothing that upop can read; a misspelt name of timm gets the nearest one.
        SettingError: timm cannot build the model with these arguments; the task or an override is unknown.
        MissingLibraryError: its library is not installed.
    """
    if is_timm_name(source):
        return _of_timm(str(source), overrides)
    checkpoint = open_checkpoint(source)
    if checkpoint.kind != "state_dict" and not (own and _has_counterpart(checkpoint)):
        return checkpoint.load(strict=strict)
    with naming_missing():
        from upop.checkpoints.convert import read_model
    return read_model(checkpoint, task, **overrides)


def is_timm_name(source: str | Path) -> bool:
    """Whether a name can only mean a model of timm: no path, no file's ending, no owner in front."""
    name = str(source)
    return isinstance(source, str) and bool(_TIMM_NAME.fullmatch(name)) and not exists(located(name))


def _of_timm(name: str, arguments: Mapping[str, Any]) -> nn.Module:
    with naming_missing():
        import timm
    if not timm.is_model(name):
        raise CheckpointError(
            f"{name} was asked for: there is no such file or folder, and timm {timm.__version__} has no such model"
            f"{nearest(name, timm.list_models())}."
        )
    try:
        model: nn.Module = timm.create_model(name, pretrained=False, **arguments)
    except Exception as error:  # each model checks its arguments in its own way
        raise SettingError(f"timm cannot build {name} with {dict(arguments)}: {error}.") from error
    return model.eval()


def _has_counterpart(checkpoint: Checkpoint) -> bool:
    """Whether a model of transformers can be read as one of upop's own models."""
    if checkpoint.library != "transformers":
        return False
    try:
        from upop.checkpoints.names.counterparts import COUNTERPARTS
    except ModuleNotFoundError:  # without timm there are no models of upop's own
        return False
    from upop.checkpoints.formats import transformers

    has_row = transformers.class_named(checkpoint.path) in [row.kind for row in COUNTERPARTS]
    return has_row and not transformers.narrower_streams(checkpoint.path)


def load_into(model: nn.Module, source: str | Path | Checkpoint, *, strict: bool = True) -> nn.Module:
    """Cut a dense model to the sizes in a checkpoint, and load the weights; return it, in evaluation mode.

    Args:
        model: the dense model, as before the compression: `timm.create_model(...)`, `open_clip.create_model(...)`, or a
            custom one. It is changed in place.
        source: a folder that `save` or the model's library wrote, or the name of one on the hub.
        strict: False only warns of misfits, as `load` does, and of a model of another class.

    Raises:
        CheckpointError: the checkpoint is missing or damaged, or `model` cannot be cut to its sizes.
    """
    found, whole = open_checkpoint(source), model
    model = unwrapped(model)
    if found.kind == "upop":
        from upop.checkpoints.formats import ours

        ours.load_into(model, found, strict=strict)
    else:
        if found.kind == "state_dict":
            raise CheckpointError(
                f"{found.path} is a file of tensors, which does not say how attention is scaled after a cut. Save the "
                "compressed model with upop.save, or load a published checkpoint with upop.load_official(task, path)."
            )
        if found.kind == "transformers" and is_pretrained(model):
            from upop.checkpoints.formats import transformers

            state = transformers.load_transformers(found.path, type(model), strict=strict).state_dict()
        else:
            state = dict(found.state)
        fit(model, state, str(found.path), lambda _group: False, strict=strict)
    if is_pretrained(model):
        from upop.checkpoints.saving.quantizer import mark

        mark(model)
    return whole.eval()
