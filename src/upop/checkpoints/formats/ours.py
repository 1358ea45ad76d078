"""Folders that `upop.save` wrote, loaded as the classes that they were saved from."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError
from torch import Tensor, nn

from upop.checkpoints.files.config_json import is_transformers_folder, read_config
from upop.checkpoints.files.description import FILE as DESCRIPTION
from upop.checkpoints.files.description import (
    WEIGHTS,
    Description,
    GroupLayout,
    check_digests,
    read_description,
)
from upop.checkpoints.files.weights import read_meta, read_weights, safe_weights
from upop.checkpoints.fitting.carried import VOCABULARY, merge_as_saved, set_preparation
from upop.checkpoints.fitting.fit import as_precise, build_to_fit, fit
from upop.checkpoints.fitting.recorded_groups import (
    describe_groups,
    groups_if_read,
    groups_today,
    named_as_today,
    with_names,
)
from upop.checkpoints.fitting.sizes import dense_meta_copy
from upop.checkpoints.formats.format import Own
from upop.errors import CheckpointError, PlanError, nearest
from upop.libraries import is_pretrained, naming_missing
from upop.models import MODELS
from upop.pruning import Plan, find_prunable, remember
from upop.pruning.carried import set_plan
from upop.tokens.cross import give_held
from upop.values import problems

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from upop.checkpoints.opening import Checkpoint


def config(path: Path) -> Mapping[str, Any]:
    """Return the configuration, in the form of the model's library."""
    if is_transformers_folder(path):
        return read_config(path)
    description = read_description(path)
    return description.timm or description.open_clip or description.config or {}


def weights(path: Path) -> Sequence[Path]:
    """Return the file of weights, or the shards of a transformers model."""
    if not is_transformers_folder(path):
        return safe_weights(path, (WEIGHTS,))
    with naming_missing():
        from upop.checkpoints.formats import transformers
    return transformers.weights(path)


def load(checkpoint: Checkpoint, *, strict: bool) -> nn.Module:
    """Build the model from its description, load the weights, and compare both.

    Raises:
        CheckpointError: the folder is damaged, or upop cannot build its model.
    """
    folder, description = checkpoint.path, _description(checkpoint)
    plan = checkpoint.plan
    model: nn.Module
    if description.transformers:
        library = _load_transformers(folder, description.kind, strict=strict)
        if description.groups:
            dense = dense_meta_copy(library)
            describe_groups(dense, description, folder)
            remember(library, find_prunable(dense))
        model = library
    else:
        source, [file] = str(folder), weights(folder)
        held = read_meta(file)
        # The configurations of upop's own models determine the dense sizes.
        sizes = {name: group.of for name, group in (description.layout or {}).items() if description.model and group.of}

        def build() -> nn.Module:
            return describe_groups(give_held(_dense(description, folder), held), description, folder)

        model = build_to_fit(build, held, source, dense=sizes, strict=strict)
        state = read_weights(file)
        model = fit(as_precise(model, state), state, source, lambda _group: False, strict=strict)
    check_digests(folder, description, strict=strict)
    layout = description.layout or {}
    names = groups_today(model, {**layout, **({} if plan is None else plan.kept)})
    plan = None if plan is None else with_names(plan, names)
    _check_layout(model, plan, {names.get(name, name): group for name, group in layout.items()}, folder)
    set_plan(model, plan)
    set_preparation(model, description.preparation)
    if description.vocabulary is not None:
        setattr(model, VOCABULARY, description.vocabulary)
    return merge_as_saved(model, description, folder).eval()


def load_into(model: nn.Module, checkpoint: Checkpoint, *, strict: bool) -> None:
    """Cut a dense model to the sizes in a folder, load the weights, and set plan and input preparation.

    Raises:
        CheckpointError: the folder is damaged, or no cut of `model` fits it.
    """
    folder, description = checkpoint.path, _description(checkpoint)
    _check_class(model, description, folder, strict=strict)
    if is_pretrained(model) and description.transformers is not False:
        state: Mapping[str, Tensor] = _load_transformers(folder, type(model), strict=strict).state_dict()
    else:
        [file] = safe_weights(folder, (WEIGHTS,))
        state = named_as_today(model, read_weights(file))
    give_held(model, state)
    plan = checkpoint.plan
    describe_groups(model, description, folder)
    try:
        fit(model, state, str(folder), lambda _group: False, strict=strict)
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}\n{folder} holds a {description.kind}. Build its dense model, with the original settings."
        ) from error
    check_digests(folder, description, strict=strict)
    set_plan(model, None if plan is None else with_names(plan, groups_today(model, plan.kept)))
    set_preparation(model, description.preparation)
    merge_as_saved(model, description, folder)


def own(checkpoint: Checkpoint) -> Own:
    """Return the folder as one of upop's own models.

    Raises:
        CheckpointError: the folder holds no model of a task with published checkpoints.
    """
    from upop.checkpoints.published.tasks import task_of_config  # takes timm and transformers

    description = _description(checkpoint)
    known = description.model is not None and description.model in MODELS
    task = task_of_config(MODELS[str(description.model)][1]) if known else None
    if task is None:
        raise CheckpointError(
            f"{checkpoint.path} holds a {description.kind}, which is no model of a task with published checkpoints. "
            "Load it as it is: upop.load(folder)."
        )
    return Own(lambda _strict: checkpoint.state, task, description.kind, description.config or {})


def read_plan(description: Description, folder: Path) -> Plan | None:
    """Return the plan that a description records; CheckpointError where it cannot be read."""
    try:
        if description.plan is None:
            return None
        plan = Plan.from_json(json.dumps(description.plan))
        described = plan.slices or description.groups or {}
        return replace(plan, slices={name: described[name] for name in plan.kept if name in described})
    except PlanError as error:
        raise CheckpointError(f"{folder / DESCRIPTION} has a plan that cannot be read. {error}") from error


def _description(checkpoint: Checkpoint) -> Description:
    found = checkpoint.description
    assert found is not None  # of a folder of ours
    return found


def _load_transformers(folder: Path, kind: str | type[PreTrainedModel], *, strict: bool) -> PreTrainedModel:
    with naming_missing():
        from upop.checkpoints.formats import transformers
    return transformers.load_transformers(folder, kind, strict=strict)


def _check_class(model: nn.Module, description: Description, folder: Path, *, strict: bool) -> None:
    """Refuse a model whose class is neither that of the folder nor a subclass."""
    kind = description.kind.rpartition(".")[2]
    if kind not in (each.__name__ for each in type(model).__mro__):
        found = type(model).__name__
        message = f"{folder} holds a {description.kind}, and cannot be loaded into a {found}. Build a {kind}."
        if strict:
            raise CheckpointError(message)
        warnings.warn(message, stacklevel=3)


def _check_layout(model: nn.Module, plan: Plan | None, layout: Mapping[str, GroupLayout], folder: Path) -> None:
    """Raise CheckpointError if the groups of a loaded model contradict its description or plan.

    Shapes alone determine neither heads nor which channels were kept.
    """
    for group in groups_if_read(model):
        found = {"heads": group.heads, "channels": group.size}
        described = layout.get(group.name)
        kept = None if plan is None else plan.kept.get(group.name)
        size = 0 if plan is None else plan.sizes.get(group.name, 0)
        wrong = ""
        if described is not None and (described.heads, described.channels) != (group.heads, group.size):
            wrong = f"it has {described.model_dump(include=set(found))}, the weights {found}"
        elif kept is not None and (len(kept) != group.size or list(kept) != sorted(set(kept))):
            wrong = f"the plan should keep the {group.size} channels of the weights, ascending and each once"
        elif kept and not 0 <= kept[0] <= kept[-1] < size:
            wrong = f"the plan keeps channels {kept[0]} to {kept[-1]} of {size}"
        elif kept is not None and described is not None and described.of not in (size, None):
            wrong = f"it had {described.of} channels by the layout, and {size} by the plan"
        if wrong:
            raise CheckpointError(f"{folder / DESCRIPTION} is damaged at {group.name}: {wrong}. Write the model again.")
    names = {group.name for group in groups_if_read(model)}
    unknown = [name for name in plan.kept if name not in names] if plan is not None else []
    if unknown:
        raise CheckpointError(
            f"The plan in {folder / DESCRIPTION} names {unknown[0]!r}, and the model has no such group"
            f"{nearest(unknown[0], sorted(names))}. Were layers dropped after the cut? Build that model and call "
            "upop.load_into(model, folder), which loads the weights alone."
        )


def _dense(description: Description, folder: Path) -> nn.Module:
    """Build the dense model that a folder describes, with initial weights."""
    source = str(folder / DESCRIPTION)
    with naming_missing():
        if description.timm is not None:
            from upop.checkpoints.libraries import timm_models

            return timm_models.build(description.timm, source, description.groups)
        if description.open_clip is not None:
            from upop.checkpoints.libraries import open_clip_models

            return open_clip_models.build(description.open_clip, source)
    if description.model is None or description.model not in MODELS:
        raise CheckpointError(
            f"{folder} holds a {description.kind}, which upop cannot build by name. "
            "Build the dense model and call upop.load_into(model, folder), or upop.load(folder, model)."
        )
    built, config = MODELS[description.model]
    try:
        model: nn.Module = built(config(**(description.config or {})))
    except CheckpointError:
        raise
    except Exception as error:  # inconsistent sizes raise errors of many kinds
        message = (
            "; ".join(problems(error)) if isinstance(error, ValidationError) else str(error) or type(error).__name__
        )
        raise CheckpointError(f"{folder / DESCRIPTION} describes a model that cannot be built: {message}") from error
    return model
