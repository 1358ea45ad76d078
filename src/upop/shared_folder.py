"""Folders that upop shares with others, such as run directories: a marker lists upop's files by name."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

from upop.errors import RunFolderError
from upop.files import remove_parts, write_text
from upop.ownership import DESCRIBED, MARKER, PART, Kind, Marker, contents, read_marker, shown, unmarked, walk

_LOGS = (".log", ".out", ".err")  # of shells and schedulers, which make them before a run begins


class SharedFolder:
    """A folder in which upop writes files one by one, listed in its marker.

    A name is claimed before the file is written, and only if it is free or already upop's. Files of others are never
    replaced, and only claimed files are removed.

    Args:
        path: the folder.
        kind: its kind.
        folders: names of subfolders that upop writes to; others are ignored.
        recognised: (relative name, path) -> whether a file is upop's though it was never claimed.
    """

    def __init__(
        self,
        path: Path,
        kind: Kind,
        folders: Collection[str] = (),
        recognised: Callable[[str, Path], bool] = lambda _name, _path: False,
    ) -> None:
        self.path = path
        self._kind: Kind = kind
        self._folders = folders
        self._recognised = recognised

    def check(self) -> None:
        """Refuse a folder with files that upop did not write, except .log, .out, .err, and subfolders of other names.

        Raises:
            RunFolderError: there are such files; the message names them.
        """
        if not self.path.is_dir():
            return
        try:
            ours, foreign = self._ours(), self._foreign()
        except OSError as error:
            raise RunFolderError(f"{self.path} cannot be read: {error.strerror}. Choose another place.") from error
        if not foreign:
            return
        marker = read_marker(self.path) or unmarked(self.path)
        if marker is None:
            holds = "it holds files that upop did not write"
        elif ours is None:
            holds = f"it holds {DESCRIBED[marker.kind]} of upop, not {DESCRIBED[self._kind]}"
        else:
            holds = f"it holds {DESCRIBED[self._kind]} of upop, and files that upop did not write, or that were changed"
        raise RunFolderError(
            f"{self.path} already exists: {holds}: {shown(foreign)}. Nothing was changed. Give a new or an empty "
            "folder, or move these files away."
        )

    def claim(self, name: str) -> Path:
        """Record a file as upop's, and return its path, to be written with `replace=True`.

        Args:
            name: the file, relative to the folder.

        Raises:
            RunFolderError: the file exists and is not upop's, or the folder is not.
        """
        path = self.path / name
        ours = self._ours()
        if ours is None:
            self.check()
            ours = frozenset()
        if name not in ours:
            if os.path.lexists(path) and not self._is_recognised(name):
                raise RunFolderError(
                    f"{path} already exists, and upop did not write it. It is unchanged. Move it away."
                )
            self._write(ours | {name})
        return path

    def glob(self, pattern: str) -> set[str]:
        """Return the relative names of all files that match a pattern, of upop or not."""
        return {path.relative_to(self.path).as_posix() for path in self.path.glob(pattern)}

    def own(self, names: Iterable[str]) -> None:
        """Record files as upop's that a library has just made for it."""
        self._write((self._ours() or frozenset()).union(names))

    def remove(self, names: Iterable[str]) -> None:
        """Remove claimed files and release their names; other files are kept."""
        ours = self._ours() or frozenset()
        gone = {name for name in names if name in ours or self._is_recognised(name)}
        for name in gone:
            (self.path / name).unlink(missing_ok=True)
        if gone & ours:
            self._write(ours - gone)

    def remove_parts(self) -> None:
        """Remove remains of killed processes in the folder and in the folders of its files."""
        parents = {parent for name in self._ours() or () for parent in Path(name).parents}
        for folder in {Path(), *parents}:
            remove_parts(self.path / folder)

    def _ours(self) -> frozenset[str] | None:
        """Return the names that are upop's; None if the folder is not."""
        marker = read_marker(self.path) or (unmarked(self.path) if self.path.is_dir() else None)
        return frozenset(marker.files) if marker is not None and marker.kind == self._kind else None

    def _write(self, names: Iterable[str]) -> None:
        write_text(self.path / MARKER, Marker(kind=self._kind, files=dict.fromkeys(names)).text(), replace=True)

    def _is_recognised(self, name: str) -> bool:
        return self._recognised(name, self.path / name)

    def _foreign(self) -> list[str]:
        ours, foreign = self._ours(), []
        for path in sorted(self.path.iterdir()):
            mode = path.lstat().st_mode
            if path.name == MARKER or PART.fullmatch(path.name) or (stat.S_ISREG(mode) and path.suffix in _LOGS):
                continue
            if stat.S_ISDIR(mode):
                foreign += self._foreign_in(path, ours) if path.name in self._folders else []
            elif path.name not in (ours or ()) and not self._is_recognised(path.name):
                foreign.append(path.name)
        return foreign

    def _foreign_in(self, folder: Path, ours: frozenset[str] | None) -> list[str]:
        """Return the relative names of files in a subfolder that are not upop's."""
        if (read_marker(folder) or unmarked(folder)) is not None:
            found = contents(folder)
            foreign = [*found.foreign, *found.changed] if found.kind in ("model", "examples") else []
            return [f"{folder.name}/{name}" for name in foreign]
        if ours is None:
            return [f"{folder.name}/"] if any(folder.iterdir()) else []
        names = [f"{folder.name}/{name}" for name in walk(folder)[0]]
        parts = [name for name in names if any(PART.fullmatch(part) for part in Path(name).parts)]
        return [name for name in names if name not in (*ours, *parts) and not self._is_recognised(name)]
