"""Finds and opens images: which files are images, where they may be, and their conversion to RGB.

The first bytes determine the format, not the name. Only regular files in `FORMATS` are opened, up to a size limit. That
excludes readers that start other programs (PostScript), pipes that would block, and images larger than memory.
"""

from __future__ import annotations

import io
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from upop.errors import BadImageError, DataError
from upop.reading import regular_file

FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "DIB", "TIFF", "PPM", "AVIF", "JPEG2000")
"""Formats that are opened, by Pillow's names."""
ENDINGS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".gif", ".webp", ".bmp", ".dib", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".avif", ".jp2"),
)
"""Extensions of images in a folder, in lower or upper case."""
MOST_PIXELS = 89_478_485
"""Pillow's limit for decompression bombs."""
_MOST_BYTES = 2**29
_LONGEST_SHAPE = 1000  # largest aspect ratio, because the short side is resized to the model's
_SHOWN = 3

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
"""EXIF orientation -> transpose that turns the stored image upright."""


@contextmanager
def opened(source: str | Path | bytes) -> Iterator[Image.Image]:
    """Open an image and read its header; pixels are read on demand.

    Args:
        source: the file, or its content.

    Raises:
        OSError, ValueError: it is not a regular file, has another format, or is too large.
        Exception: errors of Pillow's decoders, here or when the image is used.
    """
    with io.BytesIO(source) if isinstance(source, bytes) else regular_file(source) as file:
        size = len(source) if isinstance(source, bytes) else os.fstat(file.fileno()).st_size
        if size > _MOST_BYTES:
            raise ValueError(f"it has {size:,} bytes, and the limit is {_MOST_BYTES:,}")
        try:
            image = Image.open(file, formats=_formats())
        except UnidentifiedImageError:
            raise ValueError(f"it is not an image in a supported format ({', '.join(FORMATS)})") from None
        with image:
            _check_size(*image.size)
            yield image


@cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)  # older versions of Pillow have fewer


def _check_size(width: int, height: int) -> None:
    if width * height > MOST_PIXELS:
        raise ValueError(f"it has {width:,} x {height:,} pixels, and the limit is {MOST_PIXELS:,} in all")
    if max(width, height) > _LONGEST_SHAPE * min(width, height):
        raise ValueError(f"it has {width:,} x {height:,} pixels: one side is over {_LONGEST_SHAPE} times the other")


def open_image(path: str | Path, *, file: Path, number: int, upright: bool = True) -> Image.Image:
    """Read an image as 8-bit RGB; of an animation, the first frame.

    16-bit images keep their upper 8 bits, and transparency is dropped. Images are turned upright by their EXIF
    orientation, unless `upright` is False.

    Raises:
        BadImageError: it cannot be read; the message names the image, and the file and sample that refer to it.
    """
    try:
        return read_rgb(path, upright=upright)
    except Exception as error:  # a broken file makes the decoders raise nearly anything
        reason = str(error) or type(error).__name__
        raise BadImageError(
            f"{file}, sample {number}: the image {path} cannot be read: {reason}. "
            "It may be truncated or not an image; fetch it again.",
            str(path),
            str(file),
            number,
            reason,
        ) from error


def read_rgb(source: str | Path | bytes, *, upright: bool = True) -> Image.Image:
    """Read an image like `open_image`, but raise the errors of the decoders."""
    with opened(source) as image:
        found = _as_rgb(image)
        turn = _TURNS.get(_orientation(image)) if upright else None
        return found if turn is None else found.transpose(turn)


def _as_rgb(image: Image.Image) -> Image.Image:
    mode = image.mode
    if mode in _SIXTEEN_BITS or (mode == "I" and image.format == "PPM"):
        # Pillow would clip values above 255 to white.
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if mode in ("I", "F"):
        raise ValueError(f"it has 32-bit values (mode {mode}) of unknown range; save it with 8 or 16 bits")
    if mode == "P" and isinstance(image.info.get("transparency"), bytes):
        image = image.convert("RGBA")  # avoids a warning of Pillow about lost transparency
    return image.convert("RGB")


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation of an image that has been read; 1, upright, if it is missing or damaged."""
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # damaged EXIF data do not make the image unreadable
        return 1


class Bounds:
    """Checks that files are inside a folder, after following links.

    Args:
        root: the folder.
        outside: True allows everything.
    """

    def __init__(self, root: Path, *, outside: bool) -> None:
        self._root = None if outside else os.path.realpath(root)

    def beyond(self, path: str | Path) -> str:
        """Return the real path of a file or folder outside; "" if it is inside."""
        if self._root is None:
            return ""
        real = os.path.realpath(path)
        inside = real == self._root or real.startswith(self._root.rstrip(os.sep) + os.sep)
        return "" if inside else real


@dataclass
class Listed:
    """The files of a folder and its subfolders.

    Attributes:
        images: files with an image extension, folder by folder, sorted by name.
        others: extension of other files -> their number.
        example: one of the other files.
    """

    images: list[str] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)
    example: str = ""


def list_images(folder: Path, bounds: Bounds, endings: Sequence[str] = ENDINGS, *, deep: bool = True) -> Listed:
    """Return the images below a folder, without hidden files.

    Args:
        folder: to scan; each folder is scanned once, even if several links lead to it.
        bounds: limits where links may lead.
        endings: file extensions of images, in lower case.
        deep: whether to scan subfolders.

    Raises:
        OSError: the folder cannot be read.
        DataError: a link leads outside of the bounds.
    """
    listed = Listed()
    seen: set[str] = set()
    folders = [str(folder)]
    found: list[tuple[str, list[str]]] = []
    while folders:
        place = folders.pop()
        real = os.path.realpath(place)
        if real in seen:
            continue
        seen.add(real)
        names: list[str] = []
        with os.scandir(place) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_symlink():
                    _check_link(entry.path, bounds)
                if entry.is_dir():
                    folders += [entry.path] if deep else []
                elif os.path.splitext(entry.name)[1].lower() in endings:  # noqa: PTH122 - a tenth of Path's time
                    names.append(entry.name)
                else:
                    listed.others[os.path.splitext(entry.name)[1] or "no extension"] += 1  # noqa: PTH122
                    listed.example = min(entry.path, listed.example or entry.path)
        found.append((place, sorted(names)))
    for place, names in sorted(found):
        listed.images += [os.path.join(place, name) for name in names]  # noqa: PTH118 - as above
    return listed


def _check_link(path: str, bounds: Bounds) -> None:
    real = bounds.beyond(path)
    if real:
        raise DataError(
            f"{path} is a link to {real}, outside of the data folder. Give that folder, or allow it with "
            "--allow-outside (allow_outside: true)."
        )


def describe_others(listed: Sequence[Listed], place: Path, endings: Sequence[str] = ENDINGS) -> str:
    """Describe the files that were ignored because they have no image extension; "" without any."""
    others: Counter[str] = sum((each.others for each in listed), Counter())
    if not others:
        return ""
    kinds = ", ".join(f"{ending} ({count})" for ending, count in others.most_common(_SHOWN))
    more = f" and {len(others) - _SHOWN} more extensions" if len(others) > _SHOWN else ""
    example = next(each.example for each in listed if each.example)
    return (
        f"Left out of {place}: {others.total()} files without the extension {', '.join(endings)}. Theirs are "
        f"{kinds}{more}; one file is {example}."
    )
