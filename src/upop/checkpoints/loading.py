"""Loads checkpoints of every format as models."""

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
        source: a folder that `save`, transformers, open_clip or timm wrote; the name of such a model on the hub; or a
            published checkpoint (`.pth` or `.safetensors`), whose task is inferred: see `load_official`.
        model: the dense model to load into, if upop cannot build it; changed in place, see `load_into`.
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
    """Load a checkpoint, or build a timm model by its name with initial weights.

    Args:
        source: as for `load`, or the name of a timm model ("vit_tiny_patch16_224").
        task: the task of a published file; by default inferred from its tensor names.
        own: whether to load a transformers model as its counterpart among upop's own models, if it has one.
        strict: False warns of misfits, as for `load`.
        overrides: arguments of a timm model, or sizes that the shapes in a published file do not determine.

    Raises:
        CheckpointError: nothing can be read; the message for an unknown timm model names the nearest one.
        SettingError: timm rejects the arguments; the task or an override is unknown.
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
    """Whether a name can only be that of a timm model: no path, no file extension, no owner."""
    name = str(source)
    return isinstance(source, str) and bool(_TIMM_NAME.fullmatch(name)) and not exists(located(name))


def _of_timm(name: str, arguments: Mapping[str, Any]) -> nn.Module:
    with naming_missing():
        import timm
    if not timm.is_model(name):
        raise CheckpointError(
            f"{name} is neither a file, a folder nor a model of timm {timm.__version__}"
            f"{nearest(name, timm.list_models())}."
        )
    try:
        model: nn.Module = timm.create_model(name, pretrained=False, **arguments)
    except Exception as error:  # each model checks its arguments in its own way
        raise SettingError(f"timm cannot build {name} with {dict(arguments)}: {error}.") from error
    return model.eval()


def _has_counterpart(checkpoint: Checkpoint) -> bool:
    """Whether a transformers model can be loaded as one of upop's own models."""
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
        model: the dense model, from `timm.create_model(...)`, `open_clip.create_model(...)` or custom code. It is
            changed in place.
        source: a folder that `save` or the model's library wrote, or the name of one on the hub.
        strict: False only warns of misfits, as for `load`, and of a model of another class.

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
                f"{found.path} is a file of tensors, which does not record softmax scales after a cut. Save the "
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
