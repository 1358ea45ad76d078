"""Records and compares the inputs that determine a result besides the settings: weights, data and libraries."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from upop.sources import differences, digests_of, file_digest

LIBRARIES = ("upop", "torch", "torchvision", "timm", "transformers", "accelerate", "safetensors", "numpy", "pillow")
_READ = frozenset({".safetensors", ".bin", ".pt", ".pth", ".json", ".txt", ".model"})
PLACES = frozenset({"pretrained", "tokenizer"})
"""Settings besides those of type Path that name a file or folder: its content counts, not where it is."""


def versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that affect results."""
    return {name: metadata.version(name) for name in LIBRARIES} | {"python": sys.version.split()[0]}


def identity_of(contents: Mapping[str, Path | None], samples: Mapping[str, Any]) -> dict[str, Any]:
    """Return the inputs that determine a result, as JSON values.

    Args:
        contents: setting -> its file or folder, or None.
        samples: split -> its data set; one without `sources()` is not compared.

    Raises:
        OSError: a file cannot be read.
    """
    return {
        "libraries": versions(),
        "contents": {name: content_digest(path) for name, path in contents.items() if path is not None},
        "data": {split: digests_of(read.sources()) for split, read in samples.items() if hasattr(read, "sources")},
    }


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Compare two results of `identity_of`; return the differences that change results, and minor ones, in words.

    Args:
        before: at the start of the run.
        now: at its resumption.
    """
    decisive, minor = [], []
    for name, digest in now["contents"].items():
        if before["contents"].get(name, digest) != digest:
            decisive.append(f"{name}: the content of its files has changed")
    for split, digests in now["data"].items():
        if split in before["data"]:
            large, small = differences(before["data"][split], digests, split)
            decisive += large
            minor += small
    for name, version in now["libraries"].items():
        old = before["libraries"].get(name, version)
        if name == "python" and old.rpartition(".")[0] == version.rpartition(".")[0]:
            continue  # 3.11.7 computes as 3.11.8 does
        if old != version:
            decisive.append(f"{name} was {old} and is {version}")
    return decisive, minor


def content_digest(path: Path) -> str:
    """Return the SHA-256 of a checkpoint's content in hexadecimal, independent of its path.

    For a folder, names and contents of weight and description files count; without a checkpoint it is empty.

    Raises:
        OSError: a file cannot be read.
    """
    if not path.is_dir():
        return file_digest(path) if path.is_file() else ""
    digest = hashlib.sha256()
    for file in sorted(found for found in path.iterdir() if found.suffix in _READ and found.is_file()):
        digest.update(f"{file.name}\0{file_digest(file)}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()
