"""Our own folder: weights as safetensors, everything else as JSON, nothing pickled.

A transformers model's folder is also one of transformers' own: `from_pretrained` and `pipeline` read it.
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
from upop.checkpoints.description import FILE as DESCRIPTION
from upop.checkpoints.description import (
    FORMAT,
    Description,
    UnitLayout,
    check_digests,
    digests,
    is_folder,
    read_description,
)
from upop.checkpoints.fit import build_to_fit, fit
from upop.checkpoints.hub import is_hub_name, local_path
from upop.checkpoints.preparation import preparation_of, set_preparation
from upop.checkpoints.read import read_outline, read_weights
from upop.checkpoints.renamed import named_as_today, units_if_read, units_of, units_today, with_names
from upop.checkpoints.sizes import dense_skeleton, plan_for, sizes_before
from upop.checkpoints.told_units import tell_units
from upop.checkpoints.write import write_weights
from upop.errors import CheckpointError, LayoutError, PlanError, SettingError, nearest
from upop.files import replacing_folder
from upop.libraries import is_pretrained
from upop.models import MODELS, kind_of
from upop.pruning import Plan, Survey, Unit, count_parameters, remember, survey
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
    """Write a model, dense or compressed, so that `load` gives it back.

    The folder holds `model.safetensors` and `upop.json` (how the dense model is built, what every unit keeps, the plan
    and versions); that of a transformers model also its `config.json`, so that transformers reads it too; that of a
    compressed model `README.md`, its model card. It is written beside and renamed: an older one of that name stays
    whole until the new one is. Only a folder that `save` wrote is replaced, and only if it holds nothing else, as the
    marker in it tells.

    Args:
        model: one of upop's, timm's or transformers' models, or any other model (which `load` then needs in its dense
            form).
        folder: where to write.
        plan: which entries were kept, for the record; by default what `Pruner.shrink` or `shrink` noted on the model.
        tokenizer: one of transformers', to be kept beside the weights.
        overwrite: whether a folder that `save` or `export` wrote may be replaced though its files were changed since.

    Raises:
        RunFolderError: the folder holds what upop did not write, or cannot be written; nothing was changed.
        SettingError: it is a transformers model that is quantized by another method.
        LayoutError: the model's weights are sharded over processes (save a copy that `upop.gather` makes), or it has
            none, on the meta device.
    """
    folder, model = Path(folder), unwrapped(model)
    refuse_sharded(model, "save()")
    plan = plan if plan is not None else plan_of(model)
    units = units_here(model, plan)
    if any(not unit.size for unit in units) and kind_of(model) is None:
        fewer = owners.without_layers(model, plan)
        if isinstance(fewer, nn.Module):
            model, plan = fewer, plan_of(fewer)
            units = units_here(model, plan)
        elif fewer is not None:
            warnings.warn(f"Layers of which nothing is left stay in the file: {fewer}.", stacklevel=2)
    plan = _still_true(plan, units, model)
    kind = kind_of(model)
    _refuse_meta(model)
    _warn_masked(model, units)
    dense = _dense_sizes(model, units, plan)
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
        "layout": {unit.name: _unit(unit, dense.get(unit.name)) for unit in units},
        "units": _written(units, {} if plain else dense, None if plain else plan),
        "plan": json.loads((plan if plain else replace(plan, slices={})).to_json()) if plan is not None else None,
        "preparation": preparation_of(model),
        "tokens": removed_tokens(model),
        "versions": owners.versions(),
    }
    with replacing_folder(folder, "model", overwrite=overwrite) as fresh:
        if in_transformers:
            model.save_pretrained(fresh)  # type: ignore[operator]
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
    """Return the model that `save` wrote, in evaluation mode, on the CPU, in the saved precision.

    Nothing is fetched or run because a folder says so, and nothing is allocated that its weights do not hold.

    Args:
        folder: the folder, or one that transformers' `save_pretrained` wrote, or the name of such a model on the hub.
        model: the dense model to cut and fill, where upop cannot build it; changed in place, see `load_into`.
        strict: False warns of weights that are missing, unexpected, of another shape, not finite, or not those that
            were saved; where there are none, the model keeps what it was built with.

    Raises:
        CheckpointError: the folder is not one of ours, is damaged, or does not fit the model; what does not is listed.
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
        if description.units:
            dense = dense_skeleton(model)
            tell_units(dense, description, folder)
            remember(model, survey(dense))
    else:
        source, held = str(folder), read_outline(folder / WEIGHTS)
        # Of our own models, whose configuration has one number for all layers, it is known what there was before.
        sizes = {name: unit.of for name, unit in (description.layout or {}).items() if description.model and unit.of}

        def build() -> nn.Module:
            return tell_units(_dense(description, folder), description, folder)

        model = build_to_fit(build, held, source, dense=sizes, strict=strict)
        state = read_weights(folder / WEIGHTS)
        model = fit(_as_precise(model, state), state, source, lambda _unit: False, strict=strict)
    check_digests(folder, description, strict=strict)
    layout = description.layout or {}
    names = units_today(model, {**layout, **({} if plan is None else plan.kept)})
    plan = None if plan is None else with_names(plan, names)
    _check_layout(model, plan, {names.get(name, name): unit for name, unit in layout.items()}, folder)
    set_plan(model, plan)
    set_preparation(model, description.preparation)
    return _merging(model, description, folder).eval()


def load_into(model: nn.Module, folder: str | Path, *, strict: bool = True) -> nn.Module:
    """Cut a dense model to the sizes in a folder that `save` wrote, and fill it; return it, in evaluation mode.

    Args:
        model: the dense model, as it was before it was compressed: `timm.create_model(...)`,
            `open_clip.create_model(...)`, or one's own. It is changed in place.
        folder: the folder, or the name of a model on the hub.
        strict: False warns of what does not fit, as `load` does, and of a model of another class.

    Raises:
        CheckpointError: the folder is not one of ours, is damaged, or holds a model that `model` cannot become.
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
    tell_units(model, description, folder)
    try:
        fit(model, state, str(folder), lambda _unit: False, strict=strict)
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}\n{folder} holds a {description.kind}. Build that model, with the settings that it had before "
            "it was compressed."
        ) from error
    check_digests(folder, description, strict=strict)
    set_plan(model, None if plan is None else with_names(plan, units_today(model, plan.kept)))
    set_preparation(model, description.preparation)
    if is_pretrained(model):
        owners.mark(model)
    _merging(model, description, folder)
    return whole.eval()


def _merging(model: nn.Module, description: Description, folder: Path) -> nn.Module:
    """Have a model merge tokens as its description says; it is found anew where."""
    if description.tokens:
        try:
            return merge_again(model, description.tokens)
        except (LayoutError, SettingError) as error:
            raise CheckpointError(f"{folder} holds a model that merged tokens, and this one cannot: {error}") from error
    return model


def _check_class(model: nn.Module, description: Description, folder: Path, *, strict: bool) -> None:
    """Refuse a model of another class than the folder's; one that is derived from it will do."""
    kind = description.kind.rpartition(".")[2]
    if kind not in (each.__name__ for each in type(model).__mro__):
        said = f"{folder} holds a {description.kind}, and was to fill a {type(model).__name__}. Build a {kind}."
        if strict:
            raise CheckpointError(said)
        warnings.warn(said, stacklevel=3)


def _card(model: nn.Module, description: dict[str, Any]) -> str:
    # Momentum copies, which training alone needs, are none of what the model is.
    whole = None if getattr(model, "momentum_twins", None) else count_parameters(model)
    source = getattr(model, "name_or_path", None)
    on_hub = source if isinstance(source, str) and is_hub_name(source) else None
    return card.card(description, name=on_hub, parameters=whole)


def _refuse_meta(model: nn.Module) -> None:
    if any(parameter.is_meta for parameter in model.parameters()):
        raise LayoutError(
            f"{type(model).__name__} is on the meta device and has no weights to save. Load its weights first."
        )


def units_here(model: nn.Module, plan: Plan | None) -> tuple[Unit, ...]:
    """Return the units of a model, those of its plan among them: a copy of a model was never surveyed itself."""
    try:
        found = survey(model)
    except LayoutError:  # it cannot be run by itself, and is saved all the same
        found = Survey((), ())
    names = {unit.name for unit in found.units}
    told = {} if plan is None else {name: unit for name, unit in plan.slices.items() if name not in names}
    try:
        known = units_of(model, told)
    except ValueError:
        known = None
    here = {name: sized(model, unit) for name, unit in (known or {}).items()}
    kept = {} if plan is None else plan.kept
    more = [unit for name, unit in here.items() if unit is not None and unit.size == len(kept.get(name, ()))]
    if more:
        remember(model, replace(found, units=(*found.units, *more)))
    return (*found.units, *more)


def _still_true(plan: Plan | None, units: Sequence[Unit], model: nn.Module) -> Plan | None:
    """Return the plan without units that the model does not have any more, as when layers are dropped after a cut."""
    if plan is None:
        return None
    left = plan_for(plan, units)
    gone = [name for name in plan.kept if name not in left.kept]
    if gone:
        warnings.warn(
            f"The plan of this {type(model).__name__} names units that it does not have, or not with as many entries: "
            f"{some_of(gone)}. Were layers dropped after it was cut? The plan is saved without them.",
            stacklevel=3,
        )
    return left


def _warn_masked(model: nn.Module, units: Sequence[Unit]) -> None:
    try:
        refuse_masked(model, list(units))
    except LayoutError:
        warnings.warn(
            f"{type(model).__name__} is still masked, and masks are not saved: what is written is the model in full "
            "size. Call the Pruner's shrink() first, or save its state_dict() too.",
            stacklevel=3,
        )


def _is_its_own(model: PreTrainedModel) -> bool:
    """Whether transformers can load the model again; if not, it is saved as any other model."""
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


def _dense_sizes(model: nn.Module, units: Sequence[Unit], plan: Plan | None) -> Mapping[str, int]:
    """Return unit -> entries before it was cut, as far as that is known."""
    kind = kind_of(model)
    if kind is None:
        return plan.sizes if plan is not None else {}
    build, _ = MODELS[kind]
    return sizes_before(units, outline(lambda: build(model.config)))


def _unit(unit: Unit, dense: int | None) -> dict[str, Any]:
    return {"kind": unit.kind, "modality": unit.modality, "heads": unit.heads, "entries": unit.size, "of": dense}


def _written(units: Sequence[Unit], dense: Mapping[str, int], plan: Plan | None) -> dict[str, Any]:
    """Return unit -> all that a cut of the dense model takes, of those of which it is known."""
    known = {} if plan is None else dict(plan.slices)
    for unit in units:
        # What lies between a unit's rows may have been cut, too: then only the plan knows how it was before.
        if unit.name not in known and not any(part.gaps for part in unit.slices):
            known[unit.name] = as_json(replace(unit, size=dense.get(unit.name) or unit.size))
    return {unit.name: known[unit.name] for unit in units if known.get(unit.name) is not None}


def _plan(description: Description, folder: Path) -> Plan | None:
    try:
        if description.plan is None:
            return None
        plan = Plan.from_json(json.dumps(description.plan))
        told = plan.slices or description.units or {}
        return replace(plan, slices={name: told[name] for name in plan.kept if name in told})
    except PlanError as error:
        raise CheckpointError(f"{folder / DESCRIPTION} has a plan that cannot be read. {error}") from error


def _check_layout(model: nn.Module, plan: Plan | None, layout: Mapping[str, UnitLayout], folder: Path) -> None:
    """Raise CheckpointError where the units of a loaded model are not what its description and its plan say.

    Shapes alone tell neither heads nor which entries were kept.
    """
    for unit in units_if_read(model):
        found = {"heads": unit.heads, "entries": unit.size}
        told = layout.get(unit.name)
        kept = None if plan is None else plan.kept.get(unit.name)
        size = 0 if plan is None else plan.sizes.get(unit.name, 0)
        wrong = ""
        if told is not None and (told.heads, told.entries) != (unit.heads, unit.size):
            wrong = f"says {told.model_dump(include=set(found))}, and the weights {found}"
        elif kept is not None and (len(kept) != unit.size or list(kept) != sorted(set(kept))):
            wrong = f"has a plan of {len(kept)} entries, ascending and each once, for the {unit.size} of the weights"
        elif kept and not 0 <= kept[0] <= kept[-1] < size:
            wrong = f"has a plan of entries {kept[0]} to {kept[-1]} of {size}"
        elif kept is not None and told is not None and told.of not in (size, None):
            wrong = f"says that there were {told.of} entries, and its plan {size}"
        if wrong:
            raise CheckpointError(f"{folder / DESCRIPTION} is damaged: of {unit.name} it {wrong}. Write it again.")
    names = {unit.name for unit in units_if_read(model)}
    unknown = [name for name in plan.kept if name not in names] if plan is not None else []
    if unknown:
        raise CheckpointError(
            f"The plan in {folder / DESCRIPTION} names {unknown[0]!r}, and the model has no such unit"
            f"{nearest(unknown[0], sorted(names))}. Were layers dropped after it was cut? Build that model and call "
            "upop.load_into(model, folder), which reads the weights alone."
        )


def _dense(description: Description, folder: Path) -> nn.Module:
    """Return the dense model that a folder describes, with fresh weights."""
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
        said = "; ".join(problems(error)) if isinstance(error, ValidationError) else str(error) or type(error).__name__
        raise CheckpointError(f"{folder / DESCRIPTION} describes a model that cannot be built: {said}") from error
    return model


def _as_precise(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """Bring a model to the precision of a state dict, which may differ from tensor to tensor."""
    found = {value.dtype for value in state.values() if value.is_floating_point()}
    if len(found) == 1:
        return model.to(dtype=found.pop())  # buffers that are not saved too
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name in state:
            tensor.data = tensor.data.to(state[name].dtype)
    return model
