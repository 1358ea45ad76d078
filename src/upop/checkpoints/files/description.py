"""The schema of `upop.json`, which `save` writes beside the weights."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, Field, ValidationError

from upop.errors import CheckpointError
from upop.pruning.file_keys import FOLDER, VERSION, current, is_readable
from upop.reading import read_object
from upop.sources import file_digest
from upop.values import Checked, problems, shortened

_PRINTED = r"^[^\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]{1,1000}$"
"""Text without control characters."""

FILE = "upop.json"
WEIGHTS = "model.safetensors"
FORMAT = VERSION
MOST_LAYERS = 2**12
"""Largest number of layers that a description may ask for."""


class Read(Checked):
    """Strict validation of JSON values; fields that a later upop adds are ignored."""

    model_config = ConfigDict(strict=True, extra="ignore", populate_by_name=True)


class GroupLayout(Read):
    """The kept size of a group: `channels` in `heads` heads, `of` the dense size."""

    kind: str
    modality: str | None = None
    heads: int | None = None
    channels: int = Field(ge=0)
    of: int | None = Field(None, ge=1)


class Description(Read):
    """A saved model: how to build it, its kept sizes, and its plan."""

    format: int
    model: str | None
    kind: str = Field(alias="class", pattern=_PRINTED)
    config: dict[str, Any] | None
    plan: dict[str, Any] | None
    # Folders of upop 0.1.0 do not have these.
    transformers: bool | None = None
    timm: dict[str, Any] | None = None
    open_clip: dict[str, Any] | None = None
    layout: dict[str, GroupLayout] | None = None
    versions: dict[str, str] | None = None
    weights: dict[str, str] | None = None
    preparation: dict[str, Any] | None = None
    groups: dict[str, dict[str, Any]] | None = None
    tokens: list[list[int]] | None = None
    vocabulary: list[int] | None = None


def read_description(folder: Path) -> Description:
    """Read and validate `upop.json`.

    Raises:
        CheckpointError: it is missing, damaged, or written by a later upop.
    """
    content = read_content(folder)
    with read_from(str(folder / FILE)):
        return Description.model_validate(content)


def read_content(folder: Path) -> dict[str, Any]:
    """Read `upop.json` of any version, under today's keys.

    Raises:
        CheckpointError: it is missing, damaged, or written by a later upop.
    """
    path = folder / FILE
    if not path.is_file():
        raise CheckpointError(
            f"{folder} is no folder of upop: {_found(folder)}. Give a folder that upop.save wrote (a run keeps one "
            "under best/)."
        )
    content = read_object(path, CheckpointError, "Write the model again.", nan=True)
    if not is_readable(content.get("format")):
        raise CheckpointError(
            f"{path} has format {shortened(content.get('format'))}; this upop reads 1 to {FORMAT}. Update upop."
        )
    return dict(current(content, FOLDER))


@contextmanager
def read_from(source: str, part: str = "") -> Iterator[None]:
    """Turn validation errors of pydantic for a file, or a part of it, into a CheckpointError."""
    try:
        yield
    except ValidationError as error:
        lines = [f"{part}.{line}" if part else line for line in problems(error)]
        raise CheckpointError(f"{source} is damaged. Write the model again.\n  " + "\n  ".join(lines[:8])) from error


def digests(folder: Path) -> dict[str, str]:
    """Return file name -> SHA-256 for the weight files of a folder."""
    return {path.name: file_digest(path) for path in sorted(folder.glob("*.safetensors")) if path.is_file()}


def check_digests(folder: Path, description: Description, *, strict: bool = True) -> None:
    """Compare the weight files with their stored digests, which folders of older versions lack.

    Raises:
        CheckpointError: they differ; a warning with `strict=False`.
    """
    if description.weights is None:
        return
    found = digests(folder)
    absent = next((name for name in description.weights if name not in found), None)
    if absent is not None and strict:
        raise CheckpointError(f"{folder} lacks {shortened(absent)}, a part of its weights. Copy or write it again.")
    changed = [name for name, digest in description.weights.items() if found.get(name) != digest]
    if changed:
        message = (
            f"{folder / changed[0]} is not the file that was saved: {FILE} has another SHA-256 digest for it. Was it "
            "damaged, or replaced? Copy or write the model again; strict=False loads it all the same."
        )
        if strict:
            raise CheckpointError(message)
        warnings.warn(message, stacklevel=3)


def is_folder(path: Path) -> bool:
    """Whether `path` is a folder that `save` wrote."""
    return (path / FILE).is_file()


def _found(folder: Path) -> str:
    if not folder.exists():
        return "nothing was found there"
    return f"it holds no {FILE}" if folder.is_dir() else "it is a file"
