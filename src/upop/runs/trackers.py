"""Trackers: every row of metrics.jsonl goes to TensorBoard, or any other tracker of Accelerate, as scalars."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, filter_trackers

from upop.errors import SettingError, nearest
from upop.files import make_folder
from upop.shared_folder import SharedFolder

PROJECT = "upop"
_EVENTS = f"{PROJECT}/events.out.tfevents.*"
_EXTRAS = ("tensorboard",)
_UNTRACKED = frozenset({"phase", "epoch", "step", "split", "seconds"})


def check_trackers(names: Sequence[str]) -> None:
    """Check that trackers can be used.

    Raises:
        SettingError: a name is unknown, or its package is not installed; the message says what to install.
    """
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            known = sorted(LOGGER_TYPE_TO_CLASS)
            raise SettingError(f"Tracker {name!r} is not known{nearest(name, known)}; known are {', '.join(known)}.")
        if LOGGER_TYPE_TO_CLASS[name].__module__.startswith("accelerate.") and find_spec(name) is None:
            package = f"'upop[{name}]'" if name in _EXTRAS else name
            raise SettingError(
                f"The package of tracker {name} is not installed. Install it: pip install {package}. Or leave it out "
                "of trackers (--tracker)."
            )


class Trackers:
    """The trackers of a run; only the main process logs to them.

    Local trackers write to `folder`; TensorBoard's events are in `folder/upop`.

    Args:
        accelerator: owns the trackers.
        names: Accelerate's names: tensorboard, wandb, ...
        folder: for the files of local trackers.

    Raises:
        SettingError: a name is unknown, or its package is not installed.
    """

    def __init__(self, accelerator: Accelerator, names: Sequence[str], folder: Path) -> None:
        check_trackers(names)
        self._accelerator, self._names, self._folder = accelerator, tuple(dict.fromkeys(names)), folder

    @contextmanager
    def running(self, rows: Iterable[Mapping[str, Any]]) -> Iterator[None]:
        """Start the trackers, and finish them after the block.

        Args:
            rows: of metrics.jsonl before the checkpoint that the run resumes from. TensorBoard's events are rewritten
                from them, so that steps after the checkpoint do not appear twice. Other trackers keep what they have;
                every row has its step, by which they can drop duplicates.
        """
        if not self._names or not self._accelerator.is_main_process:
            yield
            return
        self._start(rows)
        try:
            yield
        finally:
            for tracker in self._accelerator.trackers:
                tracker.finish()
            self._accelerator.trackers = []

    def _start(self, rows: Iterable[Mapping[str, Any]]) -> None:
        make_folder(self._folder / PROJECT)
        shared = SharedFolder(self._folder, "trackers")
        shared.remove(shared.glob(_EVENTS))
        others = shared.glob(_EVENTS)
        accelerator = self._accelerator
        accelerator.project_configuration.set_directories(str(self._folder))
        accelerator.log_with = filter_trackers(list(self._names), str(self._folder))
        # A resumed run continues the same run of W&B.
        key = hashlib.sha256(str(self._folder.absolute()).encode()).hexdigest()[:16]
        own = {"wandb": {"dir": str(self._folder), "id": key, "resume": "allow", "name": self._folder.parent.name}}
        accelerator.init_trackers(PROJECT, init_kwargs=own)
        shared.own(shared.glob(_EVENTS) - others)
        boards = [tracker for tracker in accelerator.trackers if tracker.name == "tensorboard"]
        for row in rows if boards else ():
            boards[0].log(scalars(row), step=row["step"])

    def log(self, row: Mapping[str, Any]) -> None:
        """Log a row of metrics.jsonl at its step; outside `running` nothing is logged."""
        if self._accelerator.trackers:
            self._accelerator.log(scalars(row), step=row["step"])


def scalars(row: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a row of metrics.jsonl, under their names in trackers.

    Training rows keep their names (loss, lr, ratio, waiting, kept/vision); evaluation rows begin with the split
    (dev/accuracy, dev/average/accuracy).
    """
    start = f"{row['split']}/" if "split" in row else ""
    found: dict[str, float] = {}
    for name, value in row.items():
        if name in _UNTRACKED:
            continue
        if isinstance(value, Mapping):
            found.update({f"{start}{name}/{key}": float(each) for key, each in value.items()})
        elif isinstance(value, (int, float)):
            found[f"{start}{name}"] = float(value)
    return found
