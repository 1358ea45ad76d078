"""Keeps the dense weights off the model's device during a cut, to restore them if it fails."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from upop.pruning.groups import Group, owner_of

_SMALL = 2**28
"""Bytes of weights that are copied in memory, 256 MiB."""


class Dense:
    """A backup of all parameters that a cut or a correction may change.

    It is kept on the CPU; for a model on the CPU of more than 256 MiB, in a temporary file if there is room.

    Args:
        model: the dense model.
        groups: that may be cut.
    """

    def __init__(self, model: nn.Module, groups: Iterable[Group]) -> None:
        owners = dict.fromkeys(owner_of(model, part.tensor)[0] for group in groups for part in group.slices)
        self._parameters = list(dict.fromkeys(each for owner in owners for each in owner.parameters(recurse=False)))
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._held: list[Tensor] | None = None
        large = sum(each.nbytes for each in self._parameters) > _SMALL
        if not (large and all(each.device.type == "cpu" for each in self._parameters) and self._written()):
            self._held = [each.detach().to("cpu", copy=True) for each in self._parameters]

    @torch.no_grad()
    def restore(self) -> None:
        """Restore the values of every parameter, whatever its present shape."""
        from upop.pruning.shrink import Exchange

        held = self._held or self._read()
        for parameter, old in zip(self._parameters, held, strict=True):
            if parameter.shape == old.shape:
                parameter.copy_(old)
            else:
                Exchange(parameter, old.to(parameter.device, copy=True), None).apply()

    def forget(self) -> None:
        """Free the backup."""
        self._held = None
        if self._folder is not None:
            self._folder.cleanup()

    def _path(self) -> Path:
        assert self._folder is not None
        return Path(self._folder.name) / "dense.pt"

    def _written(self) -> bool:
        """Write the backup to a temporary file; return whether that succeeded."""
        self._folder = tempfile.TemporaryDirectory(prefix="upop-", ignore_cleanup_errors=True)
        try:
            torch.save([each.detach() for each in self._parameters], self._path())
        except (OSError, RuntimeError):  # no room
            self._folder.cleanup()
            self._folder = None
            return False
        return True

    def _read(self) -> Any:
        return torch.load(self._path(), mmap=True, weights_only=True)
