"""Files of the package beside its code: published settings and recipes (configs/), the demo's model (assets/)."""

from __future__ import annotations

import logging
import os
from functools import cache
from pathlib import Path

from upop.errors import nearest
from upop.plain import plain

_PACKAGE = Path(__file__).parent
_FOLDERS = ("configs", "assets")


def located(path: str | Path) -> Path:
    """Return `path`, or the package's file or folder of that name if the working directory has none.

    Only relative paths that begin with configs/ or assets/ are looked for in the package, as they are called in the
    repository. Once per path, a warning of the logger `upop` says which one was taken.
    """
    path = Path(path)
    found = _in_package(path)
    if found is None or exists(path) or not found.exists():
        return path
    _notify(path, found)
    return found


def nearest_packaged(path: Path) -> str:
    """Return a hint at the package's file with the nearest name; "" for paths outside of the package's folders."""
    found = _in_package(path)
    return "" if found is None else nearest(path.name, [other.name for other in found.parent.glob("*.yaml")])


def _in_package(path: Path) -> Path | None:
    parts = path.parts
    inside = not path.is_absolute() and len(parts) > 1 and parts[0] in _FOLDERS and ".." not in parts
    return _PACKAGE / path if inside else None


def exists(path: Path) -> bool:
    """Whether a path exists; False for impossible names."""
    try:
        return path.exists()
    except (OSError, ValueError):  # a name that no file can have
        return False


@cache
def _notify(path: Path, found: Path) -> None:
    if os.environ.get("RANK", "0") == "0":
        line = f"{path} is not in this folder; the one of the installed upop is used: {found}"
        logging.getLogger("upop").warning(plain(line))
