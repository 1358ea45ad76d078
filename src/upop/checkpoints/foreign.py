"""Folders with models of timm and open_clip, in the hub format of their libraries or of `upop.save`.

Their tensors have the names of the published checkpoints, so they are converted the same way. Models that compute
something else than upop's are refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm

from upop.checkpoints import processors, timm_models
from upop.checkpoints.description import FILE, is_folder, read_description
from upop.errors import CheckpointError, nearest
from upop.reading import read_object
from upop.values import shortened

_SAVED = "model.safetensors"
_TIMM, _OPEN_CLIP = "config.json", "open_clip_config.json"
_ADVICE = "Fetch or write it again."
_WEIGHTS = {_TIMM: (_SAVED,), _OPEN_CLIP: ("open_clip_model.safetensors", _SAVED)}
_NOT_OURS = "Compress it as the model that it is (upop.Pruner)."


@dataclass(frozen=True)
class Foreign:
    """A model of another library in a folder.

    Attributes:
        task: the task of the model.
        kind: its name in messages.
        file: its description.
        weights: its weight file.
        sizes: fields of upop's configuration.
        images: preparation of images, by names of settings.
    """

    task: str
    kind: str
    file: Path
    weights: Path
    sizes: Mapping[str, Any]
    images: Mapping[str, Any]


def recognised(folder: Path) -> Foreign | None:
    """Identify a folder with a model of timm or open_clip; None for any other.

    Raises:
        CheckpointError: it is damaged, or upop has no equivalent model.
    """
    if is_folder(folder):
        description = read_description(folder)
        file = folder / FILE
        if isinstance(description.timm, dict):
            held = description.timm
            return _timm(file, folder / _SAVED, held.get("architecture"), held.get("arguments"), {})
        if isinstance(description.open_clip, dict):
            held = description.open_clip
            return _open_clip(file, folder / _SAVED, held.get("arguments"), held.get("preprocess"))
        return None
    if (folder / _OPEN_CLIP).is_file():
        content = read_object(folder / _OPEN_CLIP, CheckpointError, _ADVICE)
        return _open_clip(
            folder / _OPEN_CLIP,
            _weights(folder, _OPEN_CLIP),
            content.get("model_cfg"),
            content.get("preprocess_cfg") or {},
        )
    if not (folder / _TIMM).is_file():
        return None
    content = read_object(folder / _TIMM, CheckpointError, _ADVICE)
    if not isinstance(content.get("architecture"), str) or not isinstance(content.get("pretrained_cfg"), dict):
        return None
    file = folder / _TIMM
    given = content.get("model_args") or {}
    if not isinstance(given, dict):
        raise CheckpointError(f"{file}: model_args should be an object, found {shortened(given)}. {_ADVICE}")
    arguments = {"num_classes": content.get("num_classes"), **given}
    return _timm(file, _weights(folder, _TIMM), content["architecture"], arguments, content["pretrained_cfg"])


def _weights(folder: Path, kind: str) -> Path:
    """Return the weight file of a folder; pickles, which both libraries also write, are ignored."""
    names = _WEIGHTS[kind]
    found = next((folder / name for name in names if (folder / name).is_file()), None)
    if found is None:
        pickled = next((path.name for path in sorted(folder.glob("*.bin"))), None)
        raise CheckpointError(
            f"{folder} holds no {' or '.join(names)}"
            f"{f', and pickles such as {shortened(pickled)} are not read of a folder' if pickled else ''}. Write its "
            "weights again, as safetensors."
        )
    return found


def _timm(file: Path, weights: Path, name: Any, arguments: Any, images: Mapping[str, Any]) -> Foreign:
    if not isinstance(name, str) or not timm.is_model(name) or not isinstance(arguments, Mapping):
        raise CheckpointError(
            f"{file} describes timm's {name!r} with {arguments!r}, which timm {timm.__version__} does not have"
            f"{nearest(str(name), timm.list_models())}. {_ADVICE}"
        )
    timm_models.checked_arguments(arguments, str(file), "arguments")
    other = {
        argument: value
        for argument, value in arguments.items()
        if argument not in _TIMM_SIZES and value is not None and value != timm_models.usual(name, argument)
    }
    if other:
        first, value = next(iter(other.items()))
        raise CheckpointError(f"{file}: {name} has {first}={value!r}, and upop's own classifier has not. {_NOT_OURS}")
    given = {argument: value for argument, value in arguments.items() if value is not None}
    sizes: dict[str, Any] = {"architecture": name}
    for argument, field in _TIMM_SIZES.items():
        if argument in given and field is not None:
            sizes[field] = _one(given[argument])
    if "mlp_ratio" in given:
        width = given.get("embed_dim") or timm_models.usual(name, "embed_dim")
        sizes["vision_mlp"] = int(float(given["mlp_ratio"]) * int(width))
    usual = timm.get_pretrained_cfg(name)
    described = processors.from_timm(images or (usual.to_dict() if usual else {}))
    sizes.setdefault("image_size", described.get("image_size", 224))
    return Foreign("classification", f"timm {name}", file, weights, sizes, described)


def _open_clip(file: Path, weights: Path, model: Any, images: Any) -> Foreign:
    if not isinstance(model, Mapping) or not all(isinstance(model.get(f"{tower}_cfg"), Mapping) for tower in _TOWERS):
        raise CheckpointError(f"{file} describes no model of open_clip: {str(model)[:100]}. {_ADVICE}")
    same = {"quick_gelu": (False, True), "custom_text": (False, False)}
    towers = {tower: dict(model[f"{tower}_cfg"]) for tower in _TOWERS}
    found = {name: (model.get(name, usual), ours) for name, (usual, ours) in same.items()}
    for tower, settings in towers.items():
        found |= {f"{tower}_cfg.{name}": (settings.get(name, ours), ours) for name, ours in _PLAIN[tower].items()}
    for name, (value, ours) in found.items():
        if value != ours and (value or ours):
            raise CheckpointError(f"{file}: the model has {name}={value!r}, and upop's own CLIP {ours!r}. {_NOT_OURS}")
    try:
        sizes = {field: read(towers[tower]) for tower in _TOWERS for field, read in _OPEN_CLIP_SIZES[tower].items()}
        sizes["embed_dim"] = int(model["embed_dim"])
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError(f"{file} says sizes that cannot be read: {error!r}. {_ADVICE}") from error
    described = processors.from_open_clip(images) if isinstance(images, Mapping) else {}
    return Foreign("retrieval-clip", "CLIP of open_clip", file, weights, sizes, described)


def _one(value: Any) -> Any:
    """Return the side length of a square."""
    return value[0] if isinstance(value, (list, tuple)) and len(set(value)) == 1 else value


_TIMM_SIZES: Mapping[str, str | None] = {
    "num_classes": "classes",
    "img_size": "image_size",
    "patch_size": "patch_size",
    "embed_dim": "vision_width",
    "depth": "vision_depth",
    "num_heads": "vision_heads",
    "mlp_ratio": None,
    "drop_path_rate": None,  # a run says its own
}
"""Argument of timm -> field of ClassifierConfig."""
_TOWERS = ("vision", "text")
_BLOCKS: dict[str, Any] = {
    "ls_init_value": None,
    "act_kwargs": None,
    "norm_kwargs": None,
    "qk_norm": False,
    "scaled_cosine_attn": False,
    "scale_heads": False,
    "scale_attn_inner": False,
    "scale_attn": False,
    "scale_fc": False,
}
_PLAIN: Mapping[str, Mapping[str, Any]] = {
    "vision": {
        **_BLOCKS,
        "attentional_pool": False,
        "no_ln_pre": False,
        "pos_embed_type": "learnable",
        "final_ln_after_pool": False,
        "pool_type": "tok",
        "timm_model_name": None,
    },
    "text": {
        **_BLOCKS,
        "embed_cls": False,
        "no_causal_mask": False,
        "final_ln_after_pool": False,
        "pool_type": "argmax",
        "proj_bias": False,
        "proj_type": "linear",
        "hf_model_name": None,
        "hf_config": None,
    },
}
"""Settings of open_clip's towers -> what our CLIP has built in."""


def _hidden(settings: Mapping[str, Any], width: int) -> int:
    return math.floor(int(settings.get("width", width)) * float(settings.get("mlp_ratio", 4.0)))


# What is not said has open_clip's own default.
_OPEN_CLIP_SIZES: Mapping[str, Mapping[str, Callable[[Mapping[str, Any]], int]]] = {
    "vision": {
        "image_size": lambda described: int(_one(described.get("image_size", 224))),
        "patch_size": lambda described: int(_one(described.get("patch_size", 16))),
        "vision_width": lambda described: int(described.get("width", 768)),
        "vision_depth": lambda described: int(described.get("layers", 12)),
        "vision_heads": lambda described: int(described.get("width", 768)) // int(described.get("head_width", 64)),
        "vision_mlp": lambda described: _hidden(described, 768),
    },
    "text": {
        "vocab_size": lambda described: int(described.get("vocab_size", 49408)),
        "max_positions": lambda described: int(described.get("context_length", 77)),
        "text_width": lambda described: int(described.get("width", 512)),
        "text_depth": lambda described: int(described.get("layers", 12)),
        "text_heads": lambda described: int(described.get("heads", 8)),
        "text_mlp": lambda described: _hidden(described, 512),
    },
}
