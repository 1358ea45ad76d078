"""A tiny generated data set and a tiny dense model on disk, for tests of whole runs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

import upop
from upop.data.shapes.write import write_shapes
from upop.settings import read_settings
from upop.tasks import find_task
from upop.tasks.blip import blip_tokenizer
from upop.tasks.nlvr import NlvrSettings
from upop.training.task import Task

TOWERS: dict[str, Any] = {
    "vision_width": 24,
    "vision_depth": 2,
    "vision_heads": 2,
    "vision_mlp": 48,
    "text_width": 32,
    "text_depth": 2,
    "text_heads": 2,
    "text_mlp": 48,
    "dropout": 0.0,
}
"""Sizes of a tiny BLIP."""
MODEL = {**TOWERS, "patch_size": 16, "max_positions": 64, "merge_from": 1, "drop_path": 0.0}
"""Of the NLVR model."""


def write_settings(file: Path, roots: Mapping[str, Any], **settings: Any) -> Path:
    """Write a YAML file for short runs on the CPU that start from `dense` beside it; return the file.

    Args:
        file: where to write.
        roots: the settings that say where the data is.
        settings: what is special to the task, or beats what all tasks have here.
    """
    shared = {
        "pretrained": str(file.with_name("dense")),
        "image_size": 32,
        "augment": False,
        "batch_size_train": 16,
        "init_lr": 1e-3,
        "interval": 2,
        "num_workers": 0,
        "log_every": 1,
        "device": "cpu",
    }
    file.write_text(yaml.safe_dump({**roots, **shared, **settings}))
    return file


def save_random(task: Task[Any], config: Path) -> None:
    """Save a dense model of random weights, biases and norms where the settings in `config` look for it."""
    torch.manual_seed(7)
    settings = read_settings(task.settings, config, {})
    model = task.build(settings)
    for name, parameter in model.named_parameters():
        if name != "temp":
            nn.init.normal_(parameter, std=0.15)
    upop.save(model, str(settings.pretrained))
    blip_tokenizer.cache_clear()  # so that a test which spoils the files meets them as a new process would


def make_data(folder: Path) -> Path:
    """Write 64 training records of NLVR over pictures of 32 pixels, and settings for them; return those."""
    data = write_shapes("nlvr", folder / "data", seed=3, size=64, image_size=32)
    config = write_settings(folder / "nlvr.yaml", data.settings, model=MODEL, batch_size_test=48, max_epoch=2)
    save_random(find_task("nlvr"), config)
    return config


def nlvr(config: Path, **overrides: Any) -> tuple[Any, NlvrSettings]:
    """Return the task and its settings from a YAML file and overrides."""
    return find_task("nlvr"), read_settings(NlvrSettings, config, overrides)


def edited(config: Path, changes: Mapping[str, Any]) -> Path:
    """Write the settings with changes beside the file; return the new file."""
    path = config.with_name("edited.yaml")
    path.write_text(yaml.safe_dump({**yaml.safe_load(config.read_text()), **changes}))
    return path


def rows(run: Path) -> list[dict[str, Any]]:
    """Return the rows of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
