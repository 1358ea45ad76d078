"""Reads `config.json` of transformers without transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from upop.errors import CheckpointError
from upop.reading import read_object

FILE = "config.json"
_FLOAT, _FLOATS = "__float__", ("NaN", "Infinity", "-Infinity")


def is_transformers_folder(path: Path) -> bool:
    """Whether `path` is a folder of transformers: its config.json names a `model_type`."""
    if not (path / FILE).is_file():
        return False
    try:
        return "model_type" in read_config(path)
    except CheckpointError:
        return True  # reading it reports what is wrong


def read_config(folder: Path) -> dict[str, Any]:
    """Read the config.json of a folder.

    Raises:
        CheckpointError: it cannot be read.
    """
    # Python writes numbers that JSON does not have, and so does transformers, from version 5 on under a key.
    found = read_object(folder / FILE, CheckpointError, "Fetch or write it again.", nan=True)
    return {name: _with_floats(value) for name, value in found.items()}


def _with_floats(value: Any) -> Any:
    """Return a value in which {"__float__": "Infinity"} is the number that it stands for."""
    if isinstance(value, dict):
        named = value.get(_FLOAT) if len(value) == 1 else None
        if isinstance(named, str) and named in _FLOATS:
            return float(named)
        return {name: _with_floats(part) for name, part in value.items()}
    return [_with_floats(part) for part in value] if isinstance(value, list) else value
