"""The files behind a data set, as digests that tell whether they are still the same, wherever they lie by now."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from upop.reading import regular_file

READ_WHOLE = 128 * 2**20
"""Bytes of images up to which a data set is compared by content; a larger one by names and sizes."""


@dataclass(frozen=True)
class Sources:
    """The files that a data set reads.

    Attributes:
        annotations: files that say what there is.
        images: names in the data set, and where they lie.
    """

    annotations: Sequence[Path]
    images: Mapping[str, Path]


def digests_of(sources: Sources) -> dict[str, Any]:
    """Return what `differences` compares: contents of annotations; of images names, sizes, times and contents.

    Contents are None of more than `READ_WHOLE` bytes of images.

    Raises:
        OSError: an annotation file cannot be read. What a run makes of images that cannot be is not decided here.
    """
    found = {name: (path, *_stat(path)) for name, path in sorted(sources.images.items())}
    small = sum(size for _, size, _ in found.values()) <= READ_WHOLE
    pairs = found.items()
    return {
        "annotations": {path.name: file_digest(path) for path in sources.annotations},
        "pictures": len(found),
        "names": _digest(name for name in found),
        "sizes": _digest(f"{name}\0{size}" for name, (_, size, _) in pairs),
        "times": _digest(f"{name}\0{time}" for name, (_, _, time) in pairs),
        "contents": _digest(f"{name}\0{_content(path)}" for name, (path, *_) in pairs) if small else None,
    }


def differences(before: Mapping[str, Any], now: Mapping[str, Any], split: str) -> tuple[list[str], list[str]]:
    """Return how two answers of `digests_of` differ, in words: what matters, and what may matter.

    Args:
        before: of the run as it began.
        now: of the data as it is.
        split: what the data set is called.
    """
    described, notes = [], []
    old, new = before["annotations"], now["annotations"]
    if sorted(old) != sorted(new):
        described.append(f"the {split} data: it was described by {_names(old)}, and is by {_names(new)}")
    described += [
        f"the {split} data: the annotation file {name} has another content than it had"
        for name in sorted(set(old) & set(new))
        if old[name] != new[name]
    ]
    by: Callable[[str], bool] = lambda name: before[name] is not None and before[name] == now[name]  # noqa: E731
    if not by("names"):
        more = f": there were {before['pictures']}, and are {now['pictures']}" if not by("pictures") else ""
        described.append(f"the {split} data: images were added, removed or renamed{more}")
    elif not by("sizes"):
        described.append(f"the {split} data: images have other sizes than they had")
    elif before["contents"] is not None and now["contents"] is not None:
        if not by("contents"):
            described.append(f"the {split} data: images have another content than they had")
    elif not by("times"):
        notes.append(f"the {split} data: images have other times than they had, and the names and sizes that they had")
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
