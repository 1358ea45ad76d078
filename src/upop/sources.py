"""Digests of the files of a data set, to detect changes independently of their location."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from upop.reading import regular_file

READ_WHOLE = 128 * 2**20
"""Data sets with at most this many bytes of images are compared by content, larger ones by names and sizes."""


@dataclass(frozen=True)
class Sources:
    """The files that a data set reads.

    Attributes:
        annotations: the annotation files.
        images: name in the data set -> path.
    """

    annotations: Sequence[Path]
    images: Mapping[str, Path]


def digests_of(sources: Sources) -> dict[str, Any]:
    """Return digests for `differences`: of annotation files, and of names, sizes, times and contents of images.

    The digest of contents is None for more than `READ_WHOLE` bytes of images. Unreadable images are no error.

    Raises:
        OSError: an annotation file cannot be read.
    """
    found = {name: (path, *_stat(path)) for name, path in sorted(sources.images.items())}
    small = sum(size for _, size, _ in found.values()) <= READ_WHOLE
    pairs = found.items()
    return {
        "annotations": {path.name: file_digest(path) for path in sources.annotations},
        "images": len(found),
        "names": _digest(name for name in found),
        "sizes": _digest(f"{name}\0{size}" for name, (_, size, _) in pairs),
        "times": _digest(f"{name}\0{time}" for name, (_, _, time) in pairs),
        "contents": _digest(f"{name}\0{_content(path)}" for name, (path, *_) in pairs) if small else None,
    }


def differences(before: Mapping[str, Any], now: Mapping[str, Any], split: str) -> tuple[list[str], list[str]]:
    """Describe how two results of `digests_of` differ: certain changes, and possible ones.

    Args:
        before: digests at the start of the run.
        now: digests of the present data.
        split: name of the split.
    """
    described, notes = [], []
    old, new = before["annotations"], now["annotations"]
    if sorted(old) != sorted(new):
        described.append(f"the {split} data: its annotation files were {_names(old)}, and are {_names(new)}")
    described += [
        f"the {split} data: the content of the annotation file {name} changed"
        for name in sorted(set(old) & set(new))
        if old[name] != new[name]
    ]
    by: Callable[[str], bool] = lambda name: before[name] is not None and before[name] == now[name]  # noqa: E731
    if not by("names"):
        more = f": there were {before['images']}, and are {now['images']}" if not by("images") else ""
        described.append(f"the {split} data: images were added, removed or renamed{more}")
    elif not by("sizes"):
        described.append(f"the {split} data: file sizes of images changed")
    elif before["contents"] is not None and now["contents"] is not None:
        if not by("contents"):
            described.append(f"the {split} data: the content of images changed")
    elif not by("times"):
        notes.append(f"the {split} data: times of image files changed, but neither names nor sizes")
    return described, notes


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal digits.

    Raises:
        OSError: it cannot be read.
        ValueError: it is something else than a file.
    """
    with regular_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _stat(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except OSError:
        return -1, -1
    return found.st_size, found.st_mtime_ns


def _content(path: Path) -> str:
    try:
        return file_digest(path)
    except (OSError, ValueError):
        return "cannot be read"


def _digest(lines: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for line in lines:
        digest.update(line.encode("utf-8", "surrogateescape") + b"\n")
    return digest.hexdigest()


def _names(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "no file"
