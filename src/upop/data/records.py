"""What all readers of annotation files share: records with checked fields, images that open or say why not.

Everything is checked before any long work starts, and every error names the file, the record (counted from 0,
as in a JSON list), the field, what was found, and what to do.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from upop.errors import BadImageError, DataError, nearest
from upop.reading import LARGEST_DATA, parse_json, read_text, reason

_SHOWN = 60
Records = TypeVar("Records")


@dataclass(frozen=True, slots=True)
class Record:
    """One record of an annotation file: its fields, and where it stands."""

    file: Path
    number: int
    fields: dict[str, Any]

    def error(self, problem: str) -> DataError:
        """The error that this record has the problem."""
        return DataError(f"{self.file}, record {self.number}: {problem}")

    def get(self, name: str) -> Any:
        """The field of that name; DataError where there is none."""
        if name not in self.fields:
            known = [key for key in self.fields if isinstance(key, str)]
            found = f"it has {', '.join(map(repr, known))}" if known else "it is empty"
            raise self.error(f"the field {name!r} is missing{nearest(name, known)}; {found}.")
        return self.fields[name]

    def text(self, name: str) -> str:
        """The field as a text with something in it."""
        value = self.get(name)
        if not is_text(value):
            raise self.error(f"{name!r} must be a text that is not empty{_half(value)}, not {shown(value)}.")
        return str(value)

    def texts(self, name: str, count: int | None = None) -> list[str]:
        """The field as a list of texts that are not empty: of any length from 1, or of exactly `count`."""
        value = self.get(name)
        number = "some" if count is None else str(count)
        if not isinstance(value, list) or not value or (count is not None and len(value) != count):
            raise self.error(f"{name!r} must be a list of {number} texts, not {shown(value)}.")
        for text in value:
            if not is_text(text):
                raise self.error(f"{name!r} must be a list of {number} texts{_half(text)}, but holds {shown(text)}.")
        return value

    def one_of(self, name: str, choices: tuple[str, ...]) -> int:
        """The place of the field's text among the choices."""
        value = self.get(name)
        if not isinstance(value, str) or value not in choices:
            wanted = " or ".join(f'"{choice}"' for choice in choices)
            hint = nearest(value, choices) if isinstance(value, str) else ""
            raise self.error(f"{name!r} must be the text {wanted}, not {shown(value)}{hint}.")
        return choices.index(value)


def is_text(value: object) -> bool:
    """Whether a value is a text with something in it, all of whose characters are whole."""
    return isinstance(value, str) and bool(value.strip()) and not _half(value)


def _half(value: object) -> str:
    """Words about a character of which there is only half (JSON's "\\ud800"), which no tokenizer takes."""
    if isinstance(value, str) and not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            return " and has no halves of characters"
    return ""


def shown(value: object) -> str:
    """A value as JSON, cut to a readable length, for a message."""
    text = json.dumps(value, default=repr)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def read_records(file: str | Path) -> list[Record]:
    """Read an annotation file: a JSON list, not empty, of objects. DataError says what else it is."""
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
        raise DataError(f"The annotation file {file} is not JSON: {error}. It may be cut off.") from error
    if not isinstance(values, list):
        raise DataError(f"The annotation file {file} must hold a list of records, not {shown(values)}.")
    if not values:
        raise DataError(f"The annotation file {file} holds no records.")
    records = []
    for number, fields in enumerate(values):
        if not isinstance(fields, dict):
            raise DataError(f"{file}, record {number}: must be an object with named fields, not {shown(fields)}.")
        records.append(Record(file, number, fields))
    return records


def _near(file: Path) -> str:
    try:
        return nearest(file.name, [path.name for path in file.parent.iterdir()])
    except OSError:
        return f", nor does the folder {file.parent}" if not file.parent.exists() else ""


def check_images(root: str | Path, images: Iterable[tuple[Record, str]]) -> None:
    """Check that every image exists under `root`; DataError names the first missing one and counts them all.

    Folders are listed once each, which is far faster than asking for each image where there are many.
    """
    root = Path(root)
    listings: dict[str, frozenset[str]] = {}
    missing: dict[str, Record] = {}
    for record, image in images:
        folder, _, name = image.rpartition("/")
        if folder not in listings:
            listings[folder] = _names_in(root / folder)
        # A listing can be stricter than the file system (upper and lower case), so it is not the last word.
        if name not in listings[folder] and image not in missing and not _exists(root / image):
            missing[image] = record
    if not missing:
        return
    image, record = next(iter(missing.items()))
    if not root.is_dir():
        raise record.error(f"the image root {root} is no folder, so the image {image!r} cannot be found in it.")
    rest = f" {len(missing)} images of this file are missing in all." if len(missing) > 1 else ""
    raise record.error(f"the image {image!r} does not exist under the image root {root}.{rest} Check the image root.")


def _names_in(folder: Path) -> frozenset[str]:
    try:
        return frozenset(os.listdir(folder))  # noqa: PTH208 - a tenth of the time of Path.iterdir
    except (OSError, ValueError):
        return frozenset()


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def narrowed(records: Records, numbers: Collection[int], *lists: str) -> Records:
    """Return a copy of a data set whose `lists`, one entry per record each, lack the records of those numbers."""
    result = copy.copy(records)
    for name in lists:
        kept = [entry for number, entry in enumerate(getattr(records, name)) if number not in numbers]
        setattr(result, name, kept)
    return result


_SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")
_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF's orientation -> what brings the stored picture upright."""


def open_image(path: str | Path, *, file: Path, number: int, upright: bool = True) -> Image.Image:
    """Read an image as RGB of 8 bits; of an animation the first picture.

    Of 16 bits the upper 8 are kept, and transparency is dropped. A camera that was held sideways notes so in the file
    (EXIF): such a picture is turned upright, unless `upright` is False, which gives it as it is stored.

    Raises:
        BadImageError: it cannot be read; the message names the image and the record of the file that asks for it.
    """
    try:
        with Image.open(path) as image:
            picture = _as_rgb(image)
            turn = _TURNS.get(_orientation(image)) if upright else None
            return picture if turn is None else picture.transpose(turn)
    except Exception as error:  # a broken file makes the decoders raise nearly anything
        reason = str(error) or type(error).__name__
        raise BadImageError(
            f"{file}, record {number}: the image {path} cannot be read: {reason}. "
            "It may be cut off or no image at all; fetch it again.",
            str(path),
            str(file),
            number,
            reason,
        ) from error


def _as_rgb(image: Image.Image) -> Image.Image:
    mode = image.mode
    if mode in _SIXTEEN_BITS or (mode == "I" and image.format == "PPM"):
        # Pillow would make everything above 255 white.
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if mode in ("I", "F"):
        raise ValueError(f"it holds 32-bit numbers (mode {mode}), whose black and white are unknown; save 8 or 16 bits")
    if mode == "P" and isinstance(image.info.get("transparency"), bytes):
        image = image.convert("RGBA")  # Pillow warns of what is lost on the straight way
    return image.convert("RGB")


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation of a picture that has been read; 1, upright, where there is none or it is damaged."""
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # a picture with broken notes is still a picture
        return 1
