"""The tasks, by name. A new one is one file here, and one line in the table below."""

from typing import Any

from upop.errors import SettingError, nearest
from upop.tasks.caption import CaptionTask
from upop.tasks.chat import ChatTask
from upop.tasks.classification import ClassificationTask
from upop.tasks.dual_encoder import DualEncoderTask
from upop.tasks.image_classification import ImageClassificationTask
from upop.tasks.nlvr import NlvrTask
from upop.tasks.retrieval import BlipRetrievalTask
from upop.tasks.retrieval_clip import ClipRetrievalTask
from upop.tasks.segmentation import SegmentationTask
from upop.tasks.vqa import VqaTask
from upop.training.task import Task

TASKS: dict[str, Task[Any]] = {
    task.name: task
    for task in (
        CaptionTask(),
        ChatTask(),
        ClassificationTask(),
        DualEncoderTask(),
        ImageClassificationTask(),
        NlvrTask(),
        BlipRetrievalTask(),
        ClipRetrievalTask(),
        SegmentationTask(),
        VqaTask(),
    )
}


def find_task(name: str) -> Task[Any]:
    """Return the task called `name`.

    Raises:
        SettingError: there is none; the message names the nearest.
    """
    if name not in TASKS:
        raise SettingError(f"Task {name!r} is not known{nearest(name, list(TASKS))}; known are {sorted(TASKS)}.")
    return TASKS[name]
