"""The tasks, by name. A new one is one file here, and one line in the table below."""

from upop.errors import SettingError, nearest
from upop.tasks.nlvr import NlvrTask
from upop.training.task import Task

TASKS: dict[str, Task] = {task.name: task for task in (NlvrTask(),)}  # type: ignore[type-arg]


def find_task(name: str) -> Task:  # type: ignore[type-arg]
    """Return the task called `name`.

    Raises:
        SettingError: there is none; the message names the nearest.
    """
    if name not in TASKS:
        raise SettingError(f"Task {name!r} is not known{nearest(name, list(TASKS))}; known are {sorted(TASKS)}.")
    return TASKS[name]
