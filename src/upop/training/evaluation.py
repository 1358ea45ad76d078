"""Evaluation: every record of a split counted once, over all processes."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from upop.settings import RunSettings
from upop.training.devices import autocast
from upop.training.task import Task


def evaluate(
    accelerator: Accelerator, task: Task[Any], settings: RunSettings, model: nn.Module, loader: Any
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Return the metrics of a split and every record's predictions, in the split's order, on the CPU.

    Args:
        accelerator: gathers over processes; repeated records that fill the last batch are dropped.
        task: predicts and scores.
        settings: say whether to use autocast.
        model: on its device; put back into its mode afterwards.
        loader: a prepared loader.
    """
    training = model.training
    model.eval()
    parts: list[dict[str, Tensor]] = []
    with torch.no_grad():
        for batch in loader:
            with autocast(accelerator, settings):
                rows = task.predict(model, batch)
            parts.append({name: value.cpu() for name, value in accelerator.gather_for_metrics(rows).items()})
    model.train(training)
    predictions = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return task.score(predictions), predictions
