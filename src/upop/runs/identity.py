"""The inputs that determine a result besides the settings: weights, data and libraries; and their comparison."""

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
"""Settings that say where something lies whose content decides; those of type Path are others."""


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
    """Return the differences of two results of `identity_of`, in words: those that change results, and minor ones.

    Args:
        before: at the start of the run.
        now: at its resumption.
    """
    described, notes = [], []
    for name, digest in now["contents"].items():
        if before["contents"].get(name, digest) != digest:
            described.append(f"{name}: the files that it names have another content than they had")
    for split, digests in now["data"].items():
        if split in before["data"]:
            decisive, others = differences(before["data"][split], digests, split)
            described += decisive
            notes += others
    for name, version in now["libraries"].items():
        old = before["libraries"].get(name, version)
        if name == "python" and old.rpartition(".")[0] == version.rpartition(".")[0]:
            continue  # 3.11.7 computes as 3.11.8 does
        if old != version:
            described.append(f"{name} was {old}, and is {version}")
    return described, notes


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
