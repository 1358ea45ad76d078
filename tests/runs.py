"""Tiny generated data sets and tiny dense models on disk, for tests of whole runs: one row per task."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

import upop
from upop.demo.write import Summary, write_shapes
from upop.runs.task import Task
from upop.settings import read_settings
from upop.tasks import find_task
from upop.tasks.blip import blip_tokenizer
from upop.tasks.nlvr import NlvrSettings

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
BLIP = {**TOWERS, "patch_size": 16, "max_positions": 64, "drop_path": 0.0}
"""Of every BLIP model."""
CLIP = {
    **{name: size for name, size in TOWERS.items() if name != "dropout"},
    "patch_size": 8,
    "embed_dim": 16,
    "max_positions": 64,
}
VIT = {"patch_size": 8, **{name: size for name, size in TOWERS.items() if name.startswith("vision_")}}

SEGMENTER = {
    **VIT,
    "decoder_width": 32,
    "decoder_depth": 1,
    "decoder_heads": 2,
    "decoder_mlp": 40,
    "encoder_classes": 3,
    "drop_path": 0.0,
    "decoder_dropout": 0.0,
}

TINY: dict[str, dict[str, Any]] = {
    "caption": {"model": BLIP, "batch_size_test": 16, "max_length": 16},
    "classification": {
        "model": VIT,
        "augment": True,
        "batch_size_test": 48,
        "search_epochs": 1,
        "ema_decay": 0.5,
        "search_lr": 1e-3,
        "min_lr": 0.0,
    },
    "nlvr": {"model": {**BLIP, "merge_from": 1}, "batch_size_test": 48},
    "retrieval": {"model": {**BLIP, "embed_dim": 16}, "queue_size": 40, "k_test": 12, "batch_size_test": 16},
    "retrieval-clip": {"model": CLIP, "queue_size": 40, "image_size": 16, "batch_size_test": 48},
    "segmentation": {
        "model": SEGMENTER,
        "classes": 13,
        "optimizer": "adamw",
        "window_stride": 24,
        "batch_size_test": 2,
        "min_lr": 0.0,
    },
    "vqa": {
        "model": BLIP,
        "train_files": ["vqa_train", "vg_qa"],
        "val_file": "vqa_val",
        "k_test": 8,
        "rank_chunk": 100,
        "batch_size_test": 48,
    },
}
"""Task -> settings of its runs, which beat those of `write_settings`; a task's generated data has its name."""
_DATA = {"retrieval-clip": "retrieval"}
HELD_OUT = 56
"""Samples of each split of NLVR that is not trained on: eight times seven, and no multiple of 2 x 24."""


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


_saved: dict[str, tempfile.TemporaryDirectory[str]] = {}
"""Task and configuration -> its dense model in a folder."""


def save_random(task: Task[Any], config: Path) -> None:
    """Save a dense model of random weights, biases and norms where the settings in `config` look for it."""
    torch.manual_seed(7)
    settings = read_settings(task.settings, config, {})
    model: Any = task.build(settings)
    kind = f"{task.name} {model.config.model_dump_json()}"
    if kind not in _saved:  # its groups are found but once in a process
        for name, parameter in model.named_parameters():
            if name != "temp":
                nn.init.normal_(parameter, std=0.15)
        _saved[kind] = tempfile.TemporaryDirectory()  # goes with the process
        upop.save(model, Path(_saved[kind].name) / "dense")
    shutil.copytree(Path(_saved[kind].name) / "dense", str(settings.pretrained))
    blip_tokenizer.cache_clear()  # so that a test which spoils the files meets them as a new process would


@cache
def _generated(name: str) -> tuple[tempfile.TemporaryDirectory[str], Summary]:
    """Write the data of a task, once in a process."""
    held = tempfile.TemporaryDirectory()  # goes with the process
    return held, write_shapes(name, Path(held.name) / "data", seed=3, size=64, image_size=32)


def copied(name: str, folder: Path) -> Summary:
    _, made = _generated(name)
    shutil.copytree(made.folder, folder)
    return replace(made, folder=folder)


def make_task(name: str, folder: Path, **settings: Any) -> Path:
    """Write 64 training samples over images of 32 pixels, a dense model with random weights, and settings for both.

    Args:
        name: of the task.
        folder: where to write.
        settings: beat those in `TINY`.

    Returns:
        The file of settings.
    """
    data = copied(_DATA.get(name, name), folder / "data")
    if name == "nlvr":  # whose generated splits are long, and evaluating them would be most of a run
        for file in (data.annotation / f"nlvr_{split}.json" for split in ("dev", "test")):
            file.write_text(json.dumps(json.loads(file.read_text())[:HELD_OUT]))
    config = write_settings(folder / f"{name}.yaml", data.settings, **{"max_epoch": 1, **TINY[name], **settings})
    save_random(find_task(name), config)
    return config


def make_data(folder: Path) -> Path:
    """Write data, a model and settings of NLVR; return the settings."""
    return make_task("nlvr", folder, max_epoch=2)


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
