"""Writes a few held-out samples with the answers of all models, for people to read."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from upop.examples import Album, Examples
from upop.files import replacing_folder
from upop.pruning.costs import evaluating
from upop.runs.task import Task
from upop.settings import RunSettings


def write_examples(
    task: Task[Any], models: Mapping[str, nn.Module], samples: Dataset[Any], settings: RunSettings, split: str, to: Path
) -> Examples:
    """Write images and answers of all models for `settings.examples` samples, evenly spaced over a split.

    Args:
        task: of the models.
        models: name -> model, on its device, without wrappers; only one process may call this.
        samples: from `task.dataset`, of the split.
        settings: of the run.
        split: its published name.
        to: the folder to write; older examples are replaced.

    Raises:
        RunFolderError: it holds files that upop did not write, or it cannot be written.
    """
    numbers = spread(len(samples), settings.examples)  # type: ignore[arg-type]
    found = {}
    for name, model in models.items():
        with evaluating(model), torch.no_grad():
            found[name] = task.answers(model, samples, numbers, settings)
    with replacing_folder(to, "examples") as folder:
        shown = task.examples(found, samples, numbers, settings, Album(folder))
        about = task.about_examples(samples, numbers, split)
        examples = Examples(split=split, about=about, samples=tuple(shown))
        examples.write(folder)
    return examples


def spread(count: int, wanted: int) -> list[int]:
    """Return `wanted` evenly spaced numbers of 0 to count - 1; all of them if there are fewer."""
    wanted = min(count, wanted)
    return [place * count // wanted for place in range(wanted)]


def untransformed(samples: Any) -> Any:
    """Return a copy of a data set whose images are not transformed: PIL images of any size."""
    plain = copy.copy(samples)
    plain.transform = _identity
    return plain


def _identity(*values: Any) -> Any:
    return values[0] if len(values) == 1 else values
