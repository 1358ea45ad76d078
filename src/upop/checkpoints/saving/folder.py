"""Writes the folder format of upop: weights as safetensors, everything else as JSON, no pickles.

The folder of a transformers model is also valid for transformers: `from_pretrained` and `pipeline` read it.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from upop.checkpoints.configs.layers import without_layers
from upop.checkpoints.configs.plain import plain_timm
from upop.checkpoints.files.description import FILE as DESCRIPTION
from upop.checkpoints.files.description import FORMAT, WEIGHTS, digests
from upop.checkpoints.files.hub import is_hub_name
from upop.checkpoints.files.weights import write_weights
from upop.checkpoints.fitting.carried import VOCABULARY, preparation_of
from upop.checkpoints.fitting.meta import meta_model
from upop.checkpoints.fitting.recorded_groups import groups_of
from upop.checkpoints.fitting.sizes import plan_for, sizes_before
from upop.checkpoints.saving import card
from upop.checkpoints.saving.loading_code import write_code
from upop.errors import LayoutError, SettingError
from upop.files import replacing_folder
from upop.libraries import installed_version, is_pretrained
from upop.models import MODELS, kind_of
from upop.pruning import Group, Plan, Prunable, count_parameters, find_prunable, remember
from upop.pruning.carried import cut_beyond, plan_of
from upop.pruning.errors import some_of
from upop.pruning.known import sized
from upop.pruning.masks import refuse_masked, unwrapped
from upop.pruning.sharded import refuse_sharded
from upop.pruning.traits import momentum_encoders
from upop.pruning.words import library_of, true_class
from upop.pruning.written import as_json
from upop.tokens.encoders import removed_tokens
from upop.tokens.layer import place_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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
        SettingError: a transformers model is quantized by another method, or `plan` is no plan.
        LayoutError: the model is sharded (save a copy by `upop.full_copy`), it is on the meta device, without
            weights, or it is a piece of a cut model that holds only a part of some group.
    """
    folder, model = Path(folder), unwrapped(model)
    refuse_sharded(model, "save()")
    if plan is not None and not isinstance(plan, Plan):
        raise SettingError(
            f"plan is what Pruner.plan, calibrate or Plan.from_json return; found a {type(plan).__name__}. After a cut "
            "the model carries it: upop.save(model, folder)."
        )
    _refuse_piece(model)
    plan = plan if plan is not None else plan_of(model)
    groups = groups_here(model, plan)
    if any(not group.size for group in groups) and kind_of(model) is None:
        fewer = without_layers(model, plan)
        if isinstance(fewer, nn.Module):
            model, plan = fewer, plan_of(fewer)
            groups = groups_here(model, plan)
        elif fewer is not None:
            warnings.warn(f"Layers without channels stay in the file: {fewer}.", stacklevel=2)
    given, plan = plan, _still_true(plan, groups, model)
    kind = kind_of(model)
    _refuse_meta(model)
    _warn_masked(model, groups)
    _warn_merging(model)
    in_transformers = is_pretrained(model) and _is_its_own(model)
    plain = in_transformers and _mark(model) and plan is not None
    # A model that transformers loaded has no plan: its record alone says what was cut before.
    record = {name: content for name, (content, _) in _recorded(model).items()} if in_transformers else {}
    dense = _dense_sizes(model, groups, given) | {name: int(each["size"]) for name, each in record.items()}
    built = _dense_form(model if kind is None and not in_transformers else None, plan)
    in_timm = None if plan is None or built["timm"] is None else plain_timm(model, built["timm"])
    description = {
        "format": FORMAT,
        "model": kind,
        "class": f"{true_class(model).__module__}.{true_class(model).__qualname__}",
        "config": model.config.model_dump() if kind else None,  # type: ignore[union-attr, operator]
        "transformers": in_transformers,
        **built,
        "plain": plain or in_timm is not None,
        "layout": {group.name: _group(group, dense.get(group.name)) for group in groups},
        "groups": _written(model, groups, {} if plain else dense, None if plain else given) | record,
        "plan": json.loads((plan if plain else replace(plan, slices={})).to_json()) if plan is not None else None,
        "preparation": preparation_of(model),
        "tokens": removed_tokens(model),
        "vocabulary": getattr(model, VOCABULARY, None),
        "versions": _versions(),
    }
    with replacing_folder(folder, "model", overwrite=overwrite) as fresh:
        if in_transformers:
            model.save_pretrained(fresh)  # type: ignore[operator]
            if plan is not None and not plain:
                write_code(model, fresh)
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


def _card(model: nn.Module, description: dict[str, Any]) -> str:
    # Momentum encoders serve training alone, and are no part of the deployed model.
    whole = None if momentum_encoders(model) else count_parameters(model)
    source = getattr(model, "name_or_path", None)
    on_hub = source if isinstance(source, str) and is_hub_name(source) else None
    return card.card(description, name=on_hub, parameters=whole)


def _mark(model: nn.Module) -> bool:
    """Write into a model's configuration how much it keeps; return whether its own numbers say it."""
    from upop.checkpoints.saving import quantizer  # takes transformers

    quantizer.mark(model)
    return not quantizer.recorded(getattr(model, "config", None))


def _recorded(model: nn.Module) -> Mapping[str, tuple[Any, int]]:
    """Return group -> (its JSON form in the dense model, kept channels), as a transformers configuration records it."""
    if not is_pretrained(model):
        return {}
    from upop.checkpoints.saving import quantizer

    return quantizer.recorded_groups(model.config)


def _dense_form(model: nn.Module | None, plan: Plan | None) -> dict[str, Any]:
    """Return how the dense form of a model is built: by its name in timm, or by its parts in open_clip."""
    found: dict[str, Any] = {"timm": None, "open_clip": None}
    library = "" if model is None else library_of(model)
    if model is not None and library == "timm":
        from upop.checkpoints.libraries import timm_models

        found["timm"] = timm_models.describe(model, plan)
    elif model is not None and library == "open_clip":
        from upop.checkpoints.libraries import open_clip_models

        found["open_clip"] = open_clip_models.describe(model, plan)
    return found


def _versions() -> dict[str, str]:
    """Return the installed versions of upop and of the libraries that a model may be of."""
    found = {name: installed_version(name) for name in ("upop", "torch", "timm", "transformers")}
    return {name: version for name, version in found.items() if version is not None}


def _refuse_piece(model: nn.Module) -> None:
    beyond = cut_beyond(model)
    if beyond is not None:
        group, holder = beyond
        whole = (
            f"its module {holder}, which holds all of the group, or the whole model" if holder else "the whole model"
        )
        raise LayoutError(
            f"This {type(model).__name__} is a part of a model that was cut, and holds only a part of its group "
            f"{group}: no dense {type(model).__name__} could be cut to these sizes again. Save {whole}."
        )


def _refuse_meta(model: nn.Module) -> None:
    if any(parameter.is_meta for parameter in model.parameters()):
        raise LayoutError(
            f"{type(model).__name__} is on the meta device and has no weights to save. Load its weights first."
        )


def groups_here(model: nn.Module, plan: Plan | None) -> tuple[Group, ...]:
    """Return the groups of a model, with those of its plan or record, since copies are not traced."""
    try:
        found = find_prunable(model)
    except LayoutError:  # it cannot be traced, and is saved all the same
        found = Prunable((), ())
    known = dict(_recorded(model))
    known |= {} if plan is None else {name: (each, len(plan.kept.get(name, ()))) for name, each in plan.slices.items()}
    planned = {name: (_planned(model, name, content), size) for name, (content, size) in known.items()}
    true = {name: each for name, (each, size) in planned.items() if each is not None and each.size == size}
    planned_axes = {axis for each in true.values() for axis in _axes(each)}
    # After a cut to few heads or dimensions, only the plan or the record says which of the two a channel is.
    groups = tuple(
        true[group.name] if group.name in true and _kind(true[group.name]) != _kind(group) else group
        for group in found.groups
        if group.name in true or not planned_axes.intersection(_axes(group))  # traced anew, it may be renamed
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
    lost = [name for name in plan.kept if name not in left.kept]
    if lost:
        warnings.warn(
            f"The plan of this {type(model).__name__} names groups that it lacks, or that have another size: "
            f"{some_of(lost)}. Were layers dropped after the cut? The plan is saved without them.",
            stacklevel=3,
        )
    return left


def _warn_masked(model: nn.Module, groups: Sequence[Group]) -> None:
    try:
        refuse_masked(model, list(groups))
    except LayoutError:
        warnings.warn(
            f"{type(model).__name__} is still masked, and masks are not saved: the dense model is written. Call the "
            "Pruner's shrink() first, or save its state_dict() too.",
            stacklevel=3,
        )


def _warn_merging(model: nn.Module) -> None:
    """Warn for a part of a model that merges tokens: the record of merging lies with the whole."""
    merging = any(place_of(layer) is not None for layer in model.modules())
    if merging and removed_tokens(model) is None and kind_of(model) is None:
        warnings.warn(
            f"This {type(model).__name__} is a part of a model that merges tokens, and is saved without merging. Save "
            "the whole model, or call upop.merge_tokens on the part once it is loaded.",
            stacklevel=3,
        )


def _is_its_own(model: PreTrainedModel) -> bool:
    """Whether transformers can reload the model; otherwise it is saved like any other model."""
    from upop.checkpoints.saving.quantizer import misfit

    why = misfit(model)
    if why is not None:
        warnings.warn(
            f"{type(model).__name__} is not what its configuration builds ({why}), so from_pretrained could not load "
            "it again. It is written for upop.load_into(model, folder) with the dense model.",
            stacklevel=3,
        )
    return why is None


def _dense_sizes(model: nn.Module, groups: Sequence[Group], plan: Plan | None) -> dict[str, int]:
    """Return group -> dense size, where known."""
    kind = kind_of(model)
    if kind is None:
        return dict(plan.sizes) if plan is not None else {}
    build, _ = MODELS[kind]
    return sizes_before(groups, meta_model(lambda: build(model.config)))


def _group(group: Group, dense: int | None) -> dict[str, Any]:
    return {"kind": group.kind, "modality": group.modality, "heads": group.heads, "channels": group.size, "of": dense}


def _written(model: nn.Module, groups: Sequence[Group], dense: Mapping[str, int], plan: Plan | None) -> dict[str, Any]:
    """Return group -> its slices as JSON, where known.

    If layers were dropped after the cut, others now have their names: records of the plan apply if they fit the
    tensors. For a name outside the plan, it is unknown whether the layer was cut.
    """
    known = {} if plan is None else dict(plan.slices)
    if plan is not None and len(plan_for(plan, groups)) < len(plan):
        fitting = {group.name for group in groups if _planned(model, group.name, known.get(group.name)) is not None}
        known = {name: content for name, content in known.items() if name in fitting}
        groups = [group for group in groups if group.name in fitting]
    for group in groups:
        # Channels of other groups between the rows may have been cut too; then only the plan knows the dense form.
        if group.name not in known and not any(part.gaps for part in group.slices):
            known[group.name] = as_json(replace(group, size=dense.get(group.name) or group.size))
    return {group.name: known[group.name] for group in groups if known.get(group.name) is not None}


def _planned(model: nn.Module, name: str, content: Any) -> Group | None:
    """Return a group of a plan at its present size in a model; None if it does not fit."""
    try:
        found = None if content is None else groups_of(model, {name: content})
    except ValueError:
        return None
    return None if found is None else sized(model, found[name])


def _axes(group: Group) -> set[tuple[str, int]]:
    return {(part.tensor, part.dim) for part in group.slices if not part.gaps}


def _kind(group: Group) -> tuple[str, int, int]:
    return group.channel, group.heads, group.size
