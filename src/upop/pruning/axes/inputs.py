"""Derives inputs of library models from their configuration, stored sizes and argument names.

Nothing here decides what is pruned: the inputs are only tried, and groups follow from what the model computes.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from upop.pruning.axes.copies import Shapes
from upop.pruning.errors import LayoutError

BATCH, _WORDS = 2, 7
_MOST_IMAGES = 8
_SMALL, _COMMON = 64, (32, 224)
_SIZES = ("img_size", "image_size")
_CHANNELS = ("num_channels", "in_channels", "in_chans")
_IMAGES = ("pixel_values", "images", "image")
_TEXTS = ("input_ids", "decoder_input_ids", "qformer_input_ids")
_FEATURES = {"visual_feats": "visual_feat_dim", "visual_pos": "visual_pos_dim", "visual_embeds": "visual_embedding_dim"}
"""What was seen in an image, region by region, and the number that says how long one is."""
_REGIONS = 3
_PLACES = ("image_token_id", "image_token_index")
_LARGEST = 4096
"""Sides of the largest images that are made up, and the longest sequences: what a damaged file says may be more."""
_LOW, _HIGH = 5, 90
"""Words lie between the special ones, which come first, and the end of a small vocabulary."""

Inputs = dict[str, Any]


def words(model: nn.Module, length: int = _WORDS) -> Tensor:
    """Return token ids, [2, length]."""
    stated = [getattr(each, "vocab_size", None) for each in _configurations(getattr(model, "config", None))]
    tables = [each.num_embeddings for each in model.modules() if isinstance(each, nn.Embedding)]
    high = min(_HIGH, *([each for each in stated if type(each) is int and each > 0] or tables[:1]))
    return torch.randint(min(_LOW, high - 1), high, (BATCH, length))


def own_image_size(model: nn.Module) -> int | None:
    """Return the declared image size of a model, in pixels; None if it declares none."""
    return next((size for owner in _owners(model) for size in _stated(owner)), None)


def image_sizes(model: nn.Module) -> Iterator[int]:
    """Yield sizes of square images, the likeliest first; small ones come before unless the model declares sizes."""
    stated = [size for owner in _owners(model) for size in _stated(owner)]
    smaller = [size for size in stated if size <= _SMALL]
    yield from dict.fromkeys((*smaller[:1], _SMALL, *stated, *_COMMON))


def _owners(model: nn.Module) -> Iterator[Any]:
    """Yield objects that may store input sizes: configurations and modules."""
    yield from _configurations(getattr(model, "config", None))
    yield from model.modules()


def _configurations(config: Any) -> list[Any]:
    """Return a configuration and its nested configurations."""
    if config is None or not hasattr(config, "__dict__"):
        return []
    inside = [value for value in vars(config).values() if hasattr(value, "to_dict")]
    return [config, *(each for value in inside for each in _configurations(value))]


def _stated(owner: Any) -> Iterator[int]:
    values = [getattr(owner, name, None) for name in _SIZES] if not isinstance(owner, Mapping) else []
    held = getattr(owner, "default_cfg", None)
    values += [held.get("input_size")] if isinstance(held, Mapping) else []
    for value in values:
        while isinstance(value, list | tuple) and value:
            value = value[-1]
        if type(value) is int and 0 < value <= _LARGEST:
            yield value


def arguments_of(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    """Return the arguments of a forward by name; none where Python does not know them."""
    try:
        return inspect.signature(model.forward).parameters
    except (TypeError, ValueError):
        return {}


def described(model: nn.Module) -> Iterator[Any]:
    """Yield inputs by argument name: token ids, images, audio, and their companions such as masks."""
    asked = arguments_of(model)
    names = set(asked)
    texts: Inputs = {name: words(model) for name in _TEXTS if name in names}
    if {"image", "text"} <= names:  # open_clip
        lengths = (getattr(owner, "context_length", 0) for owner in model.modules())
        texts["text"] = words(model, next((each for each in lengths if type(each) is int and each), _WORDS))
    if texts:
        needed = [name for name, each in asked.items() if "mask" in name and each.default is inspect.Parameter.empty]
        texts |= {name: torch.ones_like(next(iter(texts.values()))) for name in needed}
    image_argument = next((name for name in _IMAGES if name in names), None)
    images = list(itertools.islice(_images(model, names), _MOST_IMAGES)) if image_argument else []
    if image_argument:
        images = [{image_argument: seen.pop("pixel_values"), **seen} for seen in images]
    sounds = list(_sounds(model, names))
    for seen in images:
        yield {**_with_places(model, names, texts, seen), **seen}
    for heard in sounds:
        yield {**texts, **heard}
    for seen in images if texts else []:
        yield {**{name: value for name, value in texts.items() if name != "input_ids"}, **seen}
    for heard in sounds if texts else []:
        yield {**{name: value for name, value in texts.items() if name != "input_ids"}, **heard}
    if texts:
        yield texts
        yield from ({**texts, **seen} for seen in _regions(model, names))


def _regions(model: nn.Module, names: set[str]) -> Iterator[Inputs]:
    """Yield bounding boxes of words on a page, and features of image regions."""
    if "bbox" in names:
        places = torch.arange(_WORDS)[:, None] + torch.tensor([0, 0, 1, 1])
        yield {"bbox": places.expand(BATCH, -1, -1)}
    sizes = {name: _number(model, (stated,), 0) for name, stated in _FEATURES.items() if name in names}
    features = {name: torch.randn(BATCH, _REGIONS, size) for name, size in sizes.items() if size}
    if features:
        yield features


def _number(model: nn.Module, names: tuple[str, ...], otherwise: int) -> int:
    """Return a number stored in a configuration or a module; the outermost wins."""
    for owner in _owners(model):
        for name in names:
            value = getattr(owner, name, None)
            if type(value) is int and value > 0:
                return value
    return otherwise


def channels_of(model: nn.Module) -> int:
    """Return the declared number of image channels."""
    held = getattr(model, "default_cfg", None)
    stated = held.get("input_size") if isinstance(held, Mapping) else None
    return min(_LARGEST, _number(model, _CHANNELS, stated[0] if stated and type(stated[0]) is int else 3))


def _images(model: nn.Module, names: set[str]) -> Iterator[Inputs]:
    """Yield images in the shapes that models accept."""
    channels = channels_of(model)
    patch = _number(model, ("patch_size",), 16)
    if "image_grid_thw" in names:  # patches of all images in a row, and the grids that they make
        side = 2 * _number(model, ("spatial_merge_size",), 1)
        values = channels * _number(model, ("temporal_patch_size",), 1) * patch**2
        grid = torch.tensor([[1, side, side]] * BATCH)
        yield {"pixel_values": torch.randn(BATCH * side**2, values), "image_grid_thw": grid}
    if "spatial_shapes" in names:  # patches of each image
        side = 4
        yield {
            "pixel_values": torch.randn(BATCH, side**2, channels * patch**2),
            "pixel_attention_mask": torch.ones(BATCH, side**2, dtype=torch.long),
            "spatial_shapes": torch.tensor([[side, side]] * BATCH),
        }
    frames = _number(model, ("num_frames",), 0)
    for size in image_sizes(model):
        if frames:
            yield {"pixel_values": torch.randn(BATCH, frames, channels, size, size)}
        image = torch.randn(BATCH, channels, size, size)
        points = {"input_points": size * torch.rand(BATCH, 1, 3, 2)} if "input_points" in names else {}
        yield {"pixel_values": image, **points}
        if points or "input_ids" in names:
            yield {"pixel_values": image.unsqueeze(1)}  # several images for each text


def _sounds(model: nn.Module, names: set[str]) -> Iterator[Inputs]:
    """Yield audio: waveforms or spectrograms."""
    bins = _number(model, ("num_mel_bins", "input_feat_per_channel", "feature_size"), 80)
    if "input_values" in names:
        for length in (1200, 4000):
            yield {"input_values": torch.randn(BATCH, length)}
        yield {"input_values": torch.randn(BATCH, _number(model, ("max_length",), 64), bins)}
        yield {"input_values": torch.randn(BATCH, _number(model, ("audio_channels",), 1), 1200)}
    if "input_features" in names:
        length = 2 * _number(model, ("max_source_positions",), 32)
        yield {"input_features": torch.randn(BATCH, bins, length)}
        yield {"input_features": torch.randn(BATCH, min(length, 64), bins)}
        yield {"input_features": torch.randn(BATCH, 1, length, bins)}


def _with_places(model: nn.Module, names: set[str], texts: Inputs, seen: Inputs) -> Inputs:
    """Return texts with placeholder tokens for image patches, if the model expects them."""
    place = _number(model, _PLACES, 0)
    pieces = _pieces(model, seen) if place and "input_ids" in texts else 0
    if not pieces:
        return texts
    ids = torch.cat([torch.full((BATCH, pieces), place), texts["input_ids"]], 1)
    more: Inputs = {"attention_mask": torch.ones_like(ids)} if "attention_mask" in names else {}
    if "mm_token_type_ids" in names:
        more["mm_token_type_ids"] = (ids == place).int()
    return {**texts, "input_ids": ids, **more}


def _pieces(model: nn.Module, seen: Inputs) -> int:
    """Return the number of image tokens per image, from a copy on fake tensors."""
    counted: list[int] = []

    def asked(on_meta: Any) -> None:
        found = on_meta.get_image_features(**placed(model, seen))
        found = getattr(found, "pooler_output", found)
        parts = [each for each in tree_leaves(found) if isinstance(each, Tensor)]
        counted.append(sum(each.numel() // each.shape[-1] for each in parts) // BATCH)

    if hasattr(model, "get_image_features"):
        with suppress(LayoutError):
            Shapes(model, asked, training=False)
    return counted[-1] if counted else 0


def placed(model: nn.Module, example: Any) -> Any:
    """Move an example to the device and precision of the model."""
    own = next((each for each in model.parameters() if each.is_floating_point()), torch.empty(0))
    device = torch.device("cpu") if own.is_meta else own.device

    return tree_map_only(Tensor, lambda each: each.to(device, own.dtype if each.is_floating_point() else None), example)
