"""Groups as JSON: plans carry them, so that a cut needs no tracing. JSON is validated as untrusted input."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, fields
from typing import Any, TypeVar, get_args

from torch import nn

from upop.pruning.file_keys import GROUP, current
from upop.pruning.groups import (
    Attribute,
    Channel,
    Group,
    Kind,
    Slice,
    Swap,
    Swapped,
    has_number,
    number_of,
    tensor_of,
)

T = TypeVar("T", Slice, Attribute)

_MODALITIES = ("vision", "text", "other")
_MOST = 2**14
"""Slices, attributes or classes of one group."""
_LARGEST = 2**40
_NAME = re.compile(r"([^\W\d]\w*)(\[[^\[\]]{1,100}\]){0,3}")
"""An attribute, or a place in a list or mapping that it holds."""
_PLACE = r"(\.\d{1,3}){2}\.\d{1,12}"
_WIDTH = re.compile(
    rf"cut_widths\[((part|(view|expand){_PLACE}){_PLACE}|piece{_PLACE}(\.\d{{1,3}}){{2}})(#\d{{1,4}})?\]"
)
"""A stored width of a narrow module (`axes.narrow`)."""
_OF_MODULES = frozenset(dir(nn.Module()))
"""Attributes that every module has, which are never sizes."""


def as_json(group: Group) -> dict[str, Any] | None:
    """Return a group as JSON values; None if a swapped class has no name."""
    if any(not swap.how for swap in group.swaps):
        return None
    content = {field.name: getattr(group, field.name) for field in fields(group)}
    content["slices"] = [_without_defaults(part) for part in group.slices]
    content["attributes"] = [_without_defaults(part) for part in group.attributes]
    content["swaps"] = [{"module": swap.module, "how": swap.how} for swap in group.swaps]
    content["norms"] = list(group.norms)
    return content if group.norms else {name: value for name, value in content.items() if name != "norms"}


def renamed(content: Mapping[str, Any], change: Callable[[str], str | None]) -> dict[str, Any]:
    """Return the JSON of a group, as `as_json` writes it, with other names of modules and tensors.

    Args:
        content: the JSON.
        change: a name -> the other one; None for what is no part of the group any more.
    """

    def moved(field: str, key: str) -> list[dict[str, Any]]:
        parts = ((part, change(part[key])) for part in content[field])
        return [{**part, key: new} for part, new in parts if new is not None]

    norms = [new for norm in content.get("norms", ()) if (new := change(norm)) is not None]
    return {
        **content,
        "name": change(content["name"]) or content["name"],
        "slices": moved("slices", "tensor"),
        **{field: moved(field, "module") for field in ("attributes", "swaps")},
        **({"norms": norms} if "norms" in content else {}),
    }


def from_json(content: Any, model: nn.Module, swaps: Mapping[str, Swapped]) -> Group:
    """Read a group from the output of `as_json`, validated against a model.

    Names can only refer to tensors of the model and stored numbers of its modules; the work is bounded by the lengths
    of the tensors.

    Args:
        content: JSON values, untrusted.
        model: its tensors are cut.
        swaps: name -> function that derives the class from a module's class.

    Raises:
        ValueError: it is no group of the model; the message says why.
    """
    values = _fields_of(Group, current(content, GROUP))
    _one_of("kind", values["kind"], get_args(Kind))
    _one_of("channel", values.get("channel", "dimension"), get_args(Channel))
    _one_of("modality", values["modality"], _MODALITIES)
    name = values["name"] if values["name"] == "" else _text("name", values["name"])  # "" is the model itself
    _whole("size", values["size"], 1)
    _whole("heads", values["heads"], 0)
    made = {
        "slices": tuple(_slice(each, model) for each in _listed("slices", values["slices"], 1)),
        "attributes": tuple(_attribute(each, model) for each in _listed("attributes", values.get("attributes", []))),
        "swaps": tuple(_swap(each, model, swaps) for each in _listed("swaps", values.get("swaps", []))),
        "norms": tuple(_norm(each, model) for each in _listed("norms", values.get("norms", []))),
    }
    group = Group(**{**values, **made, "name": name, "proved": values.get("proved") is True})
    if not group.producers:
        raise ValueError(f"{name} has no tensor that makes it")
    described = {each.module for each in group.attributes if _WIDTH.fullmatch(each.name)}
    untold = [swap.module for swap in group.swaps if swap.how == "widths" and swap.module not in described]
    if untold:
        raise ValueError(f"{untold[0]} is to be told the width of {name}, and no width is there")
    return group


def _slice(content: Any, model: nn.Module) -> Slice:
    part = _record(Slice, content)
    shape = _tensor(model, _text("tensor", part.tensor))
    _whole("dim", part.dim, 0, len(shape) - 1)
    length = shape[part.dim]
    most = length or _MOST  # a copy of a model of which a branch went tells nothing
    _whole("outer", part.outer, 1, most)
    inners = part.inner if isinstance(part.inner, tuple) else (part.inner,)
    for inner in inners:
        _whole("inner", inner, 1, most)
    for gap in part.gaps:
        _whole("gaps", gap, 0, length)
    for place in (*part.silent, *part.queries):
        _whole("silent and queries", place, 0, part.outer - 1)
    _whole("query_groups", part.query_groups, -part.outer, part.outer)
    if isinstance(part.inner, tuple) and len(part.inner) != part.outer:
        raise ValueError(f"{part.tensor} has {part.outer} groups and {len(part.inner)} numbers of rows for them")
    if part.gaps and len(part.gaps) != part.outer + 1:
        raise ValueError(f"{part.tensor} has {part.outer} groups and {len(part.gaps)} gaps around them")
    if any(not isinstance(flag, bool) for flag in (part.produces, part.follows, part.direct, part.reads)):
        raise ValueError(f"{part.tensor} should say true or false of what it does")
    if isinstance(part.power, bool) or not isinstance(part.power, int | float) or not 0 <= part.power <= 2:
        raise ValueError(f"the power of {part.tensor} should be a number from 0 to 2, found {part.power!r}")
    return part


def _attribute(content: Any, model: nn.Module) -> Attribute:
    part = _record(Attribute, content)
    name, module = _text("name", part.name), _module(model, part.module)
    if part.factor is not None:
        _whole("factor", part.factor, 1)
    _whole("width", part.width, 1)
    if _WIDTH.fullmatch(name):
        return part
    found = _NAME.fullmatch(name)
    if found is None or found[1] in _OF_MODULES or found[1] == "cut_widths":
        raise ValueError(f"{name!r} is no name of a number that a module keeps")
    if not has_number(module, name):
        return part  # nothing is set where nothing is
    try:
        held = number_of(module, name)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{part.module} keeps nothing under {name!r}") from error
    if isinstance(held, bool) or not isinstance(held, int | float):
        raise ValueError(f"{part.module} keeps no number under {name!r}")
    return part


def _swap(content: Any, model: nn.Module, swaps: Mapping[str, Swapped]) -> Swap:
    values = _mapping("swaps", content)
    how, path = _text("how", values.get("how")), values.get("module")
    if set(values) != {"how", "module"} or how not in swaps:
        raise ValueError(f"{how!r} is no class that a module takes on; this upop knows {', '.join(sorted(swaps))}")
    kind = type(_module(model, path))
    return Swap(str(path), swaps[how](kind.__dict__.get("uncut_class", kind)), how)


def _norm(path: Any, model: nn.Module) -> str:
    if any(True for _ in _module(model, path).children()):
        raise ValueError(f"{path} holds other modules and is no norm")
    return str(path)


def _record(kind: type[T], content: Any) -> T:
    values = _fields_of(kind, content)
    tuples = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
    for field in ("gaps", "silent", "queries"):
        if field in values and field not in tuples:
            raise ValueError(f"{field} should be a list, found {values[field]!r}")
    return kind(**{**values, **tuples})


def _fields_of(kind: type[Any], content: Any) -> Mapping[str, Any]:
    values = _mapping(kind.__name__, content)
    known = {each.name: each.default is MISSING for each in fields(kind)}
    unknown = [str(name) for name in values if name not in known]
    if unknown:
        raise ValueError(f"a {kind.__name__} has no {unknown[0][:100]!r}. Did a later upop write it? Update upop")
    missing = [name for name, needed in known.items() if needed and name not in values]
    if missing:
        raise ValueError(f"a {kind.__name__} lacks {missing[0]!r}")
    return values


def _mapping(name: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} should be an object, found {str(value)[:100]!r}")
    return value


def _listed(name: str, value: Any, least: int = 0) -> Sequence[Any]:
    if not isinstance(value, list | tuple) or not least <= len(value) <= _MOST:
        raise ValueError(f"{name} should be a list of {least} to {_MOST} objects")
    return value


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= 1000 or not value.isprintable():
        raise ValueError(f"{name} should be a name, found {str(value)[:100]!r}")
    return value


def _one_of(name: str, value: Any, known: Iterable[str]) -> None:
    if value not in tuple(known):
        raise ValueError(f"{name} should be one of {', '.join(known)}, found {str(value)[:100]!r}")


def _whole(name: str, value: Any, least: int, most: int = _LARGEST) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ValueError(f"{name} should be a whole number from {least} to {most}, found {str(value)[:100]}")


def _module(model: nn.Module, path: Any) -> nn.Module:
    try:
        return model.get_submodule(path if path == "" else _text("module", path))
    except AttributeError as error:
        raise ValueError(f"{type(model).__name__} has no module {path!r}") from error


def _tensor(model: nn.Module, name: str) -> Sequence[int]:
    try:
        shape = tensor_of(model, name).shape
    except AttributeError as error:
        raise ValueError(f"{type(model).__name__} has no tensor {name}") from error
    if not len(shape):
        raise ValueError(f"{name} of {type(model).__name__} has no numbers to cut")
    return shape


def _without_defaults(record: Slice | Attribute) -> dict[str, Any]:
    """Return a record as JSON values, without default values."""
    defaults = {each.name: each.default for each in fields(record)}
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in asdict(record).items()
        if value != defaults[name]
    }
