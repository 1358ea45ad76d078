"""Builds models from nested configurations of transformers, timm and upop, with some fields changed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from upop.checkpoints.fitting.meta import meta_model
from upop.checkpoints.libraries.outside import QUANTIZED_HERE
from upop.libraries import is_pretrained
from upop.models import MODELS, kind_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Path = tuple[str, ...]
"""Path of a field: the names of the nested parts that hold it, and its own name."""
Change = Mapping[Path, Any]
_RECORD = "quantization_config"


@dataclass(frozen=True)
class Builder:
    """Builds models of one library from settings.

    Attributes:
        settings: of the dense model, as nested mappings.
        build: settings -> model; any exception means that these settings build none.
        check: raises for invalid settings, without building a model.
        by: the name of the configuration, for messages.
        more: valid fields that `settings` does not list.
        architecture: timm's name of the model; empty for other libraries.
    """

    settings: Mapping[str, Any]
    build: Callable[[Mapping[str, Any]], nn.Module]
    check: Callable[[Mapping[str, Any]], Any]
    by: str
    more: tuple[str, ...] = ()
    architecture: str = ""

    def meta_model(self, change: Change) -> nn.Module | None:
        """Return the model of changed settings on the meta device; None if they build none."""
        try:
            return meta_model(lambda: self.build(changed(self.settings, change)))
        except Exception:  # constructors raise what they like
            return None

    def takes(self, change: Change) -> bool:
        """Whether the changed settings are valid."""
        try:
            self.check(changed(self.settings, change))
        except Exception:  # as above
            return False
        return True


def changed(settings: Mapping[str, Any], change: Change) -> dict[str, Any]:
    """Return a copy of nested settings with some fields set."""
    result = copy.deepcopy(dict(settings))
    for path, value in change.items():
        place = result
        for part in path[:-1]:
            place = place[part]
        place[path[-1]] = value
    return result


def of_transformers(model: PreTrainedModel) -> Builder:
    """Return the builder of models of this class of transformers."""
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
    """Return the builder of a timm model.

    Args:
        name: the name of the architecture.
        arguments: arguments of `timm.create_model` for the dense model.
    """

    import timm

    def build(settings: Mapping[str, Any]) -> nn.Module:
        given = {argument: value for argument, value in settings.items() if value is not None}
        built: nn.Module = timm.create_model(name, pretrained=False, **given)
        return built

    return Builder(
        arguments,
        build,
        lambda _settings: None,
        f"timm.create_model({name!r})",
        ("mlp_ratio", "attn_head_dim", "depth"),
        name,
    )


def builder_of(model: nn.Module) -> Builder | None:
    """Return the builder of a dense model; None if its library does not build it from settings."""
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
    from upop.checkpoints.libraries import timm_models

    described = timm_models.named(model, None)
    return None if described is None else of_timm(*described)


def nodes(settings: Mapping[str, Any], path: Path = ()) -> Iterator[tuple[Path, Mapping[str, Any]]]:
    """Yield the nested parts of settings, innermost first: a model within a model has a part of its own."""
    for name, value in settings.items():
        if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
            yield from nodes(value, (*path, name))
    yield path, settings


def with_fields(config: Any, change: Change) -> Any:
    """Set fields of a configuration in place, and return it."""
    for path, value in change.items():
        place = config
        for part in path[:-1]:
            place = place[part] if isinstance(place, Mapping) else getattr(place, part)
        if isinstance(place, dict):
            place[path[-1]] = value
        else:
            setattr(place, path[-1], value)
    return config


def without_record(config: Any) -> Any:
    """Return a copy of a configuration without the record of a cut."""
    fresh = copy.deepcopy(config)
    for part in configs_in(fresh):
        record = getattr(part, _RECORD, None)
        if record is not None and _method(record) == QUANTIZED_HERE:
            delattr(part, _RECORD)
    return fresh


def _method(record: Any) -> Any:
    described = record if isinstance(record, Mapping) else record.to_dict()
    return described.get("quant_method")


def configs_in(config: Any) -> list[Any]:
    """Return a configuration of transformers and those nested in it."""
    inside = [value for value in vars(config).values() if hasattr(value, "model_type") and hasattr(value, "to_dict")]
    return [config, *(part for value in inside for part in configs_in(value))]
