"""Shared by the annotation parsers: samples with validated fields, and checks of images.

All samples are validated before any long work. Errors name the file, the sample (counted from 0, as in a JSON list),
the field, the value found, and what to do.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from upop.data.images import Bounds
from upop.errors import DataError, nearest
from upop.pruning.errors import some_of
from upop.reading import LARGEST_DATA, parse_json, read_text, reason

_SHOWN = 60
_LONGEST_NAME = 300
Samples = TypeVar("Samples")


class Placed(Protocol):
    """Anything with a position in a file."""

    def error(self, problem: str) -> DataError:
        """Return a DataError about a problem at this position."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One sample of an annotation file: its fields and its position."""

    file: Path
    number: int
    fields: dict[str, Any]

    def error(self, problem: str) -> DataError:
        """Return a DataError about a problem of this sample."""
        return DataError(f"{self.file}, sample {self.number}: {problem}")

    def get(self, name: str) -> Any:
        """Return a field; DataError if it is missing."""
        if name not in self.fields:
            known = [key for key in self.fields if isinstance(key, str)]
            found = f"it has {some_of([_named(key) for key in known])}" if known else "it is empty"
            near = nearest(name, [key for key in known if len(key) <= _LONGEST_NAME])
            raise self.error(f"the field {name!r} is missing{near}; {found}.")
        return self.fields[name]

    def text(self, name: str) -> str:
        """Return a field that must be a non-empty text."""
        value = self.get(name)
        if not is_text(value):
            raise self.error(f"{name!r} must be a non-empty text{_half(value)}, not {shown(value)}.")
        return str(value)

    def texts(self, name: str, count: int | None = None) -> list[str]:
        """Return a field that must be a list of non-empty texts, of any positive length or of exactly `count`."""
        value = self.get(name)
        number = "some" if count is None else str(count)
        if not isinstance(value, list) or not value or (count is not None and len(value) != count):
            raise self.error(f"{name!r} must be a list of {number} texts, not {shown(value)}.")
        for text in value:
            if not is_text(text):
                raise self.error(f"{name!r} must be a list of {number} texts{_half(text)}, but holds {shown(text)}.")
        return value

    def one_of(self, name: str, choices: tuple[str, ...]) -> int:
        """Return the index of the field's text among the choices."""
        value = self.get(name)
        if not isinstance(value, str) or value not in choices:
            wanted = " or ".join(f'"{choice}"' for choice in choices)
            hint = nearest(value, choices) if isinstance(value, str) else ""
            raise self.error(f"{name!r} must be the text {wanted}, not {shown(value)}{hint}.")
        return choices.index(value)


def is_text(value: object) -> bool:
    """Whether a value is a non-empty text without lone surrogates."""
    return isinstance(value, str) and bool(value.strip()) and not _half(value)


def _half(value: object) -> str:
    """Describe a lone surrogate (JSON's "\\ud800"), which no tokenizer accepts."""
    if isinstance(value, str) and not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            return " without lone surrogates"
    return ""


def _named(name: str) -> str:
    """Quote a name for a message, truncated."""
    return repr(name) if len(name) <= _LONGEST_NAME else f"{name[:_LONGEST_NAME]!r}..."


def shown(value: object) -> str:
    """Format a value as JSON for a message, truncated."""
    text = json.dumps(value, default=repr)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def read_samples(file: str | Path) -> list[Sample]:
    """Read an annotation file: a non-empty JSON list of objects.

    Raises:
        DataError: it is missing, or anything else.
    """
    file = Path(file)
    try:
        text = read_text(file, LARGEST_DATA)
    except FileNotFoundError:
        raise DataError(
            f"The annotation file {file} does not exist{_near(file)}. Check the folder of annotations."
        ) from None
    except (OSError, ValueError) as error:
        raise DataError(f"The annotation file {file} cannot be read: {reason(error)}.") from error
    try:
        values = parse_json(text)
    except ValueError as error:
        lines = str(error).startswith("Extra data")
        advice = "Put its lines into one list: [..., ...]." if lines else "It may be truncated."
        raise DataError(f"The annotation file {file} is not JSON: {error}. {advice}") from error
    if not isinstance(values, list):
        raise DataError(f"The annotation file {file} must hold a list of samples, not {shown(values)}.")
    if not values:
        raise DataError(f"The annotation file {file} holds no samples.")
    samples = []
    for number, fields in enumerate(values):
        if not isinstance(fields, dict):
            raise DataError(f"{file}, sample {number}: must be an object with named fields, not {shown(fields)}.")
        samples.append(Sample(file, number, fields))
    return samples


def _near(file: Path) -> str:
    try:
        return nearest(file.name, [path.name for path in file.parent.iterdir()])
    except OSError:
        return f", nor does the folder {file.parent}" if not file.parent.exists() else ""


def check_images(root: str | Path, images: Iterable[tuple[Placed, str]], *, outside: bool = False) -> None:
    """Check that every image is a file under `root`.

    Each folder is listed once, which is far faster than a check of every file.

    Args:
        root: the folder that image paths are relative to.
        images: samples and image paths.
        outside: whether images may lie outside of `root`: by absolute paths, by "..", or by links.

    Raises:
        DataError: names the first missing image and counts them all.
    """
    root = Path(root)
    bounds = Bounds(root, outside=outside)
    listings: dict[str, frozenset[str]] = {}
    wrong: dict[str, tuple[Placed, str]] = {}
    for sample, image in images:
        folder, name = os.path.split(image)
        if folder not in listings:
            listings[folder] = _files_in(root / folder, bounds)
        # A listing is case-sensitive, but the file system may not be, so missing names are checked one by one.
        if name not in listings[folder] and image not in wrong and (problem := _problem(root / image, bounds)):
            wrong[image] = sample, problem
    if not wrong:
        return
    image, (sample, problem) = next(iter(wrong.items()))
    if not root.is_dir():
        raise sample.error(f"the image root {root} is not a folder, so the image {_named(image)} cannot be found.")
    rest = ""
    if len(wrong) > 1:
        missing = all(found == _MISSING for _, found in wrong.values())
        rest = f" {len(wrong)} images of this file are {'missing' if missing else 'not files under it'} in all."
    allowed = "Correct the path, or allow it with --allow-outside (allow_outside: true)."
    advice = allowed if problem.endswith(_OUTSIDE) else "Check the image root."
    raise sample.error(f"the image {_named(image)} {problem} the image root {root}.{rest} {advice}")


_MISSING, _OUTSIDE = "does not exist under", "outside of"


def _files_in(folder: Path, bounds: Bounds) -> frozenset[str]:
    """Return the names of the regular files in a folder, without links; none for a folder outside of the bounds."""
    try:
        if bounds.beyond(folder):
            return frozenset()
        with os.scandir(folder) as entries:
            return frozenset(entry.name for entry in entries if entry.is_file(follow_symlinks=False))
    except (OSError, ValueError):
        return frozenset()


def _problem(path: Path, bounds: Bounds) -> str:
    """Describe why the path of an image is not allowed, to precede "the image root"; "" if it is allowed."""
    try:
        if real := bounds.beyond(path):
            straight = real == os.path.abspath(path)  # noqa: PTH100 - pathlib cannot remove ".."
            return f"lies {_OUTSIDE}" if straight else f"leads to {real}, {_OUTSIDE}"
        if path.is_file():
            return ""
        return "is not a file under" if path.exists() else _MISSING
    except (OSError, ValueError):
        return _MISSING


def narrowed(samples: Samples, numbers: Collection[int], *lists: str) -> Samples:
    """Return a copy of a data set without some samples; `lists` names its attributes with one item per sample."""
    result = copy.copy(samples)
    for name in lists:
        kept = [item for number, item in enumerate(getattr(samples, name)) if number not in numbers]
        setattr(result, name, kept)
    return result
