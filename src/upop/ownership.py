"""Determines which files upop wrote, and may replace: a marker in every folder lists them.

A folder that is written as a whole (a model, graphs, examples) has a marker with a digest per file, and is replaced
only if it holds nothing else. A folder that upop shares with others (a run) has a marker with names alone. Folders of
older versions, without a marker, are recognised by their content.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from upop.errors import RunFolderError
from upop.pruning.errors import some_of
from upop.reading import parse_json, read_text

Kind = Literal["model", "graphs", "examples", "run", "trackers", "demo", "data"]
"""Kinds of folders; the first three are written and replaced as a whole."""
WHOLE: tuple[Kind, ...] = ("model", "graphs", "examples")
MARKER = ".upop-files.json"
PART = re.compile(r"\.upop-\w+\.part")
"""Names of temporary folders, in which files are written before they are renamed."""
DESCRIBED = {
    "model": "a model",
    "graphs": "exported graphs",
    "examples": "a run's examples",
    "run": "a run",
    "trackers": "a run's trackers",
    "demo": "a demo",
    "data": "generated data",
}
_SHOWN_BYTES = 40

State = Mapping[str, tuple[int, int, int]]
"""Relative name -> inode, size and time of every file in a folder, to detect changes."""


class Marker(BaseModel):
    """The marker of a folder.

    Attributes:
        kind: kind of the folder.
        files: relative name of each file that upop wrote -> SHA-256 of its content; None if only the name counts.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    kind: Kind
    files: Mapping[str, str | None]

    def text(self) -> str:
        """Return the content of the file, which is the same for the same files."""
        return json.dumps({**self.model_dump(), "files": dict(sorted(self.files.items()))}, indent=1) + "\n"


@dataclass(frozen=True)
class Contents:
    """The content of a folder.

    Attributes:
        kind: its kind; None if it is not a folder of upop.
        foreign: relative names of files that upop did not write.
        changed: relative names of files of upop that were changed.
        state: state of all files.
    """

    kind: Kind | None
    foreign: tuple[str, ...]
    changed: tuple[str, ...]
    state: State


def marker_of(folder: Path, kind: Kind) -> Marker:
    """Return the marker for a newly written folder, with a digest per file."""
    names = [name for name in _files(folder) if name != MARKER]
    return Marker(kind=kind, files={name: _digest(folder / name) for name in names})


def read_marker(folder: Path) -> Marker | None:
    """Return the marker of a folder; None if it has no valid one."""
    try:
        return Marker.model_validate(_json(folder / MARKER))
    except ValidationError:
        return None


def contents(folder: Path) -> Contents:
    """Examine a folder that is written as a whole, file by file."""
    marker = read_marker(folder) or unmarked(folder)
    if marker is None:  # a large one, maybe: it is not walked through
        return Contents(None, tuple(sorted(path.name for path in folder.iterdir())), (), {})
    files, folders = walk(folder)
    state = {name: _identity(found) for name, found in files.items()}
    ours = {MARKER, *marker.files}
    parents = {parent.as_posix() for name in ours for parent in Path(name).parents}
    foreign = [name for name in files if name not in ours]
    foreign += [f"{name}/" for name in folders if name not in parents]
    changed = []
    for name, digest in marker.files.items():
        if name not in files:
            continue
        if not stat.S_ISREG(files[name].st_mode):
            foreign.append(name)
        elif digest is not None and _digest(folder / name) != digest:
            changed.append(name)
    return Contents(marker.kind, tuple(sorted(foreign)), tuple(sorted(changed)), state)


def real_folder(folder: Path) -> Path:
    """Return the real path of a folder to write, following a link to a folder.

    Raises:
        RunFolderError: the name belongs to something else.
    """
    try:
        if folder.is_dir():
            return folder.resolve()
        found = os.lstat(folder)
    except FileNotFoundError:
        return folder.absolute()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise RunFolderError(f"{folder} cannot be written: {reason}. Choose another place.") from error
    raise RunFolderError(
        f"{folder} should be a folder, but there is {_thing(folder, found)} of that name. Nothing was changed. "
        "Choose another name."
    )


def refuse_foreign_folder(folder: Path, kind: Kind | None, *, overwrite: bool = False) -> State | None:
    """Refuse to replace a folder unless it is upop's, of this kind, and unchanged.

    Args:
        folder: its real path.
        kind: the kind of the new folder; None replaces only an empty folder.
        overwrite: whether to replace a folder of another kind, or with changed files, too.

    Returns:
        The state of its files; None if there is no folder.

    Raises:
        RunFolderError: it holds something else; the message names it.
    """
    if not folder.exists():
        return None
    try:
        found = contents(folder)
    except OSError as error:
        raise RunFolderError(f"{folder} cannot be read: {error.strerror}. Choose another place.") from error
    if found.kind is None and not found.foreign:
        return {}
    _refuse(folder, found, kind, overwrite)
    mounted = os.path.ismount(folder)
    if mounted or _holds_working_directory(folder):
        what = "where a file system is mounted" if mounted else "the working directory, or above it"
        raise RunFolderError(
            f"{folder} holds {DESCRIBED[str(found.kind)]} and cannot be replaced as a whole: it is {what}. Name a "
            f"folder "
            "inside it, or empty it first."
        )
    return found.state


def _holds_working_directory(folder: Path) -> bool:
    try:
        return Path.cwd().is_relative_to(folder)
    except OSError:  # it was removed
        return False


def _refuse(folder: Path, found: Contents, kind: Kind | None, overwrite: bool) -> None:
    if found.kind is None or kind is None:
        raise RunFolderError(
            f"{folder} already exists, and upop did not write what it holds: {shown(found.foreign)}. "
            "Nothing was changed. Give a new or an empty folder."
        )
    if found.kind not in WHOLE:
        raise RunFolderError(
            f"{folder} already exists and holds {DESCRIBED[found.kind]} of upop, with "
            f"{shown(sorted({name.partition('/')[0] for name in found.state} - {MARKER}))}, "
            f"which {DESCRIBED[kind]} would replace. Nothing was changed. Give a new folder, or one inside it."
        )
    if found.foreign:
        raise RunFolderError(
            f"{folder} already exists: it holds {DESCRIBED[found.kind]} that upop wrote, and files that upop did "
            f"not write: {shown(found.foreign)}. Nothing was changed. Move those away, or give another folder."
        )
    if overwrite:
        return
    if found.kind != kind:
        raise RunFolderError(
            f"{folder} already exists and holds {DESCRIBED[found.kind]} of upop, which {DESCRIBED[kind]} would "
            "replace. Nothing was changed. Give another folder, or allow it (overwrite=True, --overwrite)."
        )
    if found.changed:
        raise RunFolderError(
            f"{folder} already exists, and these files in it were changed since upop wrote them: "
            f"{shown(found.changed)}. Nothing was changed. Give another folder, or allow replacing them "
            "(overwrite=True, --overwrite)."
        )


def refuse_foreign_file(path: Path, replace: bool | Callable[[Path], bool]) -> tuple[int, int, int] | None:
    """Refuse to replace a file that is not upop's.

    Args:
        path: the file.
        replace: whether to replace an existing file; a function decides by its content.

    Returns:
        The identity of the file, to detect that another one took its place; None if there is no file.

    Raises:
        RunFolderError: it may not be replaced; the message describes it.
    """
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise RunFolderError(f"{path} cannot be written: {reason}. Choose another place.") from error
    if not stat.S_ISREG(found.st_mode):
        raise RunFolderError(
            f"{path} should be a file, but there is {_thing(path, found)} of that name. Nothing was changed. Choose "
            "another name."
        )
    if not (replace(path) if callable(replace) else replace):
        raise RunFolderError(
            f"{path} already exists: {_thing(path, found)} that upop did not write, or that is of another kind. "
            "Nothing was changed. Choose another name, or allow replacing it (overwrite=True, --overwrite)."
        )
    return _identity(found)


def state_of(folder: Path) -> State:
    """Return the state of the files in a folder."""
    return {name: _identity(found) for name, found in _files(folder).items()}


def identity_of(path: Path) -> tuple[int, int, int]:
    """Return the identity of a file, to detect changes."""
    return _identity(os.lstat(path))


def wrote_archive(path: Path) -> bool:
    """Whether a file is an archive of tensors that upop wrote."""
    # torch puts the name of the file that it wrote before those of the records, behind 30 bytes of the first one.
    return bool(_ARCHIVE.match(_head(path, 512)[30:]))


def has_fields(names: Iterable[str]) -> Callable[[Path], bool]:
    """Return a function that checks whether a file holds a JSON object with these fields."""
    wanted = set(names)
    return lambda path: isinstance(found := _json(path), dict) and wanted <= set(found)


def wrote_page(path: Path) -> bool:
    """Whether a file is a page of one or several runs that upop wrote."""
    head = _head(path, 512)
    return _PAGE in head or head.startswith(_PAGE_BEFORE)


def wrote_image(path: Path) -> bool:
    """Whether a file is a PNG that upop wrote."""
    head = _head(path, 1024)
    return head.startswith(b"\x89PNG") and b"tEXtSoftware\0" + SOFTWARE.encode() in head


SOFTWARE = "upop"
"""The `Software` field of upop's PNG files."""
_ARCHIVE = re.compile(rb"written-by-upop/|\.[^/]+\.\d+/")  # the second as upop 0.1 called them
_PAGE = b'<meta name="generator" content="upop">'
_PAGE_BEFORE = b"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>"""  # of upop 0.1
ARCHIVE = "written-by-upop"
"""Stem of files while they are written."""


def shown(names: Iterable[str]) -> str:
    """Return some file names for a message; control characters are escaped."""
    return some_of([name if name.isprintable() else ascii(name) for name in names])


def _head(path: Path, size: int) -> bytes:
    """Return the first bytes of a regular file; none of anything else, since reading a pipe would block."""
    try:
        if not stat.S_ISREG(os.lstat(path).st_mode):
            return b""
        with path.open("rb") as file:
            return file.read(size)
    except OSError:
        return b""


def walk(folder: Path) -> tuple[dict[str, os.stat_result], list[str]]:
    """Return the files and the folders in a folder, recursively, by relative names; links are not followed."""
    files, folders, waiting = {}, [], [""]
    while waiting:
        inside = waiting.pop()
        with os.scandir(folder / inside) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    folders.append(f"{inside}{entry.name}")
                    waiting.append(f"{inside}{entry.name}/")
                else:
                    files[f"{inside}{entry.name}"] = entry.stat(follow_symlinks=False)
    return files, folders


def _files(folder: Path) -> dict[str, os.stat_result]:
    return walk(folder)[0]


def _identity(found: os.stat_result) -> tuple[int, int, int]:
    return found.st_ino, found.st_size, found.st_mtime_ns


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _json(path: Path) -> Any:
    """Return the content of a JSON file; None if it is invalid, or a link."""
    try:
        return None if path.is_symlink() else parse_json(read_text(path), nan=True)
    except (OSError, ValueError):
        return None


def _thing(path: Path, found: os.stat_result) -> str:
    """Describe the thing at a path, for messages."""
    if stat.S_ISLNK(found.st_mode):
        return f"a link to {str(path.readlink())!r}"
    if stat.S_ISDIR(found.st_mode):
        names = sorted(found.name for found in path.iterdir()) if os.access(path, os.R_OK) else []
        return f"a folder with {shown(names)}" if names else "a folder"
    if not stat.S_ISREG(found.st_mode):
        return "a device, a pipe or a socket"
    head = _head(path, _SHOWN_BYTES)
    return f"a file of {found.st_size:,} bytes" + (f", which begins {ascii(head)[1:]}," if head else "")


# Folders without markers: those of upop 0.1, and generated data ------------------------------------------------------

_MODEL_NAMES = re.compile(
    r"upop\.json|config\.json|generation_config\.json|README\.md|model(-\d{5}-of-\d{5})?\.safetensors"
    r"|model\.safetensors\.index\.json"
)
_RUN_NAMES = re.compile(
    r"settings\.yaml|versions\.json|metrics\.jsonl|plan\.json|scores\.safetensors|results\.json|bad_images\.json"
    r"|report\.html|figures/(kept|history)\.png|result/[^/]+|blended/.+\.png|checkpoints/step-\d{8,12}\.pt"
    r"|trackers/upop/(.+/)?events\.out\.tfevents\.[^/]+|(.+/)?\.[^/]+\.\d+\.part"
)


def unmarked(folder: Path) -> Marker | None:
    """Return the marker of a folder of an older version, which has none; None if upop did not write it."""
    for kind, names_of in _EARLIER.items():
        if (names := names_of(folder)) is not None:
            return Marker(kind=kind, files=dict.fromkeys(names))
    return None


def _model_names(folder: Path) -> list[str] | None:
    found = _json(folder / "upop.json")
    if not isinstance(found, dict) or not {"format", "model", "class", "config", "plan", "versions"} <= set(found):
        return None
    return [name for name in _files(folder) if _MODEL_NAMES.fullmatch(name)]


def _graph_names(folder: Path) -> list[str] | None:
    found = _json(folder / "export.json")
    if not isinstance(found, dict) or not {"format", "model", "graphs"} <= set(found):
        return None
    graphs = found["graphs"] if isinstance(found["graphs"], dict) else {}
    files = [str(graph["file"]) for graph in graphs.values() if isinstance(graph, dict) and "file" in graph]
    return ["export.json", *(name for file in files for name in (file, f"{file}.data"))]


def _example_names(folder: Path) -> list[str] | None:
    found = _json(folder / "examples.json")
    if not isinstance(found, dict) or not {"split", "about"} <= set(found):
        return None
    return ["examples.json", *_images(found.get("samples", found.get("records")))]


_IMAGES = ("images", "pictures")
"""Names of lists of files in examples.json, present and former."""


def _images(content: Any) -> list[str]:
    """Return all names in the lists of images."""
    if isinstance(content, list):
        return [name for each in content for name in _images(each)]
    if not isinstance(content, dict):
        return []
    own = [content[key] for key in _IMAGES if isinstance(content.get(key), list)]
    rest = [name for key, each in content.items() if key not in _IMAGES for name in _images(each)]
    return [*(str(name) for names in own for name in names), *rest]


def _run_names(folder: Path) -> list[str] | None:
    found = _json(folder / "versions.json")
    if not isinstance(found, dict) or not {"task", "verb", "command", "python", "libraries"} <= set(found):
        return None
    return [name for name in _files(folder) if _RUN_NAMES.fullmatch(name)]


def _data_names(folder: Path) -> list[str] | None:
    found = _json(folder / "shapes.json")
    return ["shapes.json"] if isinstance(found, dict) and {"version", "task", "seed", "size"} <= set(found) else None


def _demo_names(folder: Path) -> list[str] | None:
    if _data_names(folder / "data") is None:
        return None
    found = [path.name for path in folder.iterdir()]
    known = {"data", "upop", "magnitude", "examples", "results.json", "report.html"}
    return ["results.json", "report.html"] if known.issuperset(found) else None


_EARLIER: Mapping[Kind, Callable[[Path], list[str] | None]] = {
    "model": _model_names,
    "graphs": _graph_names,
    "examples": _example_names,
    "run": _run_names,
    "data": _data_names,
    "demo": _demo_names,
}
