"""Reads the input preparation that a checkpoint states: image size and normalisation, and its tokenizer.

The sources are `upop.json`, transformers' config.json and processors, the configurations of timm and open_clip, and for
published files the shapes of tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from upop.checkpoints.fitting.fit import expecting_shapes
from upop.checkpoints.opening import Checkpoint, open_checkpoint
from upop.checkpoints.published.tasks import row_of, task_of, task_of_config
from upop.checkpoints.published.vit import vit_sizes
from upop.errors import CheckpointError
from upop.models import MODELS

_TOKENIZERS = (("tokenizer.json",), ("vocab.txt",), ("vocab.json", "merges.txt"))
_TOWERS = ("visual_encoder.", "encoder.", "")


@dataclass(frozen=True)
class StatedInputs:
    """The stated input preparation of a checkpoint.

    Attributes:
        settings: settings of the run that wrote it, with image settings named as in `ImageSettings`.
        sizes: fields of the model's configuration.
        task: the task of these settings and sizes; None if unknown.
        tokenizer: its folder, if there is one beside the weights.
        notes: remarks for the user.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    sizes: Mapping[str, Any] = field(default_factory=dict)
    task: str | None = None
    tokenizer: Path | None = None
    notes: tuple[str, ...] = ()


def stated_inputs(source: str | Path | Checkpoint) -> StatedInputs:
    """Read the input preparation of a checkpoint.

    Raises:
        CheckpointError: the checkpoint is missing, unreadable or contradictory.
    """
    checkpoint = open_checkpoint(source)
    path = checkpoint.path
    if checkpoint.kind == "state_dict":
        task, sizes = _sizes_from_shapes(checkpoint)
        return StatedInputs({}, sizes, task)
    stated, described, task = _of_model(checkpoint)
    if checkpoint.description is not None:
        record = checkpoint.description.preparation or {}
        task = record.get("task") or task
        stated |= {name: value for name, value in record.items() if name != "task"}
    notes = []
    images, model = stated.get("image_size"), described.get("image_size")
    if task != "segmentation" and None not in (images, model) and images != model:
        notes.append(f"{path}: images are prepared with {images} pixels, but the model sees {model}, which is used.")
        stated["image_size"] = model
    tokenizer = path if any(all((path / name).is_file() for name in names) for names in _TOKENIZERS) else None
    return StatedInputs(stated, described, task, tokenizer, tuple(notes))


def _of_model(checkpoint: Checkpoint) -> tuple[dict[str, Any], Mapping[str, Any], str | None]:
    """Return settings, sizes and task of the model in a folder; nothing of a user's own model."""
    description = checkpoint.description
    if description is None or checkpoint.library != "upop":
        found = checkpoint.own()
        return dict(found.images), found.sizes, found.task
    if description.model is None or description.model not in MODELS:
        return {}, {}, None
    return {}, description.config or {}, task_of_config(MODELS[description.model][1])


def _sizes_from_shapes(checkpoint: Checkpoint) -> tuple[str | None, dict[str, Any]]:
    """Return the task whose model a published file holds, and the sizes that its shapes tell."""
    state, source = checkpoint.meta_state(), str(checkpoint.path)
    with expecting_shapes(source):
        try:
            task = task_of(state, source)
            return task, row_of(task).read_config(state)
        except (CheckpointError, KeyError):  # of no task, such as pre-trained BLIP; loading checks whether it fits
            pass
        for tower in _TOWERS:
            if f"{tower}pos_embed" in state and f"{tower}patch_embed.proj.weight" in state:
                return None, vit_sizes(state, tower)
    return None, {}
