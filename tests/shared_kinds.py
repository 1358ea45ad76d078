"""Groups of kinds of models that any process of a test run has read, for all the others.

A kind is read once in a process (see `unburdened`). The processes of a run (pytest-xdist's, and those that tests start)
run the same code, so that what one of them read holds in the others: it is written into a folder of the run.
"""

from __future__ import annotations

import enum
import hashlib
import io
import os
import pickle
import sys
import types
from collections import OrderedDict
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import torch

from upop.pruning import axes, known
from upop.pruning.axes import settle, tried

FOLDER = "UPOP_TEST_KINDS"
"""The environment variable that names the folder."""
_READER = axes.read, tried.MOST_MEMORY, tried.MOST_MULTIPLY_ADDS
_WRITTEN = (int, float, complex, str, bytes, bool, type(None), torch.dtype, torch.device, torch.layout, enum.Enum)


class _LocalError(Exception):
    """Something that another process may not have, or have differently."""


class Kinds(OrderedDict[Hashable, Any]):
    """The kinds that this process knows; those that it does not know are looked up in the folder.

    Args:
        folder: of the test run.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder

    def __contains__(self, kind: object) -> bool:
        return super().__contains__(kind) or self._found(kind)

    def __bool__(self) -> bool:
        return True

    def __setitem__(self, kind: Hashable, value: Any) -> None:
        super().__setitem__(kind, value)
        # What a test has made of the reader is for that test.
        if (axes.read, tried.MOST_MEMORY, tried.MOST_MULTIPLY_ADDS) == _READER:
            try:
                held = io.BytesIO()
                _Pickler(held).dump(value)
                file = self._file(kind)
            except (_LocalError, pickle.PicklingError, TypeError, AttributeError):
                return
            whole = file.with_suffix(f".{os.getpid()}")
            whole.write_bytes(held.getvalue())
            whole.rename(file)

    def _found(self, kind: Any) -> bool:
        try:
            written = self._file(kind).read_bytes()
        except (_LocalError, FileNotFoundError):
            return False
        super().__setitem__(kind, pickle.loads(written))
        return True

    def _file(self, kind: Any) -> Path:
        return self._folder / hashlib.sha256(_text(kind).encode()).hexdigest()


class _Pickler(pickle.Pickler):
    """Writes the classes that a cut swaps in as what makes them of the uncut ones."""

    def reducer_override(self, thing: Any) -> Any:
        if isinstance(thing, type) and hasattr(thing, "uncut_class"):
            for swapped in settle.SWAPS.values():
                if swapped(thing.uncut_class) is thing:
                    return swapped, (thing.uncut_class,)
            raise _LocalError
        return NotImplemented


def _text(value: Any) -> str:
    """Return a text that stands for the same in all processes."""
    if isinstance(value, tuple):
        return f"({','.join(map(_text, value))})"
    if isinstance(value, frozenset):
        return f"{{{','.join(sorted(map(_text, value)))}}}"
    if isinstance(value, type | types.FunctionType | types.BuiltinFunctionType | types.MethodDescriptorType):
        found: Any = sys.modules.get(value.__module__ or "")
        for name in value.__qualname__.split("."):
            found = getattr(found, name, None)
        if found is not value and not (isinstance(value, type) and value.__module__ == "builtins"):  # as NoneType
            raise _LocalError
        return f"{value.__module__}:{value.__qualname__}"
    if isinstance(value, _WRITTEN):
        return repr(value)
    raise _LocalError


def share(folder: str) -> None:
    """Look for kinds of models in a folder, and write those into it that are read here."""
    known._of_kinds = Kinds(Path(folder))
