"""Folders that open_clip writes for the hub, loaded as open_clip's own models or as upop's CLIP."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from upop.checkpoints.files.weights import read_weights, safe_weights
from upop.checkpoints.fitting.fit import fitted
from upop.checkpoints.formats.format import OPEN_CLIP, Own
from upop.checkpoints.libraries import image_settings, open_clip_models
from upop.checkpoints.published.vit import side
from upop.errors import CheckpointError
from upop.reading import read_object
from upop.values import shortened

if TYPE_CHECKING:
    from upop.checkpoints.opening import Checkpoint

_WEIGHTS = ("open_clip_model.safetensors", "model.safetensors")
_ADVICE = "Fetch or write it again."
_BESIDE = ("hf_tokenizer_name", "tokenizer_kwargs", "tokenizer_mode", "timm_model_pretrained", "hf_model_pretrained")
"""Settings of a tower that do not affect its modules."""


def config(path: Path) -> Mapping[str, Any]:
    """Return "class", "arguments" (`model_cfg` with both towers) and "preprocess".

    Raises:
        CheckpointError: open_clip_config.json is damaged.
    """
    file = path / OPEN_CLIP
    content = read_object(file, CheckpointError, _ADVICE)
    described = _towers(content.get("model_cfg"), file)
    return {
        "class": "CustomTextCLIP" if described.get("custom_text") else "CLIP",
        "arguments": {name: value for name, value in described.items() if name != "custom_text"},
        "preprocess": content.get("preprocess_cfg") or None,
    }


def weights(path: Path) -> Sequence[Path]:
    """Return the file of weights."""
    return safe_weights(path, _WEIGHTS)


def load(checkpoint: Checkpoint, *, strict: bool) -> nn.Module:
    """Return the model.

    Raises:
        CheckpointError: the folder is damaged, holds only pickles, or a model that upop does not build: one whose
            text tower is downloaded by name, or CoCa.
    """
    path, described = checkpoint.path, checkpoint.config
    file, arguments = path / OPEN_CLIP, described["arguments"]
    text = arguments["text_cfg"].get("hf_model_name")
    if text:
        raise CheckpointError(
            f"{file} asks for the text tower {shortened(text)}, whose configuration open_clip downloads by name; "
            "upop downloads nothing for a folder. Build it with open_clip, and call upop.Compression or upop.save."
        )
    towers = {
        f"{tower}_cfg": {name: value for name, value in arguments[f"{tower}_cfg"].items() if name not in _BESIDE}
        for tower in _TOWERS
    }
    [held] = weights(path)
    model = {**described, "arguments": {**arguments, **towers}}
    return fitted(lambda: open_clip_models.build(model, str(file)), read_weights(held), str(held), strict=strict)


def own(checkpoint: Checkpoint) -> Own:
    """Return the model as upop's own CLIP.

    Raises:
        CheckpointError: the folder is damaged, or the model has parts that upop's CLIP lacks.
    """
    source, described = str(checkpoint.description_file), checkpoint.config
    model = _towers(described.get("arguments"), source)
    towers: dict[str, Mapping[str, Any]] = {tower: model[f"{tower}_cfg"] for tower in _TOWERS}
    # Setting -> (its value, the value that upop's CLIP assumes).
    found: dict[str, tuple[Any, Any]] = {
        "quick_gelu": (model.get("quick_gelu", False), True),
        "custom_text": (described.get("class") == "CustomTextCLIP", False),
    }
    for tower, settings in towers.items():
        found |= {f"{tower}_cfg.{name}": (settings.get(name, ours), ours) for name, ours in _PLAIN[tower].items()}
    for name, (value, ours) in found.items():
        if value != ours and (value or ours):
            raise CheckpointError(
                f"{source}: the model has {name}={value!r}, and upop's own CLIP {ours!r}. Compress the open_clip model "
                "itself (upop.Compression)."
            )
    try:
        sizes = {field: read(towers[tower]) for tower in _TOWERS for field, read in _SIZES[tower].items()}
        sizes["embed_dim"] = int(model["embed_dim"])
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError(f"{source} says sizes that cannot be read: {error!r}. {_ADVICE}") from error
    images = described.get("preprocess") or {}
    stated = image_settings.from_open_clip(images) if isinstance(images, Mapping) else {}
    return Own(lambda _strict: checkpoint.state, "retrieval-clip", "CLIP of open_clip", sizes, stated)


def _towers(arguments: Any, source: str | Path) -> Mapping[str, Any]:
    if not isinstance(arguments, Mapping) or not all(isinstance(arguments.get(f"{t}_cfg"), Mapping) for t in _TOWERS):
        raise CheckpointError(f"{source} describes no model of open_clip: {str(arguments)[:100]}. {_ADVICE}")
    return arguments


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
"""Settings of open_clip's towers -> the values that upop's CLIP assumes."""


def _hidden(settings: Mapping[str, Any], width: int) -> int:
    return math.floor(int(settings.get("width", width)) * float(settings.get("mlp_ratio", 4.0)))


# Missing settings have open_clip's defaults.
_SIZES: Mapping[str, Mapping[str, Callable[[Mapping[str, Any]], int]]] = {
    "vision": {
        "image_size": lambda described: int(side(described.get("image_size", 224))),
        "patch_size": lambda described: int(side(described.get("patch_size", 16))),
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
