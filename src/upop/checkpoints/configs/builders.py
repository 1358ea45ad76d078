"""How libraries build a model from a configuration: nested fields, some of which may be changed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from upop.checkpoints.fitting.meta import outline
from upop.checkpoints.libraries.outside import QUANTIZED_HERE
from upop.libraries import is_pretrained
from upop.models import MODELS, kind_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Path = tuple[str, ...]
"""Where a field is: the names of the parts that hold it, and its own."""
Change = Mapping[Path, Any]
_RECORD = "quantization_config"


@dataclass(frozen=True)
class Builder:
    """How a library makes models from settings.

    Attributes:
        settings: of the dense model, as nested mappings.
        build: settings -> the model; whatever it raises says that there is none.
        check: settings -> nothing; it raises for settings that are none, without building a model.
        by: what people call the settings.
        more: fields that the settings may have though they do not show them.
        architecture: the name that it is built by, where it has one.
    """

    settings: Mapping[str, Any]
    build: Callable[[Mapping[str, Any]], nn.Module]
    check: Callable[[Mapping[str, Any]], Any]
    by: str
    more: tuple[str, ...] = ()
    architecture: str = ""

    def outline(self, change: Change) -> nn.Module | None:
        """Return the model of changed settings without memory; None where there is none."""
        try:
            return outline(lambda: self.build(changed(self.settings, change)))
        except Exception:  # constructors raise what they like
            return None

    def takes(self, change: Change) -> bool:
        """Whether the settings may be changed so."""
        try:
            self.check(changed(self.settings, change))
        except Exception:  # as above
            return False
        return True


def changed(settings: Mapping[str, Any], change: Change) -> dict[str, Any]:
    """Return nested settings with some fields set."""
    result = copy.deepcopy(dict(settings))
    for path, value in change.items():
        place = result
        for part in path[:-1]:
            place = place[part]
        place[path[-1]] = value
    return result


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
    from upop.checkpoints.libraries import timm_models

    described = timm_models.named(model, None)
    return None if described is None else of_timm(*described)


def nodes(settings: Mapping[str, Any], path: Path = ()) -> Iterator[tuple[Path, Mapping[str, Any]]]:
    """Yield the parts of nested settings, those inside first: a model in a model has a part of its own."""
    for name, value in settings.items():
        if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
            yield from nodes(value, (*path, name))
    yield path, settings


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


def without_record(config: Any) -> Any:
    """Return a copy of a configuration that says nothing of a cut."""
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
    """Return a configuration of transformers, and those of the models inside its own."""
    inside = [value for value in vars(config).values() if hasattr(value, "model_type") and hasattr(value, "to_dict")]
    return [config, *(part for value in inside for part in configs_in(value))]
