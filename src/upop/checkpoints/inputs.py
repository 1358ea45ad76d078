"""Reads the input preparation of a checkpoint: image size and normalisation, and its tokenizer.

The sources are `upop.json`, transformers' config.json and processors, the configurations of timm and open_clip, and for
published files the shapes of tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import transformers

from upop.checkpoints import foreign, processors
from upop.checkpoints.config_json import is_transformers_folder, read_config
from upop.checkpoints.description import is_folder, read_description
from upop.checkpoints.fit import expecting_shapes
from upop.checkpoints.hugging_face import counterpart_named
from upop.checkpoints.official import row_of, task_of, task_of_config
from upop.checkpoints.read import read_outline, read_weights
from upop.checkpoints.transformers_models import architectures, config_of
from upop.checkpoints.vit_sizes import vit_sizes
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


def stated_inputs(path: Path) -> StatedInputs:
    """Read the input preparation of a checkpoint.

    Args:
        path: a published file, or a folder of upop, transformers, timm or open_clip.

    Raises:
        CheckpointError: the checkpoint is missing, unreadable or contradictory.
    """
    if not path.is_dir():
        task, sizes = _sizes_from_shapes(path)
        return StatedInputs({}, sizes, task)
    stated, sizes, task = _of_library(path)
    if is_folder(path):
        description = read_description(path)
        record = description.preparation or {}
        task = record.get("task") or task
        stated |= {name: value for name, value in record.items() if name != "task"}
        if description.model is not None and description.model in MODELS:
            sizes = description.config or {}
            task = task or task_of_config(MODELS[description.model][1])
    notes = []
    images, model = stated.get("image_size"), sizes.get("image_size")
    if task != "segmentation" and None not in (images, model) and images != model:
        notes.append(f"{path}: images are prepared with {images} pixels, but the model sees {model}, which is used.")
        stated["image_size"] = model
    tokenizer = path if any(all((path / name).is_file() for name in names) for names in _TOKENIZERS) else None
    return StatedInputs(stated, sizes, task, tokenizer, tuple(notes))


def _of_library(path: Path) -> tuple[dict[str, Any], dict[str, Any], str | None]:
    """Return settings, sizes and task of a folder in the format of another library; empty for other folders."""
    if is_transformers_folder(path):
        stated = processors.from_transformers(path)
        row = counterpart_named(_class_of(path))
        try:
            sizes = row.sizes(config_of(path, getattr(transformers, row.kind)))
        except CheckpointError:
            raise
        except Exception as error:  # configurations check what they hold in ways of their own
            raise CheckpointError(f"{path / 'config.json'} cannot be read: {error}. Fetch it again.") from error
        return stated, sizes, row.task
    found = foreign.recognised(path)
    return ({}, {}, None) if found is None else (dict(found.images), dict(found.sizes), found.task)


def _class_of(path: Path) -> str:
    return (architectures(path, read_config(path)) or ["model without a name"])[0]


def _sizes_from_shapes(path: Path) -> tuple[str | None, dict[str, Any]]:
    """Infer the task and the sizes of a published file from its shapes."""
    state = read_outline(path) if path.suffix == ".safetensors" else read_weights(path, mapped=True)
    with expecting_shapes(str(path)):
        try:
            task = task_of(state, str(path))
            return task, row_of(task).read_config(state)
        except (CheckpointError, KeyError):  # of no task, as what BLIP was pre-trained to be; loading says if it fits
            pass
        for tower in _TOWERS:
            if f"{tower}pos_embed" in state and f"{tower}patch_embed.proj.weight" in state:
                return None, vit_sizes(state, tower)
    return None, {}
