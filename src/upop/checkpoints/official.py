"""Loads and writes published checkpoints, dense and compressed, of the tasks in `published.tasks`."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from upop.checkpoints.fitting.carried import merge_as_saved, preparation_of, refuse_cross_tokens, set_preparation
from upop.checkpoints.fitting.fit import expecting_shapes, fit, load_strictly, scale_queries
from upop.checkpoints.fitting.meta import meta_model
from upop.checkpoints.fitting.sizes import sizes_before
from upop.checkpoints.opening import Checkpoint, open_checkpoint
from upop.checkpoints.published.tasks import build_model, row_of, task_for, task_named
from upop.errors import CheckpointError
from upop.files import make_folder, replacing_file
from upop.ownership import wrote_archive
from upop.pruning import find_groups
from upop.pruning.carried import plan_of, set_plan
from upop.tokens.cross import give_held
from upop.tokens.encoders import merge_again, removed_tokens
from upop.values import described


def load_official(task: str, path: str | Path | Checkpoint, *, strict: bool = True, **overrides: Any) -> nn.Module:
    """Load a published checkpoint, dense or compressed, in evaluation mode.

    Sizes and kept channels are inferred from shapes. Fields that shapes do not determine have their published values
    and can be overridden: numbers of heads (`vision_heads`, `text_heads`; width / 64), dense MLP widths (`vision_mlp`,
    `text_mlp`; 4 x width), `image_size` (position embeddings are resized), dropout.

    Args:
        task: the name of the task, or of its model ("deit", "clip").
        path: a `.pth` with `{"model": state_dict}`, a `.safetensors` file, a folder of transformers, timm, open_clip or
            `upop.save`, or the name of one on the hub ("Salesforce/blip-vqa-base").
        strict: False warns of weights that are missing, unexpected, of another shape or not finite; missing ones keep
            their initial values.
        overrides: fields of the task's configuration.

    Raises:
        CheckpointError: the file cannot be read or does not fit; misfits are listed.
        SettingError: the task or an override is unknown.
    """
    name = task_named(task)
    checkpoint = open_checkpoint(path)
    source, found = str(checkpoint.path if path is checkpoint else path), checkpoint.own()
    if found.task not in (None, name):
        raise CheckpointError(f"{source} holds a {found.kind}, which is a model for {found.task!r}, not for {task!r}.")
    model = build_model(
        name,
        found.read(strict),
        source,
        {**found.sizes, **overrides},
        library_scale=found.task is not None,
        strict=strict,
    )
    return merge_as_saved(model, checkpoint.description, checkpoint.path)


def save_official(task: str, model: nn.Module, path: str | Path, *, overwrite: bool = False) -> Path:
    """Write a model, dense or compressed, as a published checkpoint for `load_official` and the published code.

    Args:
        task: as for `load_official`.
        model: a model of this task; it is not changed.
        path: the `.pth` file to write, with `{"model": state_dict}`.
        overwrite: whether to replace an existing file that upop did not write.

    Raises:
        SettingError: the task is unknown.
        CheckpointError: the model is of another task, or has cross tokens.
        RunFolderError: the file exists and is not upop's, or cannot be written; nothing was changed.
    """
    row = row_of(task)
    if not isinstance(getattr(model, "config", None), row.config):
        raise CheckpointError(f"A {type(model).__name__} cannot be written as a checkpoint of {task!r}.")
    refuse_cross_tokens(model, "A published checkpoint")
    groups = find_groups(model)
    dense = sizes_before(groups, meta_model(lambda: row.model(model.config)))
    model = copy.deepcopy(model).cpu()
    for group in groups:
        if 0 < group.size < dense[group.name] and row.fixed_scale(group):
            scale_queries(model, group, group.size, math.sqrt(dense[group.name] / group.size))
    make_folder(Path(path).parent)
    with replacing_file(Path(path), overwrite or wrote_archive) as part:
        torch.save({"model": row.export(model.state_dict())}, part)
    return Path(path)


def start_from(task: str, path: str | Path | Checkpoint, model: nn.Module, *, any_towers: bool = False) -> list[str]:
    """Load a published checkpoint into a dense model for fine-tuning.

    Position embeddings are resized. For "nlvr", every cross-attention is copied to two branches, and from "nlvr" to
    another task the two become one. Missing weights keep their initial values.

    Args:
        task: the task of the dense model.
        path: a published file, or a folder with one of upop's own models.
        model: the dense model.
        any_towers: whether the checkpoint may be of another task and lack whole towers.

    Returns:
        The missing keys (for "nlvr", the head and the merge layers).

    Raises:
        CheckpointError: the file cannot be read, or does not fit in other ways.
    """
    row = row_of(task)
    checkpoint = open_checkpoint(path)
    source = str(checkpoint.path)
    with expecting_shapes(source):
        state = row.adapt(row.start(checkpoint.own().read(True)), model.config)
    known = model.state_dict()
    # Pre-trained checkpoints carry heads of other tasks; only whole modules that this model lacks are left out.
    towers = {key.split(".")[0] for key in known}
    state = {key: value for key, value in state.items() if key.split(".")[0] in towers}
    held = {key.split(".")[0] for key in state}
    if not held:
        raise CheckpointError(f"{source} has no part of a model for {task}. Start from a related model.")
    return load_strictly(
        model,
        state,
        source,
        lambda key: row.may_start_afresh(key) or (any_towers and key.split(".")[0] not in held),
    )


def resized(model: nn.Module, image_size: int, source: str) -> nn.Module:
    """Rebuild one of upop's own models for another image size, with resized position embeddings.

    Raises:
        CheckpointError: the position embeddings cannot be resized.
        SettingError: no model of this image size can be built.
    """
    row, found = row_of(task_for(model)), cast(Any, model.config)
    if found.image_size == image_size:
        return model
    plan, preparation, removed = plan_of(model), preparation_of(model), removed_tokens(model)
    with described(f"{source} cannot take images of {image_size} pixels"):
        config = row.config(**{**found.model_dump(), "image_size": image_size})
    with expecting_shapes(source):
        state = row.adapt(model.state_dict(), config)
    model = fit(give_held(row.model(config), state), state, source, lambda _group: False).eval()
    set_plan(model, plan)
    set_preparation(model, preparation)
    return model if removed is None else merge_again(model, removed)
