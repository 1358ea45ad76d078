"""The run folder: what was asked, what happened, and what came out."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from torch import nn

from upop.checkpoints import save
from upop.errors import RunFolderError
from upop.files import write_text
from upop.pruning import Plan
from upop.settings import RunSettings

_LIBRARIES = ("upop", "torch", "torchvision", "timm", "transformers", "accelerate", "safetensors")
_SPARE_BYTES = 50 * 2**20


class RunFolder:
    """Writes a run's files; only the main process does.

    settings.yaml, versions.json, metrics.jsonl, plan.json, results.json, best/, last/, figures/.

    Raises:
        RunFolderError: the folder cannot be made or written, or the disk is all but full.
    """

    def __init__(self, path: Path, main: bool) -> None:
        self.path = path
        self._main = main
        self._metrics = path / "metrics.jsonl"
        if main:
            _check_writable(path)

    def start(self, settings: RunSettings, task: str, verb: str) -> None:
        """Write down what was asked, with which libraries; an older run's metrics in the folder are replaced."""
        versions = {
            "task": task,
            "verb": verb,
            "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            "python": sys.version.split()[0],
            "libraries": {name: metadata.version(name) for name in _LIBRARIES},
        }
        self._write("settings.yaml", settings.to_yaml())
        self._write("versions.json", json.dumps(versions, indent=1))
        self._write("metrics.jsonl", "")

    def log(self, row: dict[str, Any]) -> None:
        """Append a row to metrics.jsonl."""
        if self._main:
            try:
                with self._metrics.open("a") as file:
                    file.write(json.dumps(row) + "\n")
            except OSError as error:
                raise RunFolderError(f"Could not write {self._metrics}: {error}. Free some space.") from error

    def metrics(self) -> list[dict[str, Any]]:
        """Return all rows of metrics.jsonl."""
        return [json.loads(line) for line in self._metrics.read_text().splitlines()]

    def save_plan(self, plan: Plan) -> None:
        """Write plan.json."""
        self._write("plan.json", plan.to_json())

    def save_files(self, files: Mapping[str, Any]) -> None:
        """Write JSON files under result/."""
        for name, content in files.items():
            self._write(f"result/{name}", json.dumps(content))

    def save_model(self, name: str, model: nn.Module, plan: Plan | None) -> Path:
        """Write a checkpoint folder ("best" or "last")."""
        if self._main:
            save(model, self.path / name, plan)
        return self.path / name

    def _write(self, name: str, text: str) -> None:
        if self._main:
            write_text(self.path / name, text)


def _check_writable(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".write-test-{os.getpid()}"
        probe.write_bytes(b"upop")
        probe.unlink()
        space = os.statvfs(path)
    except OSError as error:
        raise RunFolderError(
            f"The run folder {path} cannot be written: {error.strerror or error}. Choose another --output-dir."
        ) from error
    if space.f_bavail * space.f_frsize < _SPARE_BYTES:
        raise RunFolderError(
            f"The disk of the run folder {path} has {space.f_bavail * space.f_frsize // 2**20} MiB left, "
            f"and a run needs at least {_SPARE_BYTES // 2**20}. Free some space or choose another --output-dir."
        )
