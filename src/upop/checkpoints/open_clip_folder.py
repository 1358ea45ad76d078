"""Folders that open_clip writes for the hub, into its own models: nothing is fetched, and no pickle is read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from upop.checkpoints import open_clip_models
from upop.checkpoints.fit import compare
from upop.checkpoints.library import OPEN_CLIP, open_clip_settings
from upop.checkpoints.read import read_weights
from upop.errors import CheckpointError

WEIGHTS = ("open_clip_model.safetensors", "model.safetensors")
_BESIDE = ("hf_tokenizer_name", "tokenizer_kwargs", "tokenizer_mode", "timm_model_pretrained", "hf_model_pretrained")
"""Of a tower's settings, what builds no part of it."""


def load(folder: Path) -> nn.Module:
    """Return the model in a folder of open_clip, in evaluation mode.

    Raises:
        CheckpointError: the folder is damaged, holds pickles alone, or a model that upop does not build: one whose
            text tower is fetched by name, or CoCa.
    """
    described, file = open_clip_settings(folder), folder / OPEN_CLIP
    config = described.get("model_cfg")
    if not isinstance(config, Mapping) or not all(isinstance(config.get(f"{t}_cfg"), Mapping) for t in _TOWERS):
        raise CheckpointError(f"{file} describes no model of open_clip: {str(config)[:100]}. Fetch or write it again.")
    text = config["text_cfg"]
    if text.get("hf_model_name"):
        raise CheckpointError(
            f"{file} asks for the text tower {text['hf_model_name']}, whose configuration open_clip fetches by name; "
            "nothing is fetched for a folder. Build it with open_clip, and call upop.Compression or upop.save on it."
        )
    weights = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if weights is None:
        raise CheckpointError(
            f"{folder} holds no {' or '.join(WEIGHTS)}; pickled weights are not read. Write them as safetensors."
        )
    arguments: dict[str, Any] = {name: value for name, value in config.items() if name != "custom_text"}
    for tower in _TOWERS:
        settings = config[f"{tower}_cfg"]
        arguments[f"{tower}_cfg"] = {name: value for name, value in settings.items() if name not in _BESIDE}
    kind = "CustomTextCLIP" if config.get("custom_text") else "CLIP"
    model_description = {"class": kind, "arguments": arguments, "preprocess": described.get("preprocess_cfg") or None}
    model = open_clip_models.build(model_description, str(file))
    state = read_weights(weights)
    compare(model, state, str(weights))
    model.load_state_dict(state)
    return model.eval()


_TOWERS = ("vision", "text")
