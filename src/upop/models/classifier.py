"""Classifiers: timm's vision transformers by name, in the sizes of a run or a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from typing import Any, Self

import timm
from pydantic import Field, model_validator
from timm.layers.norm import LayerNorm
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from upop.errors import SettingError, nearest
from upop.meta import on_meta
from upop.models.sizes import ModelConfig, check_patches

DEIT_SMALL = "deit_small_patch16_224"
"""The published architecture."""

# Names of the sizes in timm.
_ARGUMENTS = {
    "patch_size": "patch_size",
    "vision_width": "embed_dim",
    "vision_depth": "depth",
    "vision_heads": "num_heads",
}


class ClassifierConfig(ModelConfig):
    """An architecture of timm, with other sizes where set; None is the architecture's own size."""

    architecture: str = Field(DEIT_SMALL, description="timm's name; `timm.list_models()` has all")
    image_size: int = Field(224, gt=0, description="side of the square input images, in pixels")
    classes: int = Field(1000, gt=0)
    patch_size: int | None = Field(None, gt=0)
    vision_width: int | None = Field(None, gt=0)
    vision_depth: int | None = Field(None, gt=0)
    vision_heads: int | None = Field(None, gt=0)
    vision_mlp: int | None = Field(None, gt=0)
    norm_eps: float | None = Field(None, gt=0, description="of the norms; transformers' ViT has 1e-12, timm's 1e-6")
    dropout: float = Field(0.0, ge=0, lt=1, description="of patch embeddings and of the outputs of branches")
    drop_path: float = Field(0.1, ge=0, lt=1, description="stochastic depth rate of the last block")

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        if self.vision_width and self.vision_heads and self.vision_width % self.vision_heads:
            raise ValueError(
                f"vision_width ({self.vision_width}) is not a multiple of vision_heads ({self.vision_heads})"
            )
        check_patches(self)
        return self


def build_classifier(config: ClassifierConfig) -> nn.Module:
    """Return the model with random weights: images, [batch, 3, size, size] -> logits, [batch, classes].

    The configuration is its attribute `config`.

    Raises:
        SettingError: timm has no such model (the message names the nearest), or cannot build it in these sizes.
    """
    sizes = {name: getattr(config, name) for name in (*_ARGUMENTS, "vision_mlp")}
    given = {name: value for name, value in sizes.items() if value is not None}
    arguments = {_ARGUMENTS[name]: value for name, value in given.items() if name in _ARGUMENTS}
    if given:
        whole = {**architecture_sizes(config.architecture), **given}
        arguments["mlp_ratio"] = (whole["vision_mlp"] + 0.5) / whole["vision_width"]  # timm rounds the product down
    if config.norm_eps:
        arguments["norm_layer"] = partial(LayerNorm, eps=config.norm_eps)
    if config.dropout:
        arguments |= {"pos_drop_rate": config.dropout, "proj_drop_rate": config.dropout}
    arguments |= {"img_size": config.image_size, "num_classes": config.classes, "drop_path_rate": config.drop_path}
    model = _create(config.architecture, arguments)
    model.config = config  # type: ignore[assignment]
    return model


@cache
def architecture_sizes(name: str) -> dict[str, int]:
    """Return the sizes of a vision transformer of timm, by their names in `ClassifierConfig`.

    Raises:
        SettingError: timm has no such model, or it is not a VisionTransformer.
    """
    model = on_meta(lambda: _create(name, {}))
    if not isinstance(model, VisionTransformer):
        raise SettingError(
            f"{name} is a {type(model).__name__}; sizes can be set, or read from a checkpoint, only for timm's "
            f"VisionTransformer. Leave out {', '.join((*_ARGUMENTS, 'vision_mlp'))}."
        )
    first: Any = model.blocks[0]
    return {
        "patch_size": model.patch_embed.patch_size[0],
        "vision_width": model.embed_dim,
        "vision_depth": len(model.blocks),
        "vision_heads": first.attn.num_heads,
        "vision_mlp": first.mlp.fc1.out_features,
    }


def replace_head(model: nn.Module, classes: int) -> Sequence[str]:
    """Replace the head of a classifier for another number of classes; return the names of its tensors."""
    before = dict(model.named_parameters())
    device = next(model.parameters()).device
    model.reset_classifier(classes)  # type: ignore[operator]
    model.to(device)
    model.config = model.config.model_copy(update={"classes": classes})  # type: ignore[union-attr, operator]
    return [name for name, parameter in model.named_parameters() if parameter is not before.get(name)]


def _create(name: str, arguments: dict[str, Any]) -> nn.Module:
    if not timm.is_model(name):
        raise SettingError(
            f"architecture={name!r} is not a model of timm {timm.__version__}{nearest(name, timm.list_models())}. "
            "`timm.list_models()` lists all names."
        )
    try:
        model: nn.Module = timm.create_model(name, pretrained=False, **arguments)
    except Exception as error:  # models raise errors of any type
        raise SettingError(
            f"timm cannot build {name} with {arguments}: {error or type(error).__name__}. Set other sizes, or another "
            f"vision transformer, such as {DEIT_SMALL}."
        ) from error
    return model
