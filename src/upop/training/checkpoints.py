"""Where a run stands, in files to resume from: `checkpoints/step-00000123.pt`, the newest few.

Each holds all that the next step depends on: weights, optimizer, moving average, scores and masks, random number
generators of every process, the position in the epoch, and how much of metrics.jsonl was written. They are read as
tensors, numbers and texts alone (`weights_only`), never as objects.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from upop.errors import CheckpointError
from upop.files import replacing_file

_FORMAT = 1
_NAME = "step-{:08d}.pt"


class Checkpoints:
    """The files of one run; the main process writes them, all processes read them.

    Args:
        folder: where they lie.
        keep: how many to keep; older ones go when a newer one is whole.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self._folder, self._keep = folder, keep

    def exist(self) -> bool:
        """Whether there is any."""
        return bool(self._files())

    def write(self, step: int, state: Mapping[str, Any]) -> Path:
        """Write a file, and then remove those that are too many.

        Raises:
            RunFolderError: it cannot be written; the older ones are still there.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / _NAME.format(step)
        with replacing_file(path) as part:
            torch.save({"format": _FORMAT, **state}, part)
        for older in self._files()[: -self._keep]:
            older.unlink(missing_ok=True)
        return path

    def newest(self) -> tuple[Path, dict[str, Any]] | None:
        """Return the newest file that can be read, with its content on the CPU; None where there is no file.

        Raises:
            CheckpointError: there are files, and none can be read.
        """
        problems = []
        for path in reversed(self._files()):
            try:
                content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
                if not isinstance(content, dict) or content.get("format") != _FORMAT:
                    raise ValueError(f"it is not of format {_FORMAT}")
            except Exception as error:  # torch raises whatever its parsers meet
                problems.append(f"{path}: {type(error).__name__}: {str(error).splitlines()[0]}")
                warnings.warn(f"{path} is damaged and is passed over.", stacklevel=2)
                continue
            return path, content
        if problems:
            raise CheckpointError(
                "No checkpoint of the run can be read, so it cannot be resumed:\n  "
                + "\n  ".join(problems)
                + f"\nRemove {self._folder} to start the run again."
            )
        return None

    def remove(self) -> None:
        """Remove all files."""
        for path in self._files():
            path.unlink(missing_ok=True)

    def _files(self) -> list[Path]:
        return sorted(self._folder.glob(_NAME.replace("{:08d}", "*")))
