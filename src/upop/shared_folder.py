"""Folders that upop shares with others, such as a run's: what is ours there is written down, name by name."""

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
    """A folder in which upop writes files one by one; its marker names them.

    Its process claims a name before it writes: then either nothing has that name, or it is upop's already. So nothing
    of others is ever replaced, and what is removed is what was claimed.

    Args:
        path: of the folder.
        kind: what it is.
        folders: names of the folders in it that upop writes in; others are none of its business.
        recognised: whether a file is upop's though it was never claimed, by its name, relative to the folder, and by
            what is in it.
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
        """Refuse a folder that holds what upop did not write.

        Let be are files that end in .log, .out or .err, and folders of other names than upop's.

        Raises:
            RunFolderError: it does; the message says what.
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
            holds = "it holds what upop did not write"
        elif ours is None:
            holds = f"it holds {DESCRIBED[marker.kind]} of upop, and {DESCRIBED[self._kind]} is to be there"
        else:
            holds = (
                f"beside {DESCRIBED[self._kind]} of upop it holds what upop did not write, or what was changed since"
            )
        raise RunFolderError(
            f"{self.path} is there already: {holds}: {shown(foreign)}. Nothing was changed. Name a new or an empty "
            "folder, or move that away."
        )

    def claim(self, name: str) -> Path:
        """Write down that a file is upop's, and return its path, to be written with `replace=True`.

        Args:
            name: of the file, relative to the folder.

        Raises:
            RunFolderError: there is one that is not upop's, or a folder that is not.
        """
        path = self.path / name
        ours = self._ours()
        if ours is None:
            self.check()
            ours = frozenset()
        if name not in ours:
            if os.path.lexists(path) and not self._is_recognised(name):
                raise RunFolderError(
                    f"{path} is there already, and upop did not write it. It was left as it is. Move it away."
                )
            self._write(ours | {name})
        return path

    def glob(self, pattern: str) -> set[str]:
        """Return the relative names of all files, of upop or not, that a pattern fits."""
        return {path.relative_to(self.path).as_posix() for path in self.path.glob(pattern)}

    def own(self, names: Iterable[str]) -> None:
        """Write down that files are upop's which a library just made for it, and which were not there before."""
        self._write((self._ours() or frozenset()).union(names))

    def remove(self, names: Iterable[str]) -> None:
        """Remove files that were claimed, and write down that their names are free; others are left."""
        ours = self._ours() or frozenset()
        gone = {name for name in names if name in ours or self._is_recognised(name)}
        for name in gone:
            (self.path / name).unlink(missing_ok=True)
        if gone & ours:
            self._write(ours - gone)

    def remove_parts(self) -> None:
        """Remove what killed processes left in the folder and in the folders of its files."""
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
        """Return what is not upop's in a folder in this one, by relative names; folders alone are nothing."""
        if (read_marker(folder) or unmarked(folder)) is not None:
            found = contents(folder)
            foreign = [*found.foreign, *found.changed] if found.kind in ("model", "examples") else []
            return [f"{folder.name}/{name}" for name in foreign]
        if ours is None:
            return [f"{folder.name}/"] if any(folder.iterdir()) else []
        names = [f"{folder.name}/{name}" for name in walk(folder)[0]]
        parts = [name for name in names if any(PART.fullmatch(part) for part in Path(name).parts)]
        return [name for name in names if name not in (*ours, *parts) and not self._is_recognised(name)]
