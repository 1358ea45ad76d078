"""Checkpoints to resume a run from: `checkpoints/step-00000123.pt`, the newest few.

Each holds everything that the next step depends on: weights, optimizer, moving average, importance, masks, the random
state of every process, the position in the epoch, and the size of metrics.jsonl. They are read with `weights_only`, so
no code in them is run. Each ends with the SHA-256 of its content.
"""

from __future__ import annotations

import hashlib
import re
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from upop.errors import CheckpointError
from upop.files import make_folder, replacing_file
from upop.pruning.file_keys import Keys, current

_FORMAT = 3
_UNSEALED = 1  # without a checksum
_READ = (_UNSEALED, 2, _FORMAT)
_KEYS = Keys({"records_per_step": "samples_per_step"}, {"identity": Keys(each={"data": Keys({"pictures": "images"})})})
"""Keys of formats 1 and 2 that changed."""
_NAME = "step-{:08d}.pt"
_NUMBER = re.compile(r"step-(\d{8,12})\.pt")
_SEAL = b"\nupop sha256 "
_SEALED_BYTES = len(_SEAL) + 64 + 1


@dataclass
class Position:
    """The position of a run, as stored in a checkpoint."""

    phase: str = ""
    epoch: int = 0  # of the phase
    batch: int = 0  # finished batches of the epoch; after the last one, the evaluation is still to come
    phase_steps: int = 0
    steps: int = 0
    epochs: int = 0  # finished, in all phases
    bad_steps: int = 0
    bad_in_a_row: int = 0


class Checkpoints:
    """The checkpoints of one run; the main process writes them, all processes read them.

    Args:
        folder: their folder.
        keep: how many to keep; older ones are removed once a newer one is complete.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self._folder, self._keep = folder, keep
        self._latest: int | None = None  # step last written or read

    def exist(self) -> bool:
        """Whether there is any checkpoint."""
        return bool(self._files())

    def latest(self) -> int | None:
        """Return the step of the last file written or read, or of the newest one; None without files."""
        if self._latest is not None:
            return self._latest
        files = self._files()
        return _step(files[-1]) if files else None

    def write(self, step: int, state: Mapping[str, Any]) -> Path:
        """Write a checkpoint, then remove surplus ones, and those of later steps.

        Raises:
            RunFolderError: it cannot be written; the older ones remain.
        """
        path = self._folder / _NAME.format(step)
        make_folder(self._folder)
        with replacing_file(path, replace=True) as part, part.open("wb") as file:
            _save({"format": _FORMAT, **state}, file)
        self._latest = step
        # A run resumes from the newest intact one, so those of later steps are damaged.
        later = [other for other in self._files() if _step(other) > step]
        older = [other for other in self._files() if _step(other) <= step][: -self._keep]
        for other in (*older, *later):
            other.unlink(missing_ok=True)
        return path

    def newest(self, *, whole: bool = False) -> tuple[Path, dict[str, Any]] | None:
        """Return the newest intact file with its content on the CPU; None without files.

        Args:
            whole: whether to check that it holds everything that resuming needs, with the right types.

        Raises:
            CheckpointError: there are files, but none is usable.
        """
        problems = []
        for path in reversed(self._files()):
            try:
                return path, self.read(path.name, whole=whole)
            except CheckpointError as error:
                problems.append(str(error))
                warnings.warn(f"{error} It is skipped.", stacklevel=2)
        if problems:
            raise CheckpointError(
                "The run cannot be resumed, because none of its checkpoints can be read:\n  "
                + "\n  ".join(problems)
                + f"\nRemove {self._folder} to start the run again."
            )
        return None

    def read(self, name: str, *, whole: bool = False) -> dict[str, Any]:
        """Return the content of a file, on the CPU; see `newest`.

        Raises:
            CheckpointError: it is damaged or invalid; the message says how.
        """
        path = self._folder / name
        try:
            sealed = _is_sealed(path)
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            if not isinstance(content, dict) or content.get("format") not in _READ:
                raise ValueError(f"it is not of format {_FORMAT} or earlier")
            content = dict(current(content, _KEYS))
            if not sealed:
                _check_unsealed(path, content)
            if whole or not sealed:
                check_whole(content)
                if content["place"]["steps"] != _step(path):
                    raise ValueError(f"it is of step {content['place']['steps']}")
        except Exception as error:  # torch's parsers raise errors of any type
            message = " ".join((str(error).splitlines() or [""])[0].split())
            raise CheckpointError(f"{path} is damaged: {message or type(error).__name__}.") from error
        self._latest = _step(path)
        return content

    def remove(self) -> None:
        """Remove all files."""
        for path in self._files():
            path.unlink(missing_ok=True)

    def _files(self) -> list[Path]:
        """Return the files, oldest first."""
        found = [path for path in self._folder.glob("step-*.pt") if _NUMBER.fullmatch(path.name) and path.is_file()]
        return sorted(found, key=_step)


class _Sealing:
    """A writable file that computes a checksum of what torch writes."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.digest = hashlib.sha256()
        self.failure: OSError | None = None

    def write(self, data: bytes) -> int:
        """Write bytes; keep an OSError, which torch would replace by a RuntimeError."""
        try:
            self._file.write(data)
        except OSError as error:
            self.failure = error
            raise
        self.digest.update(data)
        return len(data)

    def flush(self) -> None:
        """Do nothing: torch calls this, but closing the file flushes it."""


def _save(content: Mapping[str, Any], file: IO[bytes]) -> None:
    sealing = _Sealing(file)
    try:
        torch.save(content, sealing)  # type: ignore[arg-type]
    except RuntimeError as error:
        if sealing.failure is None:
            raise
        raise sealing.failure from error
    file.write(_SEAL + sealing.digest.hexdigest().encode() + b"\n")


def _is_sealed(path: Path) -> bool:
    """Return whether a file ends with the checksum of its content.

    Raises:
        ValueError: the checksum is wrong.
        OSError: it cannot be read.
    """
    left = path.stat().st_size - _SEALED_BYTES
    if left < 0:
        return False
    digest = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(left)
        seal = file.read()
        if not seal.startswith(_SEAL):
            return False
        file.seek(0)
        while left and (data := file.read(min(left, 2**22))):
            digest.update(data)
            left -= len(data)
    if seal != _SEAL + digest.hexdigest().encode() + b"\n":
        raise ValueError("its checksum does not match its content")
    return True


def _check_unsealed(path: Path, content: Mapping[str, Any]) -> None:
    """Check the ZIP checksums of a file of format 1; raise ValueError if one is wrong."""
    if content["format"] != _UNSEALED:
        raise ValueError("it has no checksum at its end; it was truncated or changed")
    with zipfile.ZipFile(path) as archive:
        wrong = archive.testzip()
    if wrong is not None:
        raise ValueError(f"the checksum of its part {wrong} does not match the content")


def check_whole(content: Mapping[str, Any]) -> None:
    """Check that a checkpoint holds everything that resuming needs, with the right types.

    Raises:
        ValueError: says what is missing or wrong.
    """
    for name, kinds in _FIELDS.items():
        _typed(content, name, kinds)
    earlier = "pruner" in content and "compression" not in content  # of an earlier version
    _typed(content, "pruner" if earlier else "compression", (dict, _NONE))
    for name in ("samples_per_step", "accumulate", "batches"):
        if content[name] < 1:
            raise ValueError(f"{name} is {content[name]}")
    for field in fields(Position):
        _typed(content["place"], field.name, str if field.name == "phase" else int, "place.")
    unknown = set(content["place"]) - {field.name for field in fields(Position)}
    if unknown:
        raise ValueError(f"place has {sorted(map(str, unknown))[0]!r}, which this version of upop does not know")
    for name in ("model", "average"):
        bad = [key for key, value in (content[name] or {}).items() if not isinstance(value, Tensor)]
        if bad or (name == "model" and not content[name]):
            raise ValueError(f"{name} holds no tensor {bad[0]!r}" if bad else f"{name} is empty")
    for name, kind in (("state", dict), ("param_groups", list)):
        _typed(content["optimizer"], name, kind, "optimizer.")
    if not content["randomness"]:
        raise ValueError("randomness is empty")
    for process, state in enumerate(content["randomness"]):
        for name, kinds in _GENERATORS.items():
            _typed(state, name, kinds, f"randomness of process {process}: ")


_Kinds = type | tuple[type, ...]
_NONE = type(None)
_FIELDS: dict[str, _Kinds] = {
    "settings": dict,
    "task": str,
    "samples_per_step": int,
    "accumulate": int,
    "batches": int,
    "place": dict,
    "phases": list,
    "notes": dict,
    "model": dict,
    "optimizer": dict,
    "average": (dict, _NONE),
    "randomness": list,
    "metrics": int,
    "seconds": (int, float),
}
_GENERATORS: dict[str, _Kinds] = {"torch": Tensor, "cuda": (Tensor, _NONE), "numpy": list, "python": list}


def _typed(content: Any, name: str, kinds: _Kinds, where: str = "") -> None:
    """Raise ValueError unless a mapping has a value of this name and type; numbers must not be negative."""
    if not isinstance(content, Mapping) or name not in content:
        raise ValueError(f"{where}{name} is missing")
    value = content[name]
    if not isinstance(value, kinds) or isinstance(value, bool):
        raise ValueError(f"{where}{name} is of type {type(value).__name__}")
    if isinstance(value, (int, float)) and not value >= 0:
        raise ValueError(f"{where}{name} is {value}")


def _step(path: Path) -> int:
    found = _NUMBER.fullmatch(path.name)
    assert found is not None
    return int(found[1])
