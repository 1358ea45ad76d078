"""Reads a run directory for a report: its content, and a sentence about each missing piece."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from upop.errors import DataError, SettingError, nearest
from upop.examples import FILE as EXAMPLES
from upop.examples import Examples
from upop.files import is_file
from upop.pruning.file_keys import FOLDER, current
from upop.pruning.groups import Kind
from upop.reading import read_lines, read_object, reason
from upop.report.results import Results
from upop.report.shares import GroupShare
from upop.values import problems
from upop.yaml_files import read_yaml

_SETTINGS, _VERSIONS, _METRICS, _RESULTS = "settings.yaml", "versions.json", "metrics.jsonl", "results.json"
_MODELS = ("best", "last")
_DESCRIPTION = "upop.json"  # of a model's folder
_SHOWN_NAMES = 8


class _Change(BaseModel):
    """Inputs that had changed when the run was resumed after a step."""

    step: int
    changed: tuple[str, ...]


class _Versions(BaseModel):
    """The content of versions.json."""

    task: str = "unknown"
    verb: str = "unknown"
    command: str = ""
    python: str = ""
    libraries: Mapping[str, str] = Field(default_factory=dict)
    changes: tuple[_Change, ...] = ()


class _Group(BaseModel):
    """A group in the layout of upop.json."""

    kind: Kind
    modality: str
    channels: int = Field(ge=0)
    of: int | None = Field(ge=1)


class _Description(BaseModel):
    """The layout in upop.json."""

    layout: Mapping[str, _Group] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _of_today(cls, content: Any) -> Any:
        return current(content, FOLDER)


class _Row(BaseModel):
    """A row of metrics.jsonl: the fields with fixed names; metrics have any name."""

    model_config = ConfigDict(strict=True, extra="allow")

    phase: str
    step: int = Field(ge=0, le=2**53)
    loss: float = 0.0
    lr: float = 0.0
    ratio: float = 0.0
    kept: dict[str, float] = Field(default_factory=dict)
    average: dict[str, float] = Field(default_factory=dict)


Content = TypeVar("Content", bound=BaseModel)


@dataclass(frozen=True)
class Run:
    """The content of a run directory.

    Attributes:
        path: of the directory, as given.
        task: its name; "unknown" without versions.json.
        verb: "train", "compress" or "evaluate".
        command: the command line.
        python: its version.
        libraries: name -> version.
        settings: as resolved.
        rows: of metrics.jsonl.
        results: the final results; None before the run has ended.
        shares: the channels that every group of the compressed model keeps.
        examples: held-out samples with the models' answers.
        missing: sentences about missing pieces, changed inputs and separate evaluations.
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
    shares: tuple[GroupShare, ...]
    examples: Examples | None
    missing: tuple[str, ...]

    @property
    def name(self) -> str:
        """The name of the run: that of its directory."""
        return self.path.name or str(self.path)

    @property
    def examples_folder(self) -> Path:
        """The folder of the examples' images."""
        return self.path / "examples"

    @property
    def model(self) -> str:
        """The name of the run's model, the last in its results; "" without results."""
        return self.results.models[-1].name if self.results is not None else ""


def read_run(path: Path) -> Run:
    """Read a run directory, which may be unfinished or incomplete.

    Raises:
        DataError: it is not a run directory, or a file in it is damaged.
    """
    if not any((path / name).is_file() for name in (_SETTINGS, _VERSIONS)):
        raise DataError(f"{path} is not a run directory{_instead(path)}")
    missing: list[str] = []
    versions = _read(path / _VERSIONS, _Versions)
    settings = _settings(path / _SETTINGS, missing)
    if not (path / _VERSIONS).is_file():
        missing.append(f"{_VERSIONS} is missing: task, command and versions are unknown.")
    if not is_file(path / _SETTINGS):
        missing.append(f"{_SETTINGS} is missing: the settings are unknown.")
    rows = _rows(path / _METRICS, missing)
    results = Results.read(path / _RESULTS) if (path / _RESULTS).is_file() else None
    if results is None:
        again = " The command that started it resumes it with --resume." if _resumable(path) else ""
        missing.append(f"The run has not ended: there is no {_RESULTS} yet.{_last_row(rows)}{again}")
    if not rows and versions.verb != "evaluate":
        missing.append(f"{_METRICS} has no steps yet, so there are no curves.")
    shares = _shares(path, versions.verb, str(settings.get("pretrained") or ""))
    if versions.verb == "compress" and not shares:
        missing.append(
            "The kept channels are not known yet: there is no compressed model in best/ or last/ before the search has "
            "ended."
        )
    examples = Examples.read(path / "examples") if (path / "examples" / EXAMPLES).is_file() else None
    if examples is None and results is not None:
        missing.append("There are no examples: the settings turn them off, or an earlier version of upop made the run.")
    missing += [
        f"The run was resumed after step {change.step:,} with changed inputs: {'; '.join(change.changed)}."
        for change in versions.changes
    ]
    missing += [f"There is a separate evaluation: {found}." for found in sorted((path / "evaluations").glob("*.json"))]
    return Run(
        path=path,
        **{name: value for name, value in vars(versions).items() if name != "changes"},
        settings=settings,
        rows=rows,
        results=results,
        shares=shares,
        examples=examples,
        missing=tuple(missing),
    )


def _instead(path: Path) -> str:
    """Return what the path holds instead of a run, and what to do."""
    wanted = f"A run writes {_SETTINGS} and {_VERSIONS} to its output_dir: give that folder."
    if not path.exists():
        parent = path.parent
        near = nearest(path.name, [other.name for other in parent.iterdir()]) if parent.is_dir() else ""
        return f": it does not exist{near}. {wanted}"
    if not path.is_dir():
        return f": it is a file. {wanted}"
    names = sorted(found.name for found in path.iterdir())
    inside = [name for name in names if (path / name / _VERSIONS).is_file()]
    if inside:
        runs = ", ".join(str(path / name) for name in inside[:_SHOWN_NAMES])
        return f", but it holds runs: {runs}. Give one of them, or several with --compare."
    if (path.parent / _VERSIONS).is_file():
        return f", but part of the run {path.parent}. Give that folder."
    more = f" and {len(names) - _SHOWN_NAMES} more" if len(names) > _SHOWN_NAMES else ""
    found = f"it holds {', '.join(names[:_SHOWN_NAMES])}{more}" if names else "it is empty"
    return f": {found}. {wanted}"


def _settings(path: Path, missing: list[str]) -> dict[str, Any]:
    """Return the settings; if they cannot be read, the page goes without, because it only shows them."""
    if not is_file(path):
        return {}
    try:
        content = read_yaml(path, "The file of settings")
        if not isinstance(content, dict):
            raise SettingError(f"{path} must hold 'key: value' lines, and holds a {type(content).__name__}.")
    except SettingError as error:
        missing.append(f"The settings are unknown. {error}")
        return {}
    return {str(name): value for name, value in content.items()}


def _read(path: Path, kind: type[Content]) -> Content:
    content = read_object(path, DataError, "Restore it, or write it again.", nan=True) if is_file(path) else {}
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        raise DataError(f"{path} is damaged: {problems(error)[0]}. Restore it, or write it again.") from error


def _rows(path: Path, missing: list[str]) -> tuple[Mapping[str, Any], ...]:
    """Return the readable rows; the last one of a running run may be incomplete."""
    if not is_file(path):
        return ()
    rows, bad = [], 0
    try:
        read = list(read_lines(path))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {reason(error)}. Restore it, or remove it to do without.") from error
    for row in read:
        if isinstance(row, ValueError):
            bad += 1
        elif isinstance(row, dict) and {"phase", "step"} <= set(row):
            try:
                _Row.model_validate(row)
                rows.append(row)
            except ValidationError:
                bad += 1
    if bad:
        missing.append(f"{_METRICS} has unreadable lines, which are left out: {bad}.")
    return tuple(sorted(rows, key=lambda row: row["step"]))


def _resumable(path: Path) -> bool:
    return any((path / "checkpoints").glob("*.pt"))


def _last_row(rows: tuple[Mapping[str, Any], ...]) -> str:
    if not rows:
        return ""
    return f" Its last row is from step {rows[-1]['step']:,}, phase {rows[-1]['phase']}."


def _shares(path: Path, verb: str, pretrained: str) -> tuple[GroupShare, ...]:
    """Return the kept channels of every group of the run's compressed model; () for a dense one."""
    folders = [path / name for name in _MODELS] if verb != "evaluate" else [Path(pretrained)] if pretrained else []
    for folder in folders:
        layout = _read(folder / _DESCRIPTION, _Description).layout
        groups = [
            GroupShare(name, group.modality, group.kind, group.of, group.channels)
            for name, group in layout.items()
            if group.of is not None
        ]
        if groups:
            return tuple(groups)
    return ()
