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
from upop.models.nlvr import BlipNlvr, NlvrConfig
from upop.settings import read_settings
from upop.tasks import find_task
from upop.tasks.nlvr import NlvrSettings

MODEL: dict[str, Any] = {
    "patch_size": 16,
    "vision_width": 24,
    "vision_depth": 2,
    "vision_heads": 2,
    "vision_mlp": 48,
    "text_width": 32,
    "text_depth": 2,
    "text_heads": 2,
    "text_mlp": 48,
    "max_positions": 64,
    "merge_from": 1,
    "dropout": 0.0,
    "drop_path": 0.0,
}


def make_data(folder: Path) -> Path:
    """Write 64 training records of pictures of 32 pixels, and a YAML file of settings for them; return that."""
    data = write_shapes("nlvr", folder / "data", seed=3, size=64, image_size=32)
    settings = {
        "image_root": str(data.image_root),
        "ann_root": str(data.annotation),
        "tokenizer": str(data.tokenizer),
        "pretrained": str(make_dense(folder / "dense")),
        "image_size": 32,
        "augment": False,
        "model": MODEL,
        "batch_size_train": 16,
        "batch_size_test": 48,
        "init_lr": 1e-3,
        "max_epoch": 2,
        "interval": 2,
        "num_workers": 0,
        "log_every": 1,
        "device": "cpu",
    }
    config = folder / "nlvr.yaml"
    config.write_text(yaml.safe_dump(settings))
    return config


def make_dense(folder: Path) -> Path:
    """Save a dense model with random weights, biases and norms."""
    torch.manual_seed(7)
    model = BlipNlvr(NlvrConfig(**MODEL, image_size=32, vocab_size=178))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.15)
    upop.save(model, folder)
    return folder


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
