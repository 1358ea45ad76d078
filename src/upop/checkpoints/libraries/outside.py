"""Limits on what a folder can cause: no download, no prompt, and no code but that of the installed libraries.

Descriptions of models (`config.json`, `upop.json`) are checked before a model is built from them. `sealed` is a second
barrier, for what a library may do in spite of these checks.
"""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from upop.errors import CheckpointError
from upop.libraries import installed_version
from upop.values import shortened

QUANTIZED_HERE = "upop"
"""The `quant_method` of compressed models."""

# Locations of code, origins, and kernels to download: not needed to build the libraries' own classes from a folder.
_LEFT_OUT = {
    "auto_map",
    "_name_or_path",
    "name_or_path",
    "_commit_hash",
    "configuration_files",
    "use_pretrained_backbone",
    "attn_implementation",
    "_attn_implementation",
    "experts_implementation",
    "_experts_implementation",
    "fusion_config",
    "distributed_config",
}
# Numbers of layers, each of which has a tensor, and of labels and the like, each of which has an element. Models that
# repeat one layer may have more, hence _ALWAYS.
_LAYERS = re.compile(r"layers?$|^depths?$|^(num|n)_\w*(layer|block|stage)")
_ENTRIES = re.compile(r"^(num|n)_\w*(label|head|expert|class|channel)")
_ALWAYS = 2**12
# Models that compute a table of positions in memory even on the meta device, and the fields that set its length.
_TABLES = {
    "autoformer",
    "distilbert",
    "flaubert",
    "informer",
    "marian",
    "pegasus",
    "roformer",
    "time_series_transformer",
    "xlm",
}
_POSITIONS = re.compile(r"position|context_length|prediction_length|lags_sequence")
# What `timm.create_model` hands on to the model's own class; everything else says where weights or settings come from.
_TIMM_ARGUMENTS = {
    "act_layer",
    "class_token",
    "depth",
    "depths",
    "dims",
    "drop_path_rate",
    "drop_rate",
    "dynamic_img_size",
    "embed_dim",
    "fc_norm",
    "global_pool",
    "img_size",
    "in_chans",
    "init_values",
    "mlp_ratio",
    "num_classes",
    "num_heads",
    "patch_size",
    "qkv_bias",
    "reg_tokens",
    "strict_img_size",
    "window_size",
}
_TIMM_NAME = re.compile(r"[\w.-]+")

_lock = threading.Lock()
_inside = 0
_before: tuple[bool, int] = (False, 0)


@contextmanager
def sealed() -> Iterator[None]:
    """Keep libraries from downloading, and from asking whether code in a folder may run, within the block.

    The settings are those of the process: other threads cannot download from the hub meanwhile.
    """
    global _inside, _before
    import huggingface_hub.constants as hub

    code = _code()
    with _lock:
        if not _inside:
            _before = hub.HF_HUB_OFFLINE, code.TIME_OUT_REMOTE_CODE
            hub.HF_HUB_OFFLINE, code.TIME_OUT_REMOTE_CODE = True, 0  # without time to answer, nobody is asked
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside:
                hub.HF_HUB_OFFLINE, code.TIME_OUT_REMOTE_CODE = _before


def _code() -> Any:
    """Return the module of transformers that asks whether code may run; a stand-in if transformers is not installed."""
    try:
        import transformers.dynamic_module_utils
    except ModuleNotFoundError:
        return SimpleNamespace(TIME_OUT_REMOTE_CODE=0)
    return transformers.dynamic_module_utils


@dataclass(frozen=True)
class Held:
    """Size of the weights of a folder: number of tensors, number of elements, and longest axis."""

    tensors: int
    numbers: int
    longest: int

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Held:
        """Measure tensors, possibly on the meta device."""
        shapes = [value.shape for value in tensors.values()]
        return cls(
            len(shapes), sum(map(math.prod, shapes)), max((max(shape, default=0) for shape in shapes), default=0)
        )


def checked_config(config: Mapping[str, Any], source: str, held: Held | None = None) -> dict[str, Any]:
    """Return a transformers configuration without fields that name code or other locations.

    Args:
        config: the content of `config.json`.
        source: its origin, for messages.
        held: size of the weights, which bounds the numbers of layers and labels.

    Raises:
        CheckpointError: the configuration names weights or a model elsewhere, a quantization that upop does not read,
            or sizes beyond the weights.
    """
    if held is not None and any(config.get("model_type") == kind for kind in _TABLES):
        for name, value in config.items():
            if _POSITIONS.search(name):
                _refuse_more(name, value, max(held.longest, _ALWAYS), source, held)
    return {name: _checked(name, value, source, held) for name, value in config.items() if _is_kept(name)}


def is_timm_name(name: object) -> bool:
    """Whether this names a model that timm builds by itself, rather than a folder or a hub model."""
    if not isinstance(name, str) or not _TIMM_NAME.fullmatch(name) or installed_version("timm") is None:
        return False
    import timm

    return bool(timm.is_model(name))


def _is_kept(name: str) -> bool:
    return name not in _LEFT_OUT


def _checked(name: str, value: Any, source: str, held: Held | None) -> Any:
    if isinstance(value, Mapping):
        if name == "quantization_config" and value.get("quant_method") != QUANTIZED_HERE:
            raise CheckpointError(
                f"{source} is quantized by {value.get('quant_method')!r}, whose weights upop does not read. "
                "Load it with transformers, or compress the model that it was quantized from."
            )
        if name == "model_args":
            _check_timm_arguments(value, source)
        return checked_config(value, source, held)
    if isinstance(value, list):
        return [_checked(name, each, source, held) for each in value]
    if name == "quantization_config" and value is not None:
        raise CheckpointError(
            f"{source}: quantization_config should be an object, found {shortened(value)}. Write it again."
        )
    if name in ("backbone", "architecture", "timm_model_name") and value is not None and not is_timm_name(value):
        raise CheckpointError(
            f"{source} asks for the {name} {shortened(value)}, which timm {installed_version('timm')} does not build "
            "by itself. Nothing is downloaded for a folder: give one that describes its backbone (backbone_config)."
        )
    if name == "transformers_weights" and value is not None:
        raise CheckpointError(
            f"{source} names weights elsewhere, {shortened(value)}. Give a folder with model.safetensors."
        )
    if held is not None and (_LAYERS.search(name) or _ENTRIES.search(name)):
        most = held.tensors if _LAYERS.search(name) else held.numbers
        _refuse_more(name, value, max(most, _ALWAYS), source, held)
    return value


def _refuse_more(name: str, value: Any, most: int, source: str, held: Held) -> None:
    for each in value if isinstance(value, list) else [value]:
        if isinstance(each, int) and each > most:
            raise CheckpointError(
                f"{source} asks for {name}={shortened(value)}, and the weights are {held.tensors} tensors of "
                f"{held.numbers} numbers. Was it damaged? Fetch or write it again."
            )


def _check_timm_arguments(arguments: Mapping[str, Any], source: str) -> None:
    unknown = [name for name in arguments if name not in _TIMM_ARGUMENTS]
    if unknown:
        raise CheckpointError(
            f"{source} has model_args with {unknown[0]}={shortened(arguments[unknown[0]])}, which upop does not pass "
            f"to timm. It passes {', '.join(sorted(_TIMM_ARGUMENTS))}."
        )
