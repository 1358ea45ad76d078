"""Reads the image preparation that other libraries record, under the names of upop's settings.

Each function returns those of image_size, mean, std, interpolation, resize and crop_ratio that the library states.
Invalid values are refused later, when settings are validated.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from upop.errors import CheckpointError
from upop.reading import read_object

_NESTED, _ALONE = "processor_config.json", "preprocessor_config.json"
_PILLOW = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # indexed by Pillow's numbers
_TIMM_MODES = {"center": "crop", "squash": "squash", "border": "pad"}
_OPEN_CLIP_MODES = {"shortest": "crop", "squash": "squash", "longest": "pad"}
_ADVICE = "Fetch or write it again."


def from_transformers(folder: Path) -> dict[str, Any]:
    """Return the settings of the image processor in a folder of transformers; none without a processor.

    Raises:
        CheckpointError: the file is damaged, or asks for a preparation that upop does not have.
    """
    nested, alone = folder / _NESTED, folder / _ALONE
    if nested.is_file():
        inner = read_object(nested, CheckpointError, _ADVICE).get("image_processor")
        if isinstance(inner, dict):
            return _from_processor(inner, nested)
    if alone.is_file():
        return _from_processor(read_object(alone, CheckpointError, _ADVICE), alone)
    return {}


def from_timm(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings in timm's `pretrained_cfg`."""
    found = {
        "image_size": _side(config.get("input_size")),
        "mean": config.get("mean"),
        "std": config.get("std"),
        "interpolation": config.get("interpolation"),
        "resize": _TIMM_MODES.get(str(config.get("crop_mode") or "center")),
        "crop_ratio": config.get("crop_pct"),
    }
    return {name: value for name, value in found.items() if value is not None}


def from_open_clip(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings in open_clip's `preprocess_cfg`, with open_clip's defaults for missing ones."""
    found = {
        "image_size": _side(config.get("size")),
        "mean": config.get("mean"),
        "std": config.get("std"),
        "interpolation": config.get("interpolation", "bicubic"),
        "resize": _OPEN_CLIP_MODES.get(str(config.get("resize_mode", "shortest"))),
    }
    return {name: value for name, value in found.items() if value is not None}


def _from_processor(config: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """Return the settings of an image processor of transformers: resize, centre crop, rescale, normalise."""
    try:
        return {**_geometry(config, file), **_colours(config)}
    except (TypeError, ValueError, IndexError, ZeroDivisionError) as error:
        raise CheckpointError(f"{file} holds an image processor that cannot be read: {error}. {_ADVICE}") from error


def _geometry(config: Mapping[str, Any], file: Path) -> dict[str, Any]:
    size, cropped = config.get("size"), config.get("do_center_crop") is True
    found: dict[str, Any] = {}
    if config.get("resample") is not None:
        found["interpolation"] = _PILLOW[int(config["resample"])]
    if config.get("do_resize") is False or size is None:
        return found
    if isinstance(size, Mapping):
        short = size.get("shortest_edge")
        side = short if short is not None else _square(size, file)
    else:
        side, short = int(size), int(size) if cropped else None
    found["resize"] = "squash" if short is None else "crop"
    if cropped:
        crop = config.get("crop_size", side)
        inner = _square(crop, file) if isinstance(crop, Mapping) else int(crop)
        if inner > side:
            raise CheckpointError(
                f"{file} crops {inner} pixels from images of {side}, which adds a border; upop does not. Set "
                "image_size, resize and crop_ratio (--set)."
            )
        return {**found, "image_size": inner, "crop_ratio": inner / side}
    return {**found, "image_size": int(side), "crop_ratio": 1.0}


def _colours(config: Mapping[str, Any]) -> dict[str, Any]:
    mean, std = config.get("image_mean"), config.get("image_std")
    if config.get("do_normalize") is False:
        mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    # upop scales images to [0, 1], the processor by this factor.
    factor = 255 * (float(config.get("rescale_factor", 1 / 255)) if config.get("do_rescale") is not False else 1.0)
    if abs(factor - 1) < 1e-6:
        factor = 1.0
    statistics = {"mean": mean, "std": std}
    return {
        name: tuple(float(each) / factor for each in values)
        for name, values in statistics.items()
        if isinstance(values, (list, tuple))
    }


def _square(size: Mapping[str, Any], file: Path) -> int:
    height, width = size.get("height"), size.get("width")
    if height != width or not isinstance(height, int):
        raise CheckpointError(
            f"{file} asks for images of {dict(size)}; upop takes squares. Set image_size and resize (--set)."
        )
    return height


def _side(size: Any) -> Any:
    """Return the side of a square given as (3, side, side), (side, side) or side; None for anything else."""
    if isinstance(size, (list, tuple)):
        return size[-1] if len(size) >= 2 and size[-1] == size[-2] else None
    return size
