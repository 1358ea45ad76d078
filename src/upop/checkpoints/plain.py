"""Plain models: what is cut alike in all layers of a tower is an ordinary model of a smaller configuration.

Such a configuration is found by trial (`size_fields`). It is used only where the class that it builds, with the cut
model's weights, computes the same.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from upop.checkpoints.blank import frame, outline
from upop.checkpoints.fit import kept_sizes
from upop.checkpoints.outside import QUANTIZED_HERE
from upop.checkpoints.size_fields import Builder, Change, changed, size_fields, sized_config
from upop.libraries import is_pretrained
from upop.models import MODELS, kind_of
from upop.pruning import Group, find_prunable, uniform
from upop.pruning.known import forget, know_as
from upop.pruning.seen import examples_of
from upop.pruning.verify import Outputs, difference, outputs_of, refuse_unlike, rounding_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_RECORD = "quantization_config"


def of_transformers(model: PreTrainedModel) -> Builder:
    """Return how transformers builds models of the kind of this one."""
    kind: Any = getattr(type(model), "uncut_class", type(model))
    config: Any = type(model.config)

    def build(settings: Mapping[str, Any]) -> nn.Module:
        built: nn.Module = kind(config.from_dict(copy.deepcopy(dict(settings))))
        return built

    return Builder(
        without_record(model.config).to_dict(),
        build,
        lambda settings: config.from_dict(copy.deepcopy(dict(settings))),
        f"{config.__name__}",
    )


def of_timm(name: str, arguments: Mapping[str, Any]) -> Builder:
    """Return how timm builds models by a name.

    Args:
        name: of the architecture.
        arguments: of `timm.create_model` for the dense model.
    """

    import timm

    def build(settings: Mapping[str, Any]) -> nn.Module:
        given = {name: value for name, value in settings.items() if value is not None}
        built: nn.Module = timm.create_model(name, pretrained=False, **given)
        return built

    return Builder(
        arguments,
        build,
        lambda _settings: None,
        f"timm.create_model({name!r})",
        ("mlp_ratio", "attn_head_dim", "depth"),
    )


def builder_of(model: nn.Module) -> Builder | None:
    """Return how the library of a dense model builds it; None where none does it from settings."""
    kind = kind_of(model)
    if kind is not None:
        built, config = MODELS[kind]
        ours: Any = model.config
        return Builder(
            ours.model_dump(),
            lambda settings: built(config(**settings)),
            lambda settings: config(**settings),
            config.__name__,
        )
    if is_pretrained(model):
        return of_transformers(model)
    if type(model).__module__.partition(".")[0] != "timm":
        return None
    from upop.checkpoints import timm_models

    described = timm_models.named(model, None)
    return None if described is None else of_timm(*described)


def config_sizes(model: nn.Module, groups: Sequence[Group]) -> uniform.ConfigSizes | None:
    """Return the groups whose sizes the configuration of a dense model can say, by its numbers; None if it has none."""
    builder = builder_of(model)
    if builder is None:
        return None
    found = size_fields(model, groups, builder)
    return uniform.ConfigSizes(
        tuple(uniform.Tower(each.groups, each.sizes) for each in found),
        builder.by,
        partial(_counted_layers, model, groups, builder),
    )


def _counted_layers(model: nn.Module, groups: Sequence[Group], builder: Builder) -> dict[str, tuple[str, ...]]:
    from upop.checkpoints.layers import stacks  # which compares by what is here

    return {
        f"{stack.path}.{place}": names
        for stack in stacks(model, groups, builder)
        for place, names in stack.layers.items()
    }


def without_record(config: Any) -> Any:
    """Return a copy of a configuration that says nothing of a cut."""
    fresh = copy.deepcopy(config)
    for part in _parts(fresh):
        record = getattr(part, _RECORD, None)
        if record is not None and _method(record) == QUANTIZED_HERE:
            delattr(part, _RECORD)
    return fresh


def _method(record: Any) -> Any:
    described = record if isinstance(record, Mapping) else record.to_dict()
    return described.get("quant_method")


def _parts(config: Any) -> list[Any]:
    inside = [value for value in vars(config).values() if hasattr(value, "model_type") and hasattr(value, "to_dict")]
    return [config, *(part for value in inside for part in _parts(value))]


def alike(dense: nn.Module, groups: Sequence[Group], kept: Mapping[str, int]) -> bool:
    """Whether all layers of every tower of a dense model keep equally many channels, as in a plain one, and not
    none.
    """
    sizes = {group.name: kept.get(group.name, group.size) for group in groups}
    return all(sizes.values()) and all(
        len({sizes[name] for name in names}) == 1 for names in uniform.apart(dense, groups)
    )


def become_plain(
    model: PreTrainedModel, dense: nn.Module, groups: Sequence[Group], kept: Mapping[str, int]
) -> str | None:
    """Make a cut model an ordinary one of its class, of a smaller configuration; say why it cannot be, or None.

    Its parameters stay as they are. Objects that others may hold, its configuration among them, are left alone.

    Args:
        model: cut.
        dense: the dense model, with or without memory.
        groups: of the dense model.
        kept: how many channels each group keeps.
    """
    change = sized_config(dense, groups, kept, of_transformers(model))
    if isinstance(change, str):
        return change
    try:
        config = with_fields(without_record(model.config), change)
        plain = ordinary(model, config)
        if isinstance(plain, str):
            return plain
    except Exception as error:  # constructors and setters raise what they like
        return f"{type(model.config).__name__} does not take these sizes ({error or type(error).__name__})"
    found = _compared(model, plain)
    if isinstance(found, str):
        return found
    before = {module: (type(module), dict(vars(module))) for module in model.modules()}
    _adopt(model, config, plain)
    example, expected = found
    why = _differing(model, example, expected)
    if why is not None:
        for module, (kind, held) in before.items():
            module.__class__ = kind
            vars(module).clear()
            vars(module).update(held)
    elif any(group.swaps for group in groups):
        forget(model)  # the classes that its groups took on are those of the uncut sizes
    return why


def plain_timm(model: nn.Module, described: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return config.json in timm's form for a cut model that timm builds by itself; None where it does not.

    Args:
        model: cut.
        described: how timm builds its dense form, as `timm_models.describe` says it.
    """
    from upop.checkpoints import timm_models

    name = described["architecture"]
    builder = of_timm(name, described["arguments"])
    dense = outline(lambda: builder.build(builder.settings))
    know_as(dense, model)
    groups = find_prunable(dense).groups
    kept = kept_sizes(groups, model.state_dict(), type(model).__name__)
    change = sized_config(dense, groups, kept, builder) if alike(dense, groups, kept) else ""
    if isinstance(change, str):
        return None
    arguments = {key: value for key, value in changed(builder.settings, change).items() if value is not None}
    plain = frame(lambda: builder.build(arguments))
    if _shapes_of(plain) != _shapes_of(model):
        return None
    plain.load_state_dict(model.state_dict(), assign=True)
    return timm_models.hub_config(plain, name, arguments) if differing(model, plain) is None else None


def _shapes_of(model: nn.Module) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in model.state_dict().items()}


def with_fields(config: Any, change: Change) -> Any:
    """Return a configuration with fields set, itself."""
    for path, value in change.items():
        place = config
        for part in path[:-1]:
            place = place[part] if isinstance(place, Mapping) else getattr(place, part)
        if isinstance(place, dict):
            place[path[-1]] = value
        else:
            setattr(place, path[-1], value)
    return config


@torch.no_grad()
def ordinary(model: PreTrainedModel, config: Any) -> nn.Module | str:
    """Return the ordinary model of a configuration with the weights of `model`; why they are not its own, if so."""
    kind: Any = getattr(type(model), "uncut_class", type(model))
    read = type(config).from_dict(config.to_dict())  # as it is read from a file
    read._attn_implementation = model.config._attn_implementation
    plain: nn.Module = frame(lambda: kind(read))
    mine, theirs = model.state_dict(), plain.state_dict()
    other = next((name for name in (*mine, *theirs) if name not in mine or name not in theirs), None)
    if other is not None:
        return f"{other} is no part of both"
    wrong = next((name for name, value in mine.items() if value.shape != theirs[name].shape), None)
    if wrong is not None:
        return f"{wrong} has shape {tuple(mine[wrong].shape)}, it makes {tuple(theirs[wrong].shape)}"
    plain.load_state_dict(mine, assign=True)
    held = dict(model.named_buffers())
    for name, buffer in plain.named_buffers():
        if name in held:
            buffer.data = buffer.data.to(held[name].device, held[name].dtype)
    return plain


def _compared(model: nn.Module, plain: nn.Module) -> tuple[Any, Outputs] | str:
    """Return inputs for which two models compute the same, and what; else what differs."""
    for example in examples_of(model):
        try:
            expected = outputs_of(model, example)
        except Exception:  # what a model raises for inputs that were made up
            continue
        why = _differing(plain, example, expected)
        return (example, expected) if why is None else why
    return "nothing is known that the model can be called with, so that the two could be compared"


def differing(model: nn.Module, other: nn.Module) -> str | None:
    """Say in what a model does not compute what another one does, on inputs that the first takes."""
    found = _compared(model, other)
    return found if isinstance(found, str) else None


def _differing(model: nn.Module, example: Any, expected: Outputs) -> str | None:
    """Say in what a model does not compute what is expected of it, but for rounding."""
    try:
        found = outputs_of(model, example)
        refuse_unlike(expected, found)
    except Exception as error:  # its own, where sizes do not fit
        return str(error) or type(error).__name__
    precision = next(each.dtype for each in model.parameters() if each.is_floating_point())
    rounding = partial(rounding_of, partial(outputs_of, model, example), outputs=found)
    off = difference(expected, found, rounding, dtype=precision)
    return None if off is None else f"its {off.place} differs by {off.size:.1e} of its largest element"


def _adopt(model: PreTrainedModel, config: Any, plain: nn.Module) -> None:
    """Give a model, and the models in it, another configuration, and the classes that it builds."""
    pairs = dict(zip(map(id, _parts(model.config)), _parts(config), strict=True))
    ordinary_modules = dict(plain.named_modules())
    for path, module in model.named_modules():
        held = vars(module)
        for name, value in held.items():
            if id(value) in pairs:
                held[name] = pairs[id(value)]
        theirs = ordinary_modules[path]
        if getattr(type(module), "uncut_class", None) is type(theirs):
            module.__class__ = type(theirs)
            numbers = {name: value for name, value in vars(theirs).items() if isinstance(value, int | float)}
            for name in [name for name in held if name not in vars(theirs)]:
                del held[name]
            held.update({name: value for name, value in numbers.items() if name != "training"})
