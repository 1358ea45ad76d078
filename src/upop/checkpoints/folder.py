"""The folder format of upop: weights as safetensors, everything else as JSON, no pickles.

The folder of a transformers model is also valid for transformers: `from_pretrained` and `pipeline` read it.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError
from torch import Tensor, nn

from upop.checkpoints import card, owners
from upop.checkpoints.blank import outline
from upop.checkpoints.config_json import is_transformers_folder
from upop.checkpoints.described_groups import describe_groups
from upop.checkpoints.description import FILE as DESCRIPTION
from upop.checkpoints.description import (
    FORMAT,
    VOCABULARY,
    Description,
    GroupLayout,
    check_digests,
    digests,
    is_folder,
    read_description,
)
from upop.checkpoints.fit import build_to_fit, fit
from upop.checkpoints.hub import is_hub_name, local_path
from upop.checkpoints.preparation import preparation_of, set_preparation
from upop.checkpoints.read import read_outline, read_weights
from upop.checkpoints.renamed import groups_if_read, groups_of, groups_today, named_as_today, with_names
from upop.checkpoints.sizes import dense_meta_copy, plan_for, sizes_before
from upop.checkpoints.write import write_weights
from upop.errors import CheckpointError, LayoutError, PlanError, SettingError, nearest
from upop.files import replacing_folder
from upop.libraries import is_pretrained
from upop.models import MODELS, kind_of
from upop.pruning import Group, Plan, Prunable, count_parameters, find_prunable, remember
from upop.pruning.carried import plan_of, set_plan
from upop.pruning.errors import some_of
from upop.pruning.known import sized
from upop.pruning.masks import refuse_masked, unwrapped
from upop.pruning.sharded import refuse_sharded
from upop.pruning.written import as_json
from upop.tokens.encoders import merge_again, removed_tokens
from upop.values import problems

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WEIGHTS = "model.safetensors"


def save(
    model: nn.Module, folder: str | Path, plan: Plan | None = None, *, tokenizer: Any = None, overwrite: bool = False
) -> Path:
    """Save a model, dense or compressed, for `load`.

    The folder holds `model.safetensors` and `upop.json` (how the dense model is built, what every group keeps, the plan
    and versions); for a transformers model also `config.json`, so that transformers reads it too; for a compressed
    model `README.md`, its model card. It is written under another name and renamed, so that an older one stays intact
    until the new one is complete. Only a folder of `save` that holds nothing else, by its marker, is replaced.

    Args:
        model: a model of upop, timm or transformers, or any other model (for which `load` needs the dense model).
        folder: the folder to write.
        plan: the kept channels, for the record; by default the plan that `Pruner.shrink` or `shrink` recorded.
        tokenizer: a transformers tokenizer to save beside the weights.
        overwrite: whether a folder that `save` or `export` wrote may be replaced though its files were changed since.

    Raises:
        RunFolderError: the folder holds files of others, or cannot be written; nothing was changed.
        SettingError: a transformers model is quantized by another method.
        LayoutError: the model is sharded (save a copy by `upop.full_copy`), or it is on the meta device, without
            weights.
    """
    folder, model = Path(folder), unwrapped(model)
    refuse_sharded(model, "save()")
    plan = plan if plan is not None else plan_of(model)
    groups = groups_here(model, plan)
    if any(not group.size for group in groups) and kind_of(model) is None:
        fewer = owners.without_layers(model, plan)
        if isinstance(fewer, nn.Module):
            model, plan = fewer, plan_of(fewer)
            groups = groups_here(model, plan)
        elif fewer is not None:
            warnings.warn(f"Layers of which nothing is left stay in the file: {fewer}.", stacklevel=2)
    told, plan = plan, _still_true(plan, groups, model)
    kind = kind_of(model)
    _refuse_meta(model)
    _warn_masked(model, groups)
    dense = _dense_sizes(model, groups, told)
    in_transformers = is_pretrained(model) and _is_its_own(model)
    if in_transformers:
        owners.mark(model)
    plain = plan is not None and in_transformers and owners.is_plain(model)
    built = owners.describe(model if kind is None and not in_transformers else None, plan)
    in_timm = owners.plain_timm(model, built, plan)
    description = {
        "format": FORMAT,
        "model": kind,
        "class": f"{type(model).__module__}.{type(model).__qualname__}",
        "config": model.config.model_dump() if kind else None,  # type: ignore[union-attr, operator]
        "transformers": in_transformers,
        **built,
        "plain": plain or in_timm is not None,
        "layout": {group.name: _group(group, dense.get(group.name)) for group in groups},
        "units": _written(model, groups, {} if plain else dense, None if plain else told),
        "plan": json.loads((plan if plain else replace(plan, slices={})).to_json()) if plan is not None else None,
        "preparation": preparation_of(model),
        "tokens": removed_tokens(model),
        "vocabulary": getattr(model, VOCABULARY, None),
        "versions": owners.versions(),
    }
    with replacing_folder(folder, "model", overwrite=overwrite) as fresh:
        if in_transformers:
            model.save_pretrained(fresh)  # type: ignore[operator]
            if plan is not None and not plain:
                owners.write_code(model, fresh)
        else:
            write_weights(model.state_dict(), fresh / WEIGHTS)
            if in_timm is not None:
                (fresh / "config.json").write_text(json.dumps(in_timm, indent=1))
        if tokenizer is not None:
            tokenizer.save_pretrained(fresh)
        description["weights"] = digests(fresh)
        (fresh / DESCRIPTION).write_text(json.dumps(description, indent=1))
        if plan is not None:
            (fresh / card.FILE).write_text(_card(model, description), encoding="utf-8")
    return folder


def load(folder: str | Path, model: nn.Module | None = None, *, strict: bool = True) -> nn.Module:
    """Load a model of `save`, in evaluation mode, on the CPU, in the saved precision.

    The content of a folder cannot trigger downloads, run code, or allocate more memory than its weights take.

    Args:
        folder: the folder, or one of transformers' `save_pretrained`, or the name of such a model on the hub.
        model: the dense model to cut and fill, if upop cannot build it; changed in place, see `load_into`.
        strict: False only warns of weights that are missing, unexpected, of another shape, not finite, or changed
            since they were saved; missing ones keep their initial values.

    Raises:
        CheckpointError: the folder is not upop's, is damaged, or does not fit the model; misfits are listed.
    """
    if model is not None:
        return load_into(model, folder, strict=strict)
    folder = local_path(folder)
    if not is_folder(folder) and is_transformers_folder(folder):
        return owners.load_transformers(folder, strict=strict)
    description = read_description(folder)
    plan = _plan(description, folder)
    if description.transformers:
        model = owners.load_transformers(folder, description.kind, strict=strict)
        if description.groups:
            dense = dense_meta_copy(model)
            describe_groups(dense, description, folder)
            remember(model, find_prunable(dense))
    else:
        source, held = str(folder), read_outline(folder / WEIGHTS)
        # Of our own models, whose configuration has one number for all layers, it is known what there was before.
        sizes = {name: group.of for name, group in (description.layout or {}).items() if description.model and group.of}

        def build() -> nn.Module:
            return describe_groups(_dense(description, folder), description, folder)

        model = build_to_fit(build, held, source, dense=sizes, strict=strict)
        state = read_weights(folder / WEIGHTS)
        model = fit(_as_precise(model, state), state, source, lambda _group: False, strict=strict)
    check_digests(folder, description, strict=strict)
    layout = description.layout or {}
    names = groups_today(model, {**layout, **({} if plan is None else plan.kept)})
    plan = None if plan is None else with_names(plan, names)
    _check_layout(model, plan, {names.get(name, name): group for name, group in layout.items()}, folder)
    set_plan(model, plan)
    set_preparation(model, description.preparation)
    if description.vocabulary is not None:
        setattr(model, VOCABULARY, description.vocabulary)
    return _merging(model, description, folder).eval()


def load_into(model: nn.Module, folder: str | Path, *, strict: bool = True) -> nn.Module:
    """Cut a dense model to the sizes in a folder of `save`, and load the weights; return it, in evaluation mode.

    Args:
        model: the dense model, as before the compression: `timm.create_model(...)`, `open_clip.create_model(...)`, or a
            custom one. It is changed in place.
        folder: the folder, or the name of a model on the hub.
        strict: False only warns of misfits, as `load` does, and of a model of another class.

    Raises:
        CheckpointError: the folder is not upop's, is damaged, or `model` cannot be cut to its sizes.
    """
    folder, whole = local_path(folder), model
    model = unwrapped(model)
    description = read_description(folder)
    _check_class(model, description, folder, strict=strict)
    if is_pretrained(model) and description.transformers is not False:
        state = owners.load_transformers(folder, type(model), strict=strict).state_dict()
    else:
        state = named_as_today(model, read_weights(folder / WEIGHTS))
    plan = _plan(description, folder)
    describe_groups(model, description, folder)
    try:
        fit(model, state, str(folder), lambda _group: False, strict=strict)
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}\n{folder} holds a {description.kind}. Build that model, with the settings that it had before "
            "it was compressed."
        ) from error
    check_digests(folder, description, strict=strict)
    set_plan(model, None if plan is None else with_names(plan, groups_today(model, plan.kept)))
    set_preparation(model, description.preparation)
    if is_pretrained(model):
        owners.mark(model)
    _merging(model, description, folder)
    return whole.eval()


def _merging(model: nn.Module, description: Description, folder: Path) -> nn.Module:
    """Restore token merging by the description of a model; layers are traced anew."""
    if description.tokens:
        try:
            return merge_again(model, description.tokens)
        except (LayoutError, SettingError) as error:
            raise CheckpointError(f"{folder} holds a model that merged tokens, and this one cannot: {error}") from error
    return model


def _check_class(model: nn.Module, description: Description, folder: Path, *, strict: bool) -> None:
    """Refuse a model whose class is neither that of the folder nor a subclass."""
    kind = description.kind.rpartition(".")[2]
    if kind not in (each.__name__ for each in type(model).__mro__):
        message = f"{folder} holds a {description.kind}, and was to fill a {type(model).__name__}. Build a {kind}."
        if strict:
            raise CheckpointError(message)
        warnings.warn(message, stacklevel=3)


def _card(model: nn.Module, description: dict[str, Any]) -> str:
    # Momentum copies, which training alone needs, are none of what the model is.
    whole = None if getattr(model, "momentum_encoders", None) else count_parameters(model)
    source = getattr(model, "name_or_path", None)
    on_hub = source if isinstance(source, str) and is_hub_name(source) else None
    return card.card(description, name=on_hub, parameters=whole)


def _refuse_meta(model: nn.Module) -> None:
    if any(parameter.is_meta for parameter in model.parameters()):
        raise LayoutError(
            f"{type(model).__name__} is on the meta device and has no weights to save. Load its weights first."
        )


def groups_here(model: nn.Module, plan: Plan | None) -> tuple[Group, ...]:
    """Return the groups of a model, including those of its plan, since copies are not traced."""
    try:
        found = find_prunable(model)
    except LayoutError:  # it cannot be run by itself, and is saved all the same
        found = Prunable((), ())
    kept = {} if plan is None else plan.kept
    told = {} if plan is None else {name: _told(model, plan.slices, name) for name in plan.slices}
    true = {name: each for name, each in told.items() if each is not None and each.size == len(kept.get(name, ()))}
    told_axes = {axis for each in true.values() for axis in _axes(each)}
    # Where a cut left as many heads as dimensions, sizes do not tell which of them a channel is; the plan does.
    groups = tuple(
        true[group.name] if group.name in true and _kind(true[group.name]) != _kind(group) else group
        for group in found.groups
        if group.name in true or not told_axes.intersection(_axes(group))  # read anew, it may have another name
    )
    names = {group.name for group in groups}
    groups += tuple(each for name, each in true.items() if name not in names)
    if groups != found.groups:
        remember(model, replace(found, groups=groups))
    return groups


def _still_true(plan: Plan | None, groups: Sequence[Group], model: nn.Module) -> Plan | None:
    """Return the plan without groups that the model no longer has, after layers were dropped."""
    if plan is None:
        return None
    left = plan_for(plan, groups)
    pruned = [name for name in plan.kept if name not in left.kept]
    if pruned:
        warnings.warn(
            f"The plan of this {type(model).__name__} names groups that it does not have, or not with as many "
            f"channels: {some_of(pruned)}. Were layers dropped after it was cut? The plan is saved without them.",
            stacklevel=3,
        )
    return left


def _warn_masked(model: nn.Module, groups: Sequence[Group]) -> None:
    try:
        refuse_masked(model, list(groups))
    except LayoutError:
        warnings.warn(
            f"{type(model).__name__} is still masked, and masks are not saved: what is written is the model in full "
            "size. Call the Pruner's shrink() first, or save its state_dict() too.",
            stacklevel=3,
        )


def _is_its_own(model: PreTrainedModel) -> bool:
    """Whether transformers can reload the model; otherwise it is saved like any other model."""
    from upop.checkpoints.transformers_models import misfit

    why = misfit(model)
    if why is not None:
        warnings.warn(
            f"{type(model).__name__} is not what its configuration builds ({why}), so from_pretrained could not load "
            "it again. It is written for upop.load_into(model, folder), where model is built as it was before it was "
            "compressed.",
            stacklevel=3,
        )
    return why is None


def _dense_sizes(model: nn.Module, groups: Sequence[Group], plan: Plan | None) -> Mapping[str, int]:
    """Return group -> dense size, where known."""
    kind = kind_of(model)
    if kind is None:
        return plan.sizes if plan is not None else {}
    build, _ = MODELS[kind]
    return sizes_before(groups, outline(lambda: build(model.config)))


def _group(group: Group, dense: int | None) -> dict[str, Any]:
    return {"kind": group.kind, "modality": group.modality, "heads": group.heads, "entries": group.size, "of": dense}


def _written(model: nn.Module, groups: Sequence[Group], dense: Mapping[str, int], plan: Plan | None) -> dict[str, Any]:
    """Return group -> its slices as JSON, where known.

    If layers were dropped after the cut, others have taken their names: entries of the plan apply to them if they fit
    their tensors. For a name outside the plan, it is unknown whether the layer was cut.
    """
    known = {} if plan is None else dict(plan.slices)
    if plan is not None and len(plan_for(plan, groups)) < len(plan):
        fitting = {group.name for group in groups if _told(model, known, group.name) is not None}
        known = {name: content for name, content in known.items() if name in fitting}
        groups = [group for group in groups if group.name in fitting]
    for group in groups:
        # What lies between a group's rows may have been cut, too: then only the plan knows how it was before.
        if group.name not in known and not any(part.gaps for part in group.slices):
            known[group.name] = as_json(replace(group, size=dense.get(group.name) or group.size))
    return {group.name: known[group.name] for group in groups if known.get(group.name) is not None}


def _told(model: nn.Module, described: Mapping[str, Any], name: str) -> Group | None:
    """Return a group of a plan at its size in a model; None if it does not fit."""
    try:
        found = groups_of(model, {name: described[name]}) if name in described else None
    except ValueError:
        return None
    return None if found is None else sized(model, found[name])


def _axes(group: Group) -> set[tuple[str, int]]:
    return {(part.tensor, part.dim) for part in group.slices if not part.gaps}


def _kind(group: Group) -> tuple[str, int]:
    return group.channel, group.heads


def _plan(description: Description, folder: Path) -> Plan | None:
    try:
        if description.plan is None:
            return None
        plan = Plan.from_json(json.dumps(description.plan))
        described = plan.slices or description.groups or {}
        return replace(plan, slices={name: described[name] for name in plan.kept if name in described})
    except PlanError as error:
        raise CheckpointError(f"{folder / DESCRIPTION} has a plan that cannot be read. {error}") from error


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
            wrong = f"says {described.model_dump(include=set(found))}, and the weights {found}"
        elif kept is not None and (len(kept) != group.size or list(kept) != sorted(set(kept))):
            wrong = f"has a plan of {len(kept)} channels, ascending and each once, for the {group.size} of the weights"
        elif kept and not 0 <= kept[0] <= kept[-1] < size:
            wrong = f"has a plan of channels {kept[0]} to {kept[-1]} of {size}"
        elif kept is not None and described is not None and described.of not in (size, None):
            wrong = f"says that there were {described.of} channels, and its plan {size}"
        if wrong:
            raise CheckpointError(f"{folder / DESCRIPTION} is damaged: of {group.name} it {wrong}. Write it again.")
    names = {group.name for group in groups_if_read(model)}
    unknown = [name for name in plan.kept if name not in names] if plan is not None else []
    if unknown:
        raise CheckpointError(
            f"The plan in {folder / DESCRIPTION} names {unknown[0]!r}, and the model has no such group"
            f"{nearest(unknown[0], sorted(names))}. Were layers dropped after it was cut? Build that model and call "
            "upop.load_into(model, folder), which reads the weights alone."
        )


def _dense(description: Description, folder: Path) -> nn.Module:
    """Build the dense model that a folder describes, with initial weights."""
    dense = owners.build(description, str(folder / DESCRIPTION))
    if dense is not None:
        return dense
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
    except Exception as error:  # a size that fits no other one is found by whatever computes with it
        message = (
            "; ".join(problems(error)) if isinstance(error, ValidationError) else str(error) or type(error).__name__
        )
        raise CheckpointError(f"{folder / DESCRIPTION} describes a model that cannot be built: {message}") from error
    return model


def _as_precise(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """Convert a model to the precision of a state dict, tensor by tensor."""
    found = {value.dtype for value in state.values() if value.is_floating_point()}
    if len(found) == 1:
        return model.to(dtype=found.pop())  # buffers that are not saved too
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name in state:
            tensor.data = tensor.data.to(state[name].dtype)
    return model
