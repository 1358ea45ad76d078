"""The folder of an evaluation: it never mixes with the files of the run or model that it evaluates."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from upop.errors import DataError
from upop.files import write_text
from upop.ownership import read_marker, unmarked
from upop.reading import read_object
from upop.settings import RunSettings

FOLDER = "evaluations"
_PARTS = ("best", "last", "checkpoints", "figures", "examples", "result", "trackers", FOLDER)  # of a run
_SIGNS = ("versions.json", "settings.yaml", "metrics.jsonl", "results.json", "upop.json")
_MODEL = "model.safetensors"
_DIGITS = 10


def evaluation_folder(task: str, settings: RunSettings, weights: Callable[[], str]) -> Path:
    """Return the folder of an evaluation: `output_dir` itself, or one under its `evaluations/` if it holds a run.

    The name is a digest of weights and settings, so only equal evaluations share a folder.

    Args:
        task: its name.
        settings: of the evaluation.
        weights: returns the digest of the checkpoint.
    """
    run = _owner(settings.output_dir)
    if run is None:
        return settings.output_dir
    what = settings.model_dump(mode="json", exclude=set(settings.passing))
    identity = json.dumps([task, weights(), what], sort_keys=True)
    model = re.sub(r"[^\w.-]+", "_", Path(str(settings.pretrained)).stem).strip("._") or "model"
    return run / FOLDER / f"{model}-{hashlib.sha256(identity.encode()).hexdigest()[:_DIGITS]}"


def write_summary(folder: Path, results: Mapping[str, Any], about: Mapping[str, Any]) -> Path:
    """Write the summary `evaluations/<name>.json` beside an evaluation's folder; return the file.

    Raises:
        RunFolderError: another file has that name, or it cannot be written.
    """
    path = folder.with_name(f"{folder.name}.json")
    content = {"evaluation": {**about, "when": time.strftime("%Y-%m-%d %H:%M:%S %z")}, **results}
    write_text(path, json.dumps(content, indent=1) + "\n", _is_summary)
    return path


def _is_summary(path: Path) -> bool:
    try:
        return "evaluation" in read_object(path, DataError, "")
    except DataError:
        return False


def is_evaluation_folder(folder: Path) -> bool:
    """Whether an evaluation's folder lies under the `evaluations/` of a run or a model."""
    return folder.parent.name == FOLDER and _owner(folder.parent) is not None


def _owner(folder: Path) -> Path | None:
    """Return the run or model folder that contains a folder; None if an evaluation may write there.

    The folder of an earlier evaluation counts as free.
    """
    if _verb(folder.parent) in ("train", "compress") and folder.name in _PARTS:
        return folder.parent
    if _verb(folder) == "evaluate":
        return None
    held = any((folder / name).exists() for name in _SIGNS) or any((folder / "checkpoints").glob("*.pt"))
    # Files of others under these names make no run: the folder is refused like any other that upop did not write.
    ours = held and (read_marker(folder) or unmarked(folder)) is not None
    return folder if ours or (folder / _MODEL).is_file() else None


def _verb(folder: Path) -> str:
    """Return the verb of a run by its versions.json; "" if unknown."""
    try:
        return str(read_object(folder / "versions.json", DataError, "Restore it.").get("verb", ""))
    except DataError:
        return ""
