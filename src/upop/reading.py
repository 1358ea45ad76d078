"""Reads untrusted files: only regular files of a bounded size, as text or JSON.

What is read through here cannot make a program wait for ever (a named pipe), fill its memory (a device, a file without
end), or fail with an error that names no file.
"""

from __future__ import annotations

import codecs
import io
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from upop.errors import UPopError
from upop.pruning.json_text import DEEPEST, LONGEST_NUMBER, parse_json

LARGEST = 64 * 2**20
"""Largest size in bytes of a description, a plan, results or settings."""
LARGEST_DATA = 2**30
"""Largest size in bytes of an annotation file, or of the rows of a run."""
_LONGEST_LINE = 2**20
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


@contextmanager
def regular_file(path: str | Path) -> Iterator[io.BufferedReader]:
    """Open a regular file: a named pipe would block, and a device has no end.

    Raises:
        OSError: the file is missing or cannot be opened.
        ValueError: it is not a regular file.
    """
    # Opening a named pipe would wait for somebody who writes to it.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with os.fdopen(descriptor, "rb") as file:
        _check_regular(os.fstat(descriptor).st_mode)
        yield file


def read_bytes(path: Path, largest: int = LARGEST) -> bytes:
    """Return the content of a regular file.

    Raises:
        OSError: the file is missing or cannot be read.
        ValueError: it is not a regular file, or larger than `largest` bytes.
    """
    with regular_file(path) as file:
        content = file.read(largest + 1)
    if len(content) > largest:
        raise ValueError(f"it has more than {largest:,} bytes")
    return content


def _check_regular(mode: int) -> None:
    """Raise a ValueError unless `mode` (`st_mode`) is that of a regular file."""
    if stat.S_ISREG(mode):
        return
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket"}
    raise ValueError(f"it is {kinds.get(stat.S_IFMT(mode), 'a device')}, not a file")


def read_text(path: Path, largest: int = LARGEST) -> str:
    """Return the text of a regular file in UTF-8, without a byte order mark.

    Raises:
        OSError: the file is missing or cannot be read.
        ValueError: it is not a regular file, larger than `largest` bytes, or not UTF-8.
    """
    content = read_bytes(path, largest)
    if content.startswith(_UTF16):
        raise ValueError("it is UTF-16; save it as UTF-8")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is no UTF-8") from None


def read_json(
    path: Path,
    error: type[UPopError],
    advice: str,
    *,
    what: str = "",
    nan: bool = False,
    largest: int = LARGEST,
) -> Any:
    """Return the content of a JSON file.

    Args:
        path: the file.
        error: the class of errors to raise.
        advice: a sentence on what to do about an unreadable file.
        what: its description in messages: "The plan".
        nan: whether NaN and Infinity, which Python writes, are allowed.
        largest: largest size in bytes.

    Raises:
        UPopError: of the class `error`: the file is missing, or no JSON within the bounds.
    """
    try:
        return parse_json(read_text(path, largest), nan=nan)
    except (OSError, ValueError) as problem:
        raise error(f"{f'{what} ' if what else ''}{path} cannot be read: {reason(problem)}. {advice}") from problem


def read_object(path: Path, error: type[UPopError], advice: str, *, nan: bool = False) -> dict[str, Any]:
    """Return the object in a JSON file; arguments and errors are those of `read_json`."""
    content = read_json(path, error, advice, nan=nan)
    if not isinstance(content, dict):
        raise error(f"{path} must hold a JSON object, and holds a {type(content).__name__}. {advice}")
    return content


def read_lines(path: Path, largest: int = LARGEST_DATA) -> Iterator[Any]:
    """Yield the JSON value of every line (NaN allowed), or a ValueError with the reason why it cannot be read.

    Raises:
        OSError: the file is missing or cannot be read.
        ValueError: it is not a regular file, or larger than `largest` bytes.
    """
    for line in read_bytes(path, largest).split(b"\n"):
        if line.strip():
            try:
                if len(line) > _LONGEST_LINE:
                    raise ValueError(f"it has more than {_LONGEST_LINE:,} bytes")
                yield parse_json(line.decode(), nan=True)
            except ValueError as error:
                yield error


def reason(error: BaseException) -> str:
    """Return the reason of an error, to follow "cannot be read: "."""
    words = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return (words or type(error).__name__).rstrip(".")


__all__ = [
    "DEEPEST",
    "LARGEST",
    "LARGEST_DATA",
    "LONGEST_NUMBER",
    "parse_json",
    "read_bytes",
    "read_json",
    "read_lines",
    "read_object",
    "read_text",
    "reason",
    "regular_file",
]
