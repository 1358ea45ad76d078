"""Describes a timm model by the name and arguments with which `timm.create_model` builds its dense form."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import timm
from pydantic import ConfigDict, Field
from torch import nn

from upop.checkpoints.files.description import MOST_LAYERS, Read, read_from
from upop.checkpoints.fitting.likeness import same_but_for_sizes
from upop.checkpoints.fitting.meta import meta_model
from upop.checkpoints.libraries.outside import is_timm_name, sealed
from upop.errors import CheckpointError, nearest
from upop.pruning import Plan
from upop.pruning.known import know_as, remembered
from upop.pruning.width import streams_among
from upop.values import shortened

# Argument of create_model -> how to read it from a model. Models that store it elsewhere keep the default.
_ARGUMENTS: Mapping[str, Callable[[Any], Any]] = {
    "num_classes": lambda model: model.num_classes,
    "in_chans": lambda model: model.patch_embed.proj.in_channels,
    "img_size": lambda model: list(model.patch_embed.img_size),
    "patch_size": lambda model: model.patch_embed.patch_size[0],
    "embed_dim": lambda model: model.embed_dim,
    "depth": lambda model: len(model.blocks),
    "num_heads": lambda model: model.blocks[0].attn.num_heads,
    "mlp_ratio": lambda model: (model.blocks[0].mlp.fc1.out_features + 0.5) / model.embed_dim,  # timm rounds down
    "qkv_bias": lambda model: model.blocks[0].attn.qkv.bias is not None,
    "init_values": lambda model: model.blocks[0].ls1.init_values,
    "reg_tokens": lambda model: 0 if model.reg_token is None else model.reg_token.shape[1],
    "class_token": lambda model: model.has_class_token,
    "global_pool": lambda model: getattr(model.global_pool, "pool_type", model.global_pool),
    "fc_norm": lambda model: isinstance(model.fc_norm, nn.LayerNorm),
    "dynamic_img_size": lambda model: model.dynamic_img_size,
    "drop_path_rate": lambda model: round(getattr(model.blocks[-1].drop_path1, "drop_prob", 0.0), 6),
}


def describe(model: nn.Module, plan: Plan | None) -> dict[str, Any] | None:
    """Return the name and arguments with which `timm.create_model` builds the dense form of a model.

    Args:
        model: any model, dense or compressed.
        plan: its plan, if known.

    Returns:
        None for a model that was not built by name, or whose arguments cannot be inferred: the model that they build
        is compared with it, module by module.
    """
    described = named(model, plan)
    if described is None:
        return None
    name, arguments = described
    built = _build(name, arguments)
    if built is not None and streams_among(found.groups if (found := remembered(model)) is not None else ()):
        know_as(built, model)
    if built is None or not same_but_for_sizes(model, built):
        return None
    return {"architecture": name, "arguments": arguments}


def named(model: nn.Module, plan: Plan | None) -> tuple[str, dict[str, Any]] | None:
    """Return the name of a timm model and the inferred arguments of its dense form; None for other models."""
    settings = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    name = settings.get("architecture") if isinstance(settings, Mapping) else getattr(settings, "architecture", None)
    if not isinstance(name, str) or not timm.is_model(name) or type(model).__module__.partition(".")[0] != "timm":
        return None
    reference = _build(name, {})
    if type(model) is not type(reference):  # a backbone (features_only), for example, has other names
        return None
    arguments = {}
    for argument, read in _ARGUMENTS.items():
        mine, usual = (_read(read, each) for each in (model, reference))
        if mine != usual:
            arguments[argument] = mine
    heads = _dense_heads(None if plan is None else plan.slices)
    if heads is not None and heads != _read(_ARGUMENTS["num_heads"], reference):
        arguments["num_heads"] = heads
    elif heads is not None:
        arguments.pop("num_heads", None)
    if "mlp_ratio" in arguments:
        # The hidden size of a compressed model is not the dense one; any that is large enough will do.
        hidden = max(_hidden_sizes(model, plan), default=0)
        usual = max(_hidden_sizes(reference, None), default=0)
        if hidden <= usual and "embed_dim" not in arguments:
            del arguments["mlp_ratio"]
        else:
            arguments["mlp_ratio"] = (hidden + 0.5) / _read(_ARGUMENTS["embed_dim"], model)
    return name, arguments


def hub_config(model: nn.Module, name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return timm's config.json, which `timm.create_model("local-dir:FOLDER", pretrained=True)` reads.

    Args:
        model: the model that the arguments build.
        name: the name of the architecture.
        arguments: arguments of `timm.create_model`.
    """
    settings: Any = model.pretrained_cfg
    described = dict(settings if isinstance(settings, Mapping) else settings.to_dict())
    plain = {
        key: value for key, value in described.items() if isinstance(value, bool | int | float | str | list | tuple)
    }
    of_source = (
        "architecture",
        "url",
        "file",
        "hf_hub_id",
        "hf_hub_filename",
        "source",
        "label_offset",
        "test_input_size",
    )
    kept = {key: value for key, value in plain.items() if key not in of_source}
    size = _read(_ARGUMENTS["img_size"], model)
    channels = _read(_ARGUMENTS["in_chans"], model)
    if size and channels:
        kept["input_size"] = [channels, *size]
    classes = int(cast(Any, model).num_classes)
    return {
        "architecture": name,
        "num_classes": classes,
        "num_features": cast(Any, model).num_features,
        "model_args": dict(arguments),
        "pretrained_cfg": {**kept, "num_classes": classes, "custom_load": False},
    }


class _Arguments(Read):
    """The arguments that `describe` writes and `build` passes to timm: sizes and switches of the class alone."""

    model_config = ConfigDict(extra="forbid")

    num_classes: int | None = Field(None, ge=0)
    in_chans: int | None = Field(None, ge=1)
    img_size: int | list[int] | None = None
    patch_size: int | list[int] | None = None
    embed_dim: int | None = Field(None, ge=1)
    depth: int | None = Field(None, ge=1, le=MOST_LAYERS)
    num_heads: int | None = Field(None, ge=1)
    mlp_ratio: float | None = Field(None, gt=0)
    qkv_bias: bool | None = None
    init_values: float | None = None
    reg_tokens: int | None = Field(None, ge=0)
    class_token: bool | None = None
    global_pool: str | None = Field(None, pattern=r"^\w*$")
    fc_norm: bool | None = None
    dynamic_img_size: bool | None = None
    drop_path_rate: float | None = Field(None, ge=0, le=1)


class _Described(Read):
    architecture: str
    arguments: dict[str, Any] = Field(default_factory=dict)


def build(description: Mapping[str, Any], source: str, groups: Any = None) -> nn.Module:
    """Return the dense model of a description by `describe`, with initial weights.

    Args:
        description: of the model.
        source: of the description, for messages.
        groups: group -> its JSON form in the dense model, if known. Older descriptions have the heads that were left.

    Raises:
        CheckpointError: the installed timm has no such model, or rejects its arguments.
    """
    with read_from(source, "timm"):
        described = _Described.model_validate(description)
    name = checked_name(described.architecture, source)
    unknown = [argument for argument in described.arguments if argument not in _ARGUMENTS]
    if unknown:
        raise CheckpointError(
            f"{source} asks for {name} with {unknown[0]}={shortened(described.arguments[unknown[0]])}, which upop does "
            "not set. Was it written by a later upop? Update upop."
        )
    arguments = checked_arguments(described.arguments, source, "timm.arguments")
    heads = _dense_heads(groups)
    arguments |= {} if heads is None or "num_heads" not in arguments else {"num_heads": heads}
    try:
        with sealed():
            model: nn.Module = timm.create_model(name, pretrained=False, **arguments)
    except Exception as error:  # each model checks its arguments in its own way
        raise CheckpointError(
            f"{source}: timm cannot build {name} with {arguments}: {error or type(error).__name__}."
        ) from error
    return model


def checked_name(name: Any, source: str) -> str:
    """Return a model name from a file; CheckpointError if the installed timm has no such model."""
    if not isinstance(name, str) or not is_timm_name(name):
        raise CheckpointError(
            f"{source} holds timm's {shortened(name)}, which timm {timm.__version__} does not have"
            f"{nearest(str(name), timm.list_models())}. Update timm, or build the dense model and call "
            "upop.load_into(model, folder)."
        )
    return name


def checked_arguments(arguments: Any, source: str, part: str) -> dict[str, Any]:
    """Return those arguments from a file that `build` passes to timm.

    Raises:
        CheckpointError: they are no mapping, or a value has the wrong type.
    """
    if not isinstance(arguments, Mapping):
        raise CheckpointError(f"{source} is damaged: {part} should be an object, found {shortened(arguments)}.")
    known = {name: value for name, value in arguments.items() if name in _ARGUMENTS}
    with read_from(source, part):
        return _Arguments.model_validate(known).model_dump(exclude_unset=True)


def usual(name: str, argument: str) -> Any:
    """Return timm's default of an argument for a model; None if unknown."""
    reference = _build(name, {})
    return None if reference is None or argument not in _ARGUMENTS else _read(_ARGUMENTS[argument], reference)


def drop_path_rate(model: nn.Module) -> float | None:
    """Return the drop path rate of the last block of a timm model; None if it has none."""
    rate = _read(_ARGUMENTS["drop_path_rate"], model)
    return None if rate is None else float(rate)


def _read(read: Callable[[Any], Any], model: nn.Module) -> Any:
    try:
        return read(model)
    except (AttributeError, IndexError, TypeError, KeyError):
        return None


def _build(name: str, arguments: Mapping[str, Any]) -> Any:
    try:
        return meta_model(lambda: timm.create_model(name, pretrained=False, **arguments))
    except Exception:  # each model checks its arguments in its own way
        return None


def _dense_heads(groups: Any) -> int | None:
    """Return the heads of a dense model by its groups in JSON form; None where they do not say it."""
    for group in groups.values() if isinstance(groups, Mapping) else ():
        try:
            [factor] = [each.get("factor", 1) for each in group["attributes"] if each["name"] == "num_heads"]
            return int(factor * group["size"])
        except (AttributeError, KeyError, TypeError, ValueError):  # no heads, or damaged, which is said later
            continue
    return None


def _hidden_sizes(model: Any, plan: Plan | None) -> list[int]:
    planned = [size for name, size in plan.sizes.items() if name.endswith("mlp")] if plan is not None else []
    return planned + [block.mlp.fc1.out_features for block in model.blocks]
