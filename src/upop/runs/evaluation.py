"""Evaluation over all processes; every sample of a split counts once."""

from __future__ import annotations

from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from torch.utils.data import Dataset

from upop.runs.loaders import SeededDataset
from upop.runs.memory import explained_memory
from upop.runs.task import Task
from upop.settings import RunSettings


def evaluate(
    accelerator: Accelerator, task: Task[Any], settings: RunSettings, model: nn.Module, loader: Any
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Return the metrics of a split and its predictions, [samples, ...] each, in the split's order, on the CPU.

    Args:
        accelerator: gathers over processes.
        task: predicts, and scores on the main process.
        settings: of the run.
        model: on its device, wrapped or not; its mode is restored.
        loader: a prepared loader.
    """
    training = model.training
    model.eval()
    with torch.no_grad(), explained_memory(settings, accelerator.device, evaluating=True):
        predictions = task.collect(accelerator, accelerator.unwrap_model(model), loader, settings)
    model.train(training)
    scores = [task.score(predictions, samples_of(loader), settings) if accelerator.is_main_process else {}]
    broadcast_object_list(scores)
    return scores[0], predictions


def samples_of(loader: Any) -> Dataset[Any]:
    """Return the data set of a loader, without unreadable samples."""
    return cast(SeededDataset, loader.dataset).scored
