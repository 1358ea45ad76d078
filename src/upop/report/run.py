"""A run folder, read for people: all that is there, and a sentence about each piece that is not."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from upop.errors import DataError, nearest
from upop.examples import FILE as EXAMPLES
from upop.examples import Examples
from upop.report.results import Results
from upop.report.shares import UnitShare

_SETTINGS, _VERSIONS, _METRICS, _RESULTS = "settings.yaml", "versions.json", "metrics.jsonl", "results.json"
_MODELS = ("best", "last")
_DESCRIPTION = "upop.json"  # of a model's folder
_SHOWN_NAMES = 8


@dataclass(frozen=True)
class Run:
    """What a run folder holds.

    Attributes:
        path: of the folder, as it was given.
        task: its name; "unknown" where versions.json is missing.
        verb: "train", "compress" or "evaluate".
        command: as it was typed.
        python: its version.
        libraries: name -> version.
        settings: as resolved.
        rows: of metrics.jsonl.
        results: what was measured at the end.
        shares: what every unit of the compressed model keeps.
        examples: held-out records with the models' answers.
        missing: sentences about what is not there.
    """

    path: Path
    task: str
    verb: str
    command: str
    python: str
    libraries: Mapping[str, str]
    settings: Mapping[str, Any]
    rows: tuple[Mapping[str, Any], ...]
    results: Results | None
    shares: tuple[UnitShare, ...]
    examples: Examples | None
    missing: tuple[str, ...]

    @property
    def name(self) -> str:
        """What the run is called beside others: its folder."""
        return self.path.name or str(self.path)

    @property
    def examples_folder(self) -> Path:
        """Where the pictures of the examples lie."""
        return self.path / "examples"

    @property
    def model(self) -> str:
        """The name of the model that the run is about: its last one; "" as long as there are no results."""
        return self.results.models[-1].name if self.results is not None else ""


def read_run(path: Path) -> Run:
    """Read a run folder, whole, unfinished, or with pieces missing.

    Raises:
        DataError: it is no run folder, or a file in it is damaged.
    """
    if not any((path / name).is_file() for name in (_SETTINGS, _VERSIONS)):
        raise DataError(f"{path} is no run folder{_instead(path)}")
    missing: list[str] = []
    versions = _mapping(path / _VERSIONS, json.loads)
    settings = _mapping(path / _SETTINGS, yaml.safe_load)
    if not versions:
        missing.append(f"{_VERSIONS} is missing: task, command and versions are unknown.")
    if not settings:
        missing.append(f"{_SETTINGS} is missing: the settings are unknown.")
    verb = str(versions.get("verb", "unknown"))
    rows = _rows(path / _METRICS, missing)
    results = Results.read(path / _RESULTS) if (path / _RESULTS).is_file() else None
    if results is None:
        again = " The command that it was started with goes on with it, with --resume." if _resumable(path) else ""
        missing.append(
            f"The run has not ended: {_RESULTS}, which its end writes, is not there yet.{_stand(rows)}{again}"
        )
    if not rows and verb != "evaluate":
        missing.append(f"{_METRICS} holds no step yet, so there are no curves.")
    shares = _shares(path, verb, str(settings.get("pretrained") or ""))
    if verb == "compress" and not shares:
        missing.append(
            "What every layer keeps is not known yet: no compressed model is in best/ or last/. It is there after the "
            "search."
        )
    examples = Examples.read(path / "examples") if (path / "examples" / EXAMPLES).is_file() else None
    if examples is None and results is not None:
        missing.append("There are no examples: the run was told to keep none, or was made by an earlier upop.")
    return Run(
        path=path,
        task=str(versions.get("task", "unknown")),
        verb=verb,
        command=str(versions.get("command", "")),
        python=str(versions.get("python", "")),
        libraries={str(name): str(version) for name, version in dict(versions.get("libraries") or {}).items()},
        settings=settings,
        rows=rows,
        results=results,
        shares=shares,
        examples=examples,
        missing=tuple(missing),
    )


def _instead(path: Path) -> str:
    """Return what is there in the place of a run, and what to do."""
    wanted = f"A run keeps {_SETTINGS} and {_VERSIONS} in its output_dir: give that folder."
    if not path.exists():
        parent = path.parent
        near = nearest(path.name, [other.name for other in parent.iterdir()]) if parent.is_dir() else ""
        return f": nothing is there{near}. {wanted}"
    if not path.is_dir():
        return f": it is a file. {wanted}"
    names = sorted(found.name for found in path.iterdir())
    inside = [name for name in names if (path / name / _VERSIONS).is_file()]
    if inside:
        runs = ", ".join(str(path / name) for name in inside[:_SHOWN_NAMES])
        return f", but it holds runs: {runs}. Give one of them, or several with --compare."
    if (path.parent / _VERSIONS).is_file():
        return f", but a part of the run {path.parent}. Give that folder."
    more = f" and {len(names) - _SHOWN_NAMES} more" if len(names) > _SHOWN_NAMES else ""
    found = f"it holds {', '.join(names[:_SHOWN_NAMES])}{more}" if names else "it is empty"
    return f": {found}. {wanted}"


def _mapping(path: Path, parse: Any) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = parse(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"expected a mapping, found {type(content).__name__}")
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise DataError(f"{path} is damaged: {error}. It was written when the run began; restore it.") from error
    return content


def _rows(path: Path, missing: list[str]) -> tuple[Mapping[str, Any], ...]:
    """Return the rows that can be read: of a run that is going on, the last one may be half written."""
    if not path.is_file():
        return ()
    rows, bad = [], 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            bad += 1
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int) and isinstance(row.get("phase"), str):
            rows.append(row)
    if bad:
        missing.append(f"{_METRICS} has lines that cannot be read, and are left out: {bad}.")
    return tuple(sorted(rows, key=lambda row: row["step"]))


def _resumable(path: Path) -> bool:
    return any((path / "checkpoints").glob("*.pt"))


def _stand(rows: tuple[Mapping[str, Any], ...]) -> str:
    if not rows:
        return ""
    return f" Its last row is of step {rows[-1]['step']:,}, phase {rows[-1]['phase']}."


def _shares(path: Path, verb: str, pretrained: str) -> tuple[UnitShare, ...]:
    """Return what the units of the run's compressed model keep of the dense model's entries; () for a dense one."""
    folders = [path / name for name in _MODELS] if verb != "evaluate" else [Path(pretrained)] if pretrained else []
    for folder in folders:
        content = _mapping(folder / _DESCRIPTION, json.loads)
        try:
            units = [
                UnitShare(name, str(unit["modality"]), unit["kind"], int(unit["of"]), int(unit["entries"]))
                for name, unit in content.get("layout", {}).items()
                if unit["of"] is not None
            ]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(f"{folder / _DESCRIPTION} is damaged: {error!r}. Write the model again.") from error
        if units:
            return tuple(units)
    return ()
