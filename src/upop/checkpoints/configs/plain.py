"""Plain models: if all layers of a tower keep equally many channels, a smaller configuration describes the cut model.

The configuration is found by trial (`size_fields`), and is used only if the model that it builds, with the cut
model's weights, gives the same outputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from upop.checkpoints.configs.builders import changed, configs_in, of_timm, of_transformers, with_fields, without_record
from upop.checkpoints.configs.comparing import compared, differing, differing_from
from upop.checkpoints.configs.size_fields import sized_config
from upop.checkpoints.fitting.fit import kept_sizes
from upop.checkpoints.fitting.meta import empty_model, meta_model
from upop.pruning import Group, find_prunable, uniform
from upop.pruning.known import forget, know_as

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def alike(dense: nn.Module, groups: Sequence[Group], kept: Mapping[str, int]) -> bool:
    """Whether all layers of every tower keep equally many channels, and at least one."""
    sizes = {group.name: kept.get(group.name, group.size) for group in groups}
    return all(sizes.values()) and all(
        len({sizes[name] for name in names}) == 1 for names in uniform.apart(dense, groups)
    )


def become_plain(
    model: PreTrainedModel, dense: nn.Module, groups: Sequence[Group], kept: Mapping[str, int]
) -> str | None:
    """Turn a cut model into an ordinary one of its class with a smaller configuration.

    Parameters stay the same objects. Objects that others may hold, such as the old configuration, are not modified.

    Args:
        model: the cut model.
        dense: the dense model, possibly on the meta device.
        groups: groups of the dense model.
        kept: number of channels that each group keeps.

    Returns:
        None on success; otherwise the reason why not, and the model is unchanged.
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
    found = compared(model, plain)
    if isinstance(found, str):
        return found
    before = {module: (type(module), dict(vars(module))) for module in model.modules()}
    _adopt(model, config, plain)
    example, expected = found
    why = differing_from(model, example, expected)
    if why is not None:
        for module, (kind, held) in before.items():
            module.__class__ = kind
            vars(module).clear()
            vars(module).update(held)
    elif any(group.swaps for group in groups):
        forget(model)  # cutting had changed classes of modules, which now have their own again
    return why


def plain_timm(model: nn.Module, described: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return timm's config.json for a cut model that timm builds by itself; None if it does not.

    Args:
        model: the cut model.
        described: the dense form, as `timm_models.describe` returns it.
    """
    from upop.checkpoints.libraries import timm_models

    name = described["architecture"]
    builder = of_timm(name, described["arguments"])
    dense = meta_model(lambda: builder.build(builder.settings))
    know_as(dense, model)
    groups = find_prunable(dense).groups
    kept = kept_sizes(groups, model.state_dict(), type(model).__name__)
    change = sized_config(dense, groups, kept, builder) if alike(dense, groups, kept) else ""
    if isinstance(change, str):
        return None
    arguments = {key: value for key, value in changed(builder.settings, change).items() if value is not None}
    plain = empty_model(lambda: builder.build(arguments))
    if _shapes_of(plain) != _shapes_of(model):
        return None
    plain.load_state_dict(model.state_dict(), assign=True)
    return timm_models.hub_config(plain, name, arguments) if differing(model, plain) is None else None


def _shapes_of(model: nn.Module) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in model.state_dict().items()}


@torch.no_grad()
def ordinary(model: PreTrainedModel, config: Any) -> nn.Module | str:
    """Return the model that a configuration builds, with the weights of `model`; or the reason why they do not fit."""
    kind: Any = getattr(type(model), "uncut_class", type(model))
    read = type(config).from_dict(config.to_dict())  # as if read from a file
    read._attn_implementation = model.config._attn_implementation
    plain: nn.Module = empty_model(lambda: kind(read))
    mine, theirs = model.state_dict(), plain.state_dict()
    other = next((name for name in (*mine, *theirs) if name not in mine or name not in theirs), None)
    if other is not None:
        return f"only one of the two models has {other}"
    wrong = next((name for name, value in mine.items() if value.shape != theirs[name].shape), None)
    if wrong is not None:
        return f"{wrong} has shape {tuple(mine[wrong].shape)}, it makes {tuple(theirs[wrong].shape)}"
    plain.load_state_dict(mine, assign=True)
    held = dict(model.named_buffers())
    for name, buffer in plain.named_buffers():
        if name in held:
            buffer.data = buffer.data.to(held[name].device, held[name].dtype)
    return plain


def _adopt(model: PreTrainedModel, config: Any, plain: nn.Module) -> None:
    """Replace the configuration of a model and of the models in it, and restore the classes that it builds."""
    pairs = dict(zip(map(id, configs_in(model.config)), configs_in(config), strict=True))
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
