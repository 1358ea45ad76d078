"""Reads `config.json` of transformers without transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from upop.errors import CheckpointError
from upop.reading import read_object

FILE = "config.json"


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
    # Python writes numbers that JSON does not have, and so does transformers.
    return read_object(folder / FILE, CheckpointError, "Fetch or write it again.", nan=True)
