"""Folders that timm writes for the hub, loaded as timm's own models or as upop's classifier."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import timm
from torch import nn

from upop.checkpoints.files.config_json import FILE, read_config
from upop.checkpoints.files.weights import read_weights, safe_weights
from upop.checkpoints.fitting.fit import fitted
from upop.checkpoints.formats.format import Own
from upop.checkpoints.libraries import image_settings, timm_models
from upop.checkpoints.published.vit import side
from upop.errors import CheckpointError
from upop.values import shortened

if TYPE_CHECKING:
    from upop.checkpoints.opening import Checkpoint

_WEIGHTS = ("model.safetensors",)
_ADVICE = "Fetch or write it again."
_IMAGES = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
"""Fields of `pretrained_cfg` about a model's inputs."""


def config(path: Path) -> Mapping[str, Any]:
    """Return "architecture", "arguments" and "pretrained_cfg".

    Raises:
        CheckpointError: config.json is damaged.
    """
    file = path / FILE
    content = read_config(path)
    given, images = content.get("model_args") or {}, content.get("pretrained_cfg") or {}
    for name, value in (("model_args", given), ("pretrained_cfg", images)):
        if not isinstance(value, Mapping):
            raise CheckpointError(f"{file}: {name} should be an object, found {shortened(value)}. {_ADVICE}")
    arguments = {"num_classes": content.get("num_classes"), **given}
    return {"architecture": content["architecture"], "arguments": arguments, "pretrained_cfg": images}


def weights(path: Path) -> Sequence[Path]:
    """Return the file of weights."""
    return safe_weights(path, _WEIGHTS)


def load(checkpoint: Checkpoint, *, strict: bool) -> nn.Module:
    """Return the timm model.

    Raises:
        CheckpointError: the folder is damaged, holds only pickles, or a model that upop does not build.
    """
    path, described = checkpoint.path, checkpoint.config
    [held] = weights(path)
    arguments = {name: value for name, value in described["arguments"].items() if value is not None}
    described = {"architecture": described["architecture"], "arguments": arguments}
    state = read_weights(held)
    model = fitted(lambda: timm_models.build(described, str(path / FILE)), state, str(held), strict=strict)
    images = checkpoint.config["pretrained_cfg"]
    usual: Any = model.pretrained_cfg
    stated = {name: images[name] for name in _IMAGES if images.get(name) is not None}
    kept = {name: tuple(value) if isinstance(value, list) else value for name, value in stated.items()}
    model.pretrained_cfg = {**(usual if isinstance(usual, Mapping) else usual.to_dict()), **kept}  # type: ignore[assignment]
    return model


def own(checkpoint: Checkpoint) -> Own:
    """Return the model as upop's own classifier.

    Raises:
        CheckpointError: the folder is damaged, or the model has parts that upop's classifier lacks.
    """
    source, described = str(checkpoint.description_file), checkpoint.config
    name = timm_models.checked_name(described.get("architecture"), source)
    timm_models.checked_arguments(described.get("arguments"), source, "arguments")
    given = {argument: value for argument, value in described["arguments"].items() if value is not None}
    for argument, value in given.items():
        if argument not in _SIZES and value != timm_models.usual(name, argument):
            raise CheckpointError(
                f"{source}: {name} has {argument}={value!r}, which upop's own classifier does not support. Compress "
                "the timm model itself (upop.Compression)."
            )
    sizes: dict[str, Any] = {"architecture": name}
    for argument, field in _SIZES.items():
        if argument in given and field is not None:
            sizes[field] = side(given[argument])
    if "mlp_ratio" in given:
        width = given.get("embed_dim") or timm_models.usual(name, "embed_dim")
        sizes["vision_mlp"] = int(float(given["mlp_ratio"]) * int(width))
    usual = timm.get_pretrained_cfg(name)
    images = image_settings.from_timm(described.get("pretrained_cfg") or (usual.to_dict() if usual else {}))
    sizes.setdefault("image_size", images.get("image_size", 224))
    return Own(lambda _strict: checkpoint.state, "classification", f"timm {name}", sizes, images)


_SIZES: Mapping[str, str | None] = {
    "num_classes": "classes",
    "img_size": "image_size",
    "patch_size": "patch_size",
    "embed_dim": "vision_width",
    "depth": "vision_depth",
    "num_heads": "vision_heads",
    "mlp_ratio": None,
    "drop_path_rate": None,  # a setting of the run
}
"""Argument of timm -> field of ClassifierConfig."""
