"""What each of several processes does with a task; apart from the tests, for a fresh process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from upop.runs.devices import make_accelerator
from upop.runs.evaluation import evaluate
from upop.runs.loaders import make_loader
from upop.runs.verbs import compress
from upop.settings import read_settings
from upop.tasks import find_task


def compress_task(task: str, config: Path, settings: dict[str, Any]) -> None:
    """Compress, in this process."""
    found = find_task(task)
    compress(found, read_settings(found.settings, config, settings))


def predict(config: Path, task_name: str, folder: Path) -> None:
    """Evaluate a random dense model on a task's held-out splits, and write what the main process has then."""
    task = find_task(task_name)
    settings = read_settings(task.settings, config, {})
    accelerator = make_accelerator(settings)
    model = task.load(Path(str(settings.pretrained)), settings)
    found = {}
    for split in task.evaluated(settings):
        loader = make_loader(task, settings, split)
        samples = len(loader.dataset)  # type: ignore[arg-type]
        assert accelerator.num_processes == 1 or samples % (2 * settings.batch_size_test), "no uneven last batch"
        found[split] = evaluate(accelerator, task, settings, model, accelerator.prepare(loader))
    if accelerator.is_main_process:
        torch.save(found, folder / f"{task_name}-{accelerator.num_processes}.pt")


def predict_all(configs: dict[str, Path], folder: Path) -> None:
    for name, config in configs.items():
        predict(config, name, folder)
