"""The run directory: settings, metrics and results of a run."""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from upop.checkpoints import save
from upop.checkpoints.files.weights import write_weights
from upop.checkpoints.fitting.carried import set_preparation
from upop.errors import RunFolderError
from upop.files import remove_folder, remove_parts, replacing_file, write_text
from upop.ownership import wrote_archive, wrote_image, wrote_page
from upop.pruning import Plan
from upop.pruning.masks import unwrapped
from upop.reading import read_json, read_lines, read_object, reason
from upop.runs.checkpoints import Checkpoints
from upop.runs.identity import LIBRARIES
from upop.runs.lock import NAME as LOCK
from upop.runs.lock import FolderLock
from upop.runs.progress import LOGGER
from upop.settings import RunSettings
from upop.shared_folder import SharedFolder

_BAD_IMAGES = "bad_images.json"
_BAD_IMAGE = [{"image", "file", each, "reason"} for each in ("sample", "record")]  # as earlier versions wrote it
_RESTORE = "It was written by this run; restore it."
_PAGE = "report.html"
_FOLDERS = ("best", "last", "examples", "checkpoints", "figures", "result", "blended", "trackers", "vocabulary")
_CHECKPOINT = re.compile(r"checkpoints/step-\d{8,12}\.pt")
_SPARE_BYTES = 50 * 2**20


class RunFolder:
    """Writes the files of a run, on the main process.

    settings.yaml, versions.json, metrics.jsonl, plan.json, scores.safetensors, results.json, best/, last/, figures/,
    examples/, checkpoints/, and bad_images.json if images could not be read.

    The directory is locked for this run until it is closed.

    Args:
        path: the directory.
        main: whether this is the main process.
        keep: how many checkpoints to keep.
        notify: called with a line about an ended run that held the directory.

    Raises:
        RunFolderError: the directory cannot be written, another run uses it, or the disk is almost full.
    """

    def __init__(self, path: Path, main: bool, keep: int = 2, notify: Callable[[str], None] = LOGGER.info) -> None:
        self.path = path
        self._main = main
        self._shared = SharedFolder(path, "run", _FOLDERS, _is_of_runs)
        self._metrics = path / "metrics.jsonl"
        self._started = time.monotonic()
        self.listeners: list[Callable[[Mapping[str, Any]], None]] = []  # called with every row of metrics.jsonl
        self.checkpoints = Checkpoints(path / "checkpoints", keep)
        self.preparation: Mapping[str, Any] | None = None
        self.tokenizer: Any = None
        self._lock: FolderLock | None = None
        if main:
            _check_writable(path)
            self._lock = FolderLock(path, notify)

    def close(self) -> None:
        """Release the directory."""
        if self._lock is not None:
            self._lock.release()

    @property
    def seconds(self) -> float:
        """Seconds of the run so far, including those before it was resumed, up to its checkpoint."""
        return time.monotonic() - self._started

    def check(self) -> None:
        """Refuse a directory with an unfinished run or with files of others.

        Raises:
            RunFolderError: it holds such files; the message says which.
        """
        if not self._main:
            return
        results = self.path / "results.json"
        if self.checkpoints.exist() and not results.exists():
            raise RunFolderError(
                f"{self.path} holds an unfinished run, which this one would replace. Resume it (the command that "
                "started it, with --resume), choose another --output-dir, or remove the folder "
                f"{self.path / 'checkpoints'}."
            )
        self._shared.check()

    def claim(self, name: str) -> Path:
        """Register a file of the run and return its path, for writing with `replace=True`; main process only.

        Raises:
            RunFolderError: the file exists and is not upop's.
        """
        return self._shared.claim(name)

    def start(self, settings: RunSettings, task: str, verb: str) -> None:
        """Write the settings and the library versions; remove the files of an older, finished run.

        Raises:
            RunFolderError: the directory holds an unfinished run, or files that upop did not write.
        """
        if self._main:
            self.check()
            self._clear()
        self._write("settings.yaml", settings.to_yaml())
        self._write_versions(_versions(task, verb))
        self._write("metrics.jsonl", "")

    def restore(self, settings: RunSettings, task: str, verb: str, changes: Sequence[Mapping[str, Any]]) -> None:
        """Restore lost settings files of a resumed run, and record what changed since it began.

        Args:
            settings: of the run.
            task: its name.
            verb: what it does.
            changes: "step" -> after which step, "changed" -> what, in words.
        """
        if not (self.path / "settings.yaml").is_file():
            self._write("settings.yaml", settings.to_yaml())
        before = self.versions()
        versions = {**(before or _versions(task, verb)), **({"changes": list(changes)} if changes else {})}
        if versions != before:
            self._write_versions(versions)

    def write_settings(self, settings: RunSettings) -> None:
        """Rewrite settings.yaml after the batch size was determined."""
        self._write("settings.yaml", settings.to_yaml())

    def resume(self, metrics: int, seconds: float) -> str:
        """Resume from a checkpoint: truncate metrics.jsonl to its recorded size, and continue the clock.

        Returns:
            A problem with metrics.jsonl, in words; "" if there is none.

        Raises:
            RunFolderError: it cannot be written.
        """
        self._started -= seconds
        if not self._main:
            return ""
        self._remove_parts()
        try:
            with self._metrics.open("a+b") as file:
                found = file.seek(0, os.SEEK_END)
                file.truncate(min(metrics, found))
                if found < metrics:  # drop a truncated last row, which would spoil the next one
                    file.seek(0)
                    file.truncate(file.read().rfind(b"\n") + 1)
        except OSError as error:
            raise RunFolderError(f"{self._metrics} cannot be written: {error.strerror or error}.") from error
        if found >= metrics:
            return ""
        return (
            f"{self._metrics} has {found} bytes, but {metrics} had been written at the checkpoint: rows of earlier "
            "steps are lost. The run continues without them."
        )

    def metrics_size(self) -> int:
        """Return the size of metrics.jsonl in bytes."""
        return self._metrics.stat().st_size if self._metrics.exists() else 0

    def log(self, row: dict[str, Any]) -> None:
        """Append a row to metrics.jsonl."""
        if self._main:
            try:
                with self._metrics.open("a") as file:
                    file.write(json.dumps(row) + "\n")
            except OSError as error:
                raise RunFolderError(f"Could not write {self._metrics}: {error}. Free some space.") from error
            for listener in self.listeners:
                listener(row)

    def metrics(self) -> list[dict[str, Any]]:
        """Return all readable rows of metrics.jsonl; damaged rows do not end a run."""
        try:
            return [row for row in read_lines(self._metrics) if isinstance(row, dict)]
        except FileNotFoundError:
            return []
        except (OSError, ValueError) as error:
            raise RunFolderError(f"{self._metrics} cannot be read: {reason(error)}. {_RESTORE}") from error

    def command(self) -> str:
        """Return the command that started the run; "" if unknown."""
        return str(self.versions().get("command", ""))

    def changes(self) -> list[dict[str, Any]]:
        """Return the changes recorded by `restore`, as "step" and "changed"."""
        return list(self.versions().get("changes", []))

    def versions(self) -> dict[str, Any]:
        """Return the content of versions.json; {} if it cannot be read."""
        try:
            return read_object(self.path / "versions.json", RunFolderError, _RESTORE)
        except RunFolderError:
            return {}

    def save_plan(self, plan: Plan) -> None:
        """Write plan.json."""
        self._write("plan.json", plan.to_json())

    def save_scores(self, scores: Mapping[str, Tensor]) -> None:
        """Write scores.safetensors: the accumulated importance of every group at the end of the search, [channels]."""
        if self._main:
            with replacing_file(self.claim("scores.safetensors"), replace=True) as part:
                write_weights(scores, part)

    def save_bad_images(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write bad_images.json: the unreadable image files that were skipped."""
        self._write(_BAD_IMAGES, json.dumps(rows, indent=1))

    def bad_images(self) -> list[dict[str, Any]]:
        """Return the rows of bad_images.json; none without the file."""
        path = self.path / _BAD_IMAGES
        rows = read_json(path, RunFolderError, _RESTORE) if path.is_file() else []
        if not isinstance(rows, list) or not all(isinstance(row, dict) and set(row) in _BAD_IMAGE for row in rows):
            raise RunFolderError(f"{path} is damaged: it is not a list of unreadable files. {_RESTORE}")
        return rows

    def save_files(self, files: Mapping[str, Any]) -> None:
        """Write JSON files under result/."""
        for name, content in files.items():
            self._write(f"result/{name}", json.dumps(content))

    def save_model(self, name: str, model: nn.Module) -> Path:
        """Write a checkpoint folder ("best" or "last")."""
        if self._main:
            set_preparation(unwrapped(model), self.preparation)
            save(model, self.path / name, tokenizer=self.tokenizer)
        return self.path / name

    def _clear(self) -> None:
        self._remove_parts()
        self.checkpoints.remove()
        self._shared.remove([_BAD_IMAGES, "results.json", "plan.json", "scores.safetensors", _PAGE])
        remove_folder(self.path / "examples", "examples")

    def _remove_parts(self) -> None:
        self._shared.remove_parts()
        remove_parts(self.path / "checkpoints")

    def _write_versions(self, content: Mapping[str, Any]) -> None:
        self._write("versions.json", json.dumps(content, indent=1))

    def _write(self, name: str, text: str) -> None:
        if self._main:
            write_text(self.claim(name), text, replace=True)


def _is_of_runs(name: str, path: Path) -> bool:
    """Whether an unregistered file is upop's: a checkpoint, a lock, or by content a page, an image or weights."""
    if name == LOCK or _CHECKPOINT.fullmatch(name):
        return True
    return wrote_page(path) or wrote_image(path) or wrote_archive(path)


def _versions(task: str, verb: str) -> dict[str, Any]:
    return {
        "task": task,
        "verb": verb,
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "python": sys.version.split()[0],
        "libraries": {name: metadata.version(name) for name in LIBRARIES},
    }


def _check_writable(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path) as probe:
            probe.write(b"upop")
        space = os.statvfs(path)
    except OSError as error:
        raise RunFolderError(
            f"The run directory {path} cannot be written: {error.strerror or error}. Choose another --output-dir."
        ) from error
    if space.f_bavail * space.f_frsize < _SPARE_BYTES:
        raise RunFolderError(
            f"The disk of the run directory {path} has {space.f_bavail * space.f_frsize // 2**20} MiB left, "
            f"and a run needs at least {_SPARE_BYTES // 2**20} MiB. Free some space or choose another --output-dir."
        )
