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
from upop.checkpoints.fitting.meta import outline
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
    """Return the model in a published checkpoint, dense or compressed, ready to use (evaluation mode).

    Sizes are read off the shapes; kept channels too. What shapes cannot tell has the published value, and can be
    overridden: numbers of heads (`vision_heads`, `text_heads`; width / 64 otherwise), MLP widths before pruning
    (`vision_mlp`, `text_mlp`; 4 x width otherwise), `image_size` (position embeddings are resized), dropout.

    Args:
        task: name of the task, or of the model that its checkpoints are known by ("deit", "clip").
        path: a `.pth` with `{"model": state_dict}`, a `.safetensors` file, a folder of transformers, timm, open_clip or
            `upop.save`, or the name of one on the hub ("Salesforce/blip-vqa-base").
        strict: False warns of weights that are missing, unexpected, of another shape or not finite; where there are
            none, the model keeps what it was built with.
        overrides: fields of the task's configuration.

    Raises:
        CheckpointError: the file cannot be read or does not fit; what does not is listed.
        SettingError: the task or an override is unknown.
    """
    name = task_named(task)
    checkpoint = open_checkpoint(path)
    source, found = str(checkpoint.path if path is checkpoint else path), checkpoint.own()
    if found.task not in (None, name):
        raise CheckpointError(
            f"{source} holds a {found.kind}, which is a model for {found.task!r}; asked for was {task!r}."
        )
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
    """Write a model, dense or compressed, as a published checkpoint that `load_official` and the published code read.

    Args:
        task: as `load_official` takes it.
        model: one of this task's models; it stays as it is.
        path: of the `.pth` file, which will hold `{"model": state_dict}`.
        overwrite: whether a file that is there already may be replaced though upop did not write it.

    Raises:
        SettingError: the task is unknown.
        CheckpointError: the model is another task's, or has cross tokens.
        RunFolderError: there is a file that upop did not write, or it cannot be written; nothing was changed.
    """
    row = row_of(task)
    if not isinstance(getattr(model, "config", None), row.config):
        raise CheckpointError(f"A {type(model).__name__} cannot be written as a checkpoint of {task!r}.")
    refuse_cross_tokens(model, "A published checkpoint")
    groups = find_groups(model)
    dense = sizes_before(groups, outline(lambda: row.model(model.config)))
    model = copy.deepcopy(model).cpu()
    for group in groups:
        if 0 < group.size < dense[group.name] and row.fixed_scale(group):
            scale_queries(model, group, group.size, math.sqrt(dense[group.name] / group.size))
    make_folder(Path(path).parent)
    with replacing_file(Path(path), overwrite or wrote_archive) as part:
        torch.save({"model": row.export(model.state_dict())}, part)
    return Path(path)


def start_from(task: str, path: str | Path | Checkpoint, model: nn.Module, *, any_towers: bool = False) -> list[str]:
    """Put the weights of a published checkpoint into a dense model that is to be fine-tuned.

    Position embeddings are resized; for "nlvr", single cross-attentions become twins, and from "nlvr" to other tasks
    twins become single ones. What the checkpoint lacks keeps its initial values.

    Args:
        task: of the dense model.
        path: a published file, or a folder with one of upop's own models.
        model: the dense model.
        any_towers: whether the checkpoint may be of another task, and lack whole towers.

    Returns:
        The keys that the checkpoint lacks (for "nlvr" the head and the merge layers).

    Raises:
        CheckpointError: the file cannot be read or does not fit otherwise.
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
        raise CheckpointError(f"{source} holds nothing that a model for {task} has. Start from a related model.")
    return load_strictly(
        model,
        state,
        source,
        lambda key: row.may_start_afresh(key) or (any_towers and key.split(".")[0] not in held),
    )


def resized(model: nn.Module, image_size: int, source: str) -> nn.Module:
    """Return one of upop's own models for images of another size: its position embeddings are resized.

    Raises:
        CheckpointError: they cannot be.
        SettingError: no such model can be built.
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
