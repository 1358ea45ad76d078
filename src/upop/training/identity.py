"""What a run's result depends on besides its settings, as digests that tell whether it is still the same."""

from __future__ import annotations

import hashlib
from pathlib import Path

_WEIGHTS = frozenset({".safetensors", ".bin", ".pt", ".pth", ".json"})


def content_digest(path: Path) -> str:
    """Return the SHA-256, in hexadecimal digits, of a checkpoint's content, whatever its place is.

    Of a folder the names and contents of its files of weights and descriptions count; of nothing it is empty.

    Raises:
        OSError: a file cannot be read.
    """
    if not path.is_dir():
        return _of_file(path) if path.is_file() else ""
    digest = hashlib.sha256()
    for file in sorted(found for found in path.iterdir() if found.suffix in _WEIGHTS and found.is_file()):
        digest.update(f"{file.name}\0{_of_file(file)}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _of_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
