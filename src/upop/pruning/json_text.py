"""Parses untrusted JSON: within bounds, and strictly by the standard."""

from __future__ import annotations

import json
import math
from typing import Any

DEEPEST = 100
"""Levels of lists and objects within each other that a text may have."""
LONGEST_NUMBER = 300
"""Digits that a whole number may have, in JSON and YAML: floating point takes no more of them."""


def parse_json(text: str, *, nan: bool = False) -> Any:
    """Parse a JSON text.

    Python's own parser accepts more than JSON (NaN, and numbers that overflow), silently keeps the last of equal keys,
    and raises errors of several kinds for deep texts and long numbers.

    Args:
        text: the text.
        nan: whether to accept NaN and Infinity, which Python writes.

    Raises:
        ValueError: it is not JSON, an object repeats a key, or it exceeds the bounds of this module.
    """
    try:
        value = json.loads(
            text,
            object_pairs_hook=_unique,
            parse_constant=float if nan else _refuse_constant,
            parse_int=_whole,
            parse_float=_finite,
        )
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    _check_depth(value)
    return value


_TOO_DEEP = f"it is nested more than {DEEPEST} levels deep"


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names: set[str] = set()
        twice = next(name for name, _ in pairs if name in names or names.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"an object has the key {twice!r} twice")
    return fields


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def _whole(digits: str) -> int:
    if len(digits) > LONGEST_NUMBER:
        raise ValueError(f"a number has {len(digits)} digits, and {LONGEST_NUMBER} are the most")
    return int(digits)


def _finite(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise ValueError(f"the number {digits[:LONGEST_NUMBER]} is too large")
    return value


def _check_depth(value: Any) -> None:
    """Raise a ValueError if lists and objects are nested too deep."""
    level = [value]
    for _ in range(DEEPEST + 1):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return
    raise ValueError(_TOO_DEEP)
