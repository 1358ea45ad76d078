"""The base class of settings and sizes: shared validation, and messages for validation errors."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator

from upop.errors import SettingError

_SHOWN = 100
_LONGEST_SHOWN = 1000
_LARGEST = 2**53  # integers up to here are exact in floating point
_LONGEST, _LONGEST_NAME = 4000, 255  # largest sizes in bytes of a path and of a name in it on Linux


class Checked(BaseModel):
    """Values that users write: frozen, without unknown fields, with finite numbers of a bounded size."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)

    largest: ClassVar[Mapping[str, int]] = {}
    """Largest number per field, if it is not 2^53."""

    @field_validator("*", mode="before")
    @classmethod
    def _meant(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse values that pydantic accepts but nobody means: true for 1, and impossible file names."""
        kinds = _kinds(cls.model_fields[str(info.field_name)].annotation)
        if isinstance(value, bool) and kinds & {int, float} and bool not in kinds:
            raise ValueError("Input should be a number, and true and false are none")
        if isinstance(value, bytes):
            raise ValueError("Input should be a text")
        for text in value if isinstance(value, list | tuple) else [value]:
            if isinstance(text, str | Path):
                _check_text(str(text))
        return value

    @field_validator("*", mode="after")
    @classmethod
    def _not_too_large(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse numbers beyond the largest one."""
        largest = cls.largest.get(str(info.field_name), _LARGEST)
        if isinstance(value, int | float) and abs(value) > largest:
            raise ValueError(f"Input should be at most {largest}")
        return value


@contextmanager
def described(what: str) -> Iterator[None]:
    """Turn validation errors of pydantic into a SettingError that begins with `what`."""
    try:
        yield
    except ValidationError as error:
        raise SettingError(f"{what}:\n  " + "\n  ".join(problems(error))) from error


def problems(error: ValidationError, source: Callable[[str], str | None] | None = None) -> list[str]:
    """Return one line per invalid value: the field, the expected value, and the found one.

    Args:
        error: an error of pydantic.
        source: field -> origin of its value ("from --seed", "the default") to add to the lines; None if it is no field.
    """
    lines = []
    for part in error.errors():
        message = part["msg"].removeprefix("Value error, ")
        if part["loc"]:
            shown = "nothing" if part["type"] == "missing" else shortened(part["input"])
            place = source(str(part["loc"][0])) if source is not None else None
            described = f", {place}" if place else ""
            lines.append(f"{_cut('.'.join(map(str, part['loc'])))}: {_cut(message)}; found {shown}{described}")
        else:  # a contradiction, which names its fields
            named = dict.fromkeys(re.findall(r"\w+", message))
            places = {name: source(name) for name in named} if source is not None else {}
            described = "; ".join(f"{name}: {place}" for name, place in places.items() if place)
            lines.append(_cut(message) + (f" ({described})" if described else ""))
    return lines


def _cut(text: str) -> str:
    """Shorten a text: names may come from files, and have any length."""
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}..."


def shortened(value: Any) -> str:
    """Return the representation of a value, shortened for messages."""
    try:
        text = repr(value)
    except ValueError:  # of a number with thousands of digits
        return f"a very large {type(value).__name__}"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _kinds(annotation: Any) -> set[Any]:
    """Return the types that an annotation names: {int, None} of `int | None`."""
    parts = get_args(annotation)
    return set().union(*(_kinds(part) for part in parts)) if parts else {annotation}


def _check_text(text: str) -> None:
    if "\0" in text:
        raise ValueError("Input should have no null bytes")
    try:
        encoded = os.fsencode(text)
    except UnicodeEncodeError:
        raise ValueError("Input should have no halves of characters") from None
    if len(encoded) > _LONGEST or max(map(len, encoded.split(b"/"))) > _LONGEST_NAME:
        raise ValueError(f"Input should have at most {_LONGEST} bytes, and {_LONGEST_NAME} between slashes")
