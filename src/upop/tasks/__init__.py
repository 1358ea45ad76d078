"""The tasks, by name. A new one is a module here and a line in the table below.

Other packages register a task by an entry point of the group `upop.tasks`, or by `register`. Every command then takes
it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

from upop.libraries import naming_missing

if TYPE_CHECKING:
    from upop.runs.task import Task

GROUP = "upop.tasks"
"""Entry point group of tasks in other packages: NAME = "their.module:TheirTask"."""

_PLACES: dict[str, str] = {
    "caption": "upop.tasks.caption:CaptionTask",
    "chat": "upop.tasks.chat:ChatTask",
    "classification": "upop.tasks.classification:ClassificationTask",
    "dual-encoder": "upop.tasks.dual_encoder:DualEncoderTask",
    "image-classification": "upop.tasks.image_classification:ImageClassificationTask",
    "nlvr": "upop.tasks.nlvr:NlvrTask",
    "retrieval": "upop.tasks.retrieval:BlipRetrievalTask",
    "retrieval-clip": "upop.tasks.retrieval_clip:ClipRetrievalTask",
    "retrieval-crossget": "upop.tasks.retrieval_crossget:CrossGetTask",
    "segmentation": "upop.tasks.segmentation:SegmentationTask",
    "vqa": "upop.tasks.vqa:VqaTask",
}
"""Name -> module and class; imported when the task is used."""


class _Tasks(Mapping[str, "Task[Any]"]):
    """Name -> task; a lookup imports the task, listing the names imports nothing."""

    def __init__(self) -> None:
        self._made: dict[str, Task[Any]] = {}

    def __getitem__(self, name: str) -> Task[Any]:
        if name not in self._made:
            module, _, kind = self._places()[name].partition(":")
            with naming_missing():
                self._made[name] = getattr(import_module(module), kind)()
        return self._made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(sorted({*self._places(), *self._made}))

    def __len__(self) -> int:
        return len({*self._places(), *self._made})

    def add(self, task: Task[Any]) -> None:
        self._made[task.name] = task

    def _places(self) -> dict[str, str]:
        return {each.name: each.value for each in metadata.entry_points(group=GROUP)} | _PLACES


_tasks = _Tasks()
TASKS: Mapping[str, Task[Any]] = _tasks


def register(task: Task[Any]) -> None:
    """Register a task, under its name, for the commands of this process.

    Args:
        task: an instance of a subclass of `upop.runs.task.Task`.

    Raises:
        SettingError: upop has a task of this name, or the class lacks one of the attributes that every task sets.
    """
    from upop.errors import SettingError  # imports torch, which listing the tasks does not need

    if lacking := [name for name in ("name", "metric", "shown", "splits", "settings") if not hasattr(task, name)]:
        raise SettingError(f"{type(task).__name__} lacks {', '.join(lacking)}. Set them as attributes of the class.")
    if task.name in _PLACES:
        raise SettingError(f"upop has a task {task.name!r} of its own. Give yours another name.")
    _tasks.add(task)


def find_task(name: str) -> Task[Any]:
    """Return the task called `name`.

    Raises:
        SettingError: there is none; the message names the nearest.
    """
    if name not in TASKS:
        from upop.errors import SettingError, nearest

        raise SettingError(f"Task {name!r} is not known{nearest(name, list(TASKS))}; known are {sorted(TASKS)}.")
    return TASKS[name]
