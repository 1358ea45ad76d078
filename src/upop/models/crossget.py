"""CLIP with CrossGET: both towers merge tokens layer by layer, led by cross tokens (arXiv 2305.17455).

Names of parameters are those of transformers' CLIPModel; the cross tokens are `vision_model.encoder.cross_image` and
`text_model.encoder.cross_text`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from transformers import CLIPModel

from upop.models.clip import ClipSizes, library_config
from upop.models.sizes import some_images, some_words
from upop.tokens.flow import Flow, flow_of
from upop.tokens.layer import Merger, Place, Site, set_merging
from upop.tokens.losses import cross_loss, layer_by_layer, matching_loss

_LARGEST_SCALE = 4.6052
"""Of the logarithm of what similarities are multiplied with."""


class CrossGetConfig(ClipSizes):
    """Sizes of a CLIP model and how many tokens its layers remove. The defaults are those of ViT-B/16 at 224 pixels."""

    image_size: int = Field(224, gt=0, description="side of the square input pictures, in pixels")
    patch_size: int = Field(16, gt=0)
    vision_width: int = Field(768, gt=0)
    vision_depth: int = Field(12, gt=0)
    vision_heads: int = Field(12, gt=0)
    vision_mlp: int = Field(3072, gt=0)
    text_width: int = Field(512, gt=0)
    text_heads: int = Field(8, gt=0)
    text_mlp: int = Field(2048, gt=0)
    embed_dim: int = Field(512, gt=0, description="of the features that are compared")
    cross: bool = Field(True, description="whether there are cross tokens; without them no token is removed")
    rv: int = Field(16, ge=0, description="image tokens removed per layer")
    rl: int = Field(0, ge=0, description="text tokens removed per layer")
    merge_padding: bool = Field(
        False, description="merge padding like words, as published, though what follows a text then changes its feature"
    )


class Encoded(NamedTuple):
    """What a tower makes of a batch.

    Attributes:
        features: not normalised, [B, embed_dim].
        crosses: cross tokens of every layer in the space of features, [B, embed_dim] each.
        flow: what became of the tokens.
    """

    features: Tensor
    crosses: list[Tensor]
    flow: Flow


class CrossLosses(NamedTuple):
    """The losses of a batch of pairs, scalars: of the features, and of the cross tokens."""

    contrastive: Tensor
    cross: Tensor


class CrossGetClip(nn.Module):
    """CLIP whose towers merge tokens."""

    vision_model: nn.Module
    text_model: nn.Module
    visual_projection: nn.Linear
    text_projection: nn.Linear
    logit_scale: nn.Parameter

    def __init__(self, config: CrossGetConfig) -> None:
        super().__init__()
        self.config = config
        clip = CLIPModel(library_config(config))
        for name in ("vision_model", "text_model", "visual_projection", "text_projection", "logit_scale"):
            setattr(self, name, getattr(clip, name))
        if config.cross:
            for tower, name in (("vision", "cross_image"), ("text", "cross_text")):
                shape = (1, getattr(config, f"{tower}_depth"), getattr(config, f"{tower}_width"))
                getattr(self, f"{tower}_model").encoder.register_parameter(name, nn.Parameter(torch.zeros(shape)))
        self.set_removed(config.rv, config.rl)

    def set_removed(self, rv: int, rl: int) -> None:
        """Set how many image and text tokens every layer removes; weights stay as they are."""
        config = self.config = self.config.model_copy(update={"rv": rv, "rl": rl})
        self._vision = _merging(self.vision_model, "cross_image" if config.cross else None, rv)
        self._text = _merging(self.text_model, "cross_text" if config.cross else None, rl)
        self._text.causal, self._text.merge_padding = True, config.merge_padding

    @property
    def dummy_inputs(self) -> dict[str, Tensor]:
        """A small call."""
        words = some_words(self.config)["input_ids"]
        words[:, -1] = self.config.vocab_size - 1
        return {"images": some_images(self.config), "input_ids": words}

    def encode_image(self, images: Tensor) -> Encoded:
        """Return what becomes of images [B, 3, S, S]."""
        tower: Any = self.vision_model
        states = tower.pre_layrnorm(tower.embeddings(images))
        states, flow = _through(tower, self._vision, self._vision.start(states))
        features = self.visual_projection(tower.post_layernorm(states[:, 0]))
        return Encoded(features, _projected(flow, tower.pre_layrnorm, self.visual_projection), flow)

    def encode_text(self, input_ids: Tensor) -> Encoded:
        """Return what becomes of texts, token numbers [B, T]; each ends with the last word of the vocabulary."""
        tower: Any = self.text_model
        states = tower.embeddings(input_ids)
        states, flow = _through(tower, self._text, self._text.start(states, input_ids.argmax(1)))
        assert flow.guide is not None
        ends = states.gather(1, flow.guide[:, None, None].expand(-1, 1, states.shape[2])).squeeze(1)
        features = self.text_projection(tower.final_layer_norm(ends))
        return Encoded(features, _projected(flow, tower.final_layer_norm, self.text_projection), flow)

    def forward(
        self, images: Tensor, input_ids: Tensor, ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor] | CrossLosses:
        """Return the normalised features of images and texts; with `ids`, the losses of a batch of pairs.

        Args:
            images: [B, 3, S, S].
            input_ids: token numbers of the texts, [M, T]; M is B where `ids` are given.
            ids: number of each pair's image, [B]; equal numbers belong together.
        """
        image, text = self.encode_image(images), self.encode_text(input_ids)
        features = F.normalize(image.features, dim=-1), F.normalize(text.features, dim=-1)
        if ids is None:
            return features
        scale = self.logit_scale.clamp(0, _LARGEST_SCALE).exp()
        contrastive = matching_loss(*features, ids, scale)
        if not image.crosses:
            return CrossLosses(contrastive, torch.zeros_like(contrastive))
        crosses = (torch.cat(each) for each in layer_by_layer(image.crosses, text.crosses))
        return CrossLosses(contrastive, cross_loss(*crosses))


def _merging(tower: Any, cross: str | None, removed: int) -> Merger:
    """Have the layers of one of transformers' towers merge; returns how they do."""
    encoder = tower.encoder
    merger = Merger((removed,) * len(encoder.layers))
    if cross is not None:
        merger.cross = _Held(encoder, cross)
    for number, layer in enumerate(encoder.layers):
        set_merging(layer, Place(merger, Site(), number == 0))
    return merger


class _Held:
    """A parameter of a module, as it is at the moment: copies of the module have copies of both."""

    def __init__(self, module: nn.Module, name: str) -> None:
        self._module, self._name = module, name

    def __call__(self) -> Tensor:
        """The parameter."""
        found: Tensor = getattr(self._module, self._name)
        return found


def _through(tower: Any, merger: Merger, states: Tensor) -> tuple[Tensor, Flow]:
    for layer in tower.encoder.layers:
        states = layer(states, None, is_causal=merger.causal)
    flow = flow_of(states, merger)
    assert flow is not None
    return states, flow


def _projected(flow: Flow, norm: nn.LayerNorm, projection: nn.Linear) -> list[Tensor]:
    """Bring cross tokens into the space of features; only they learn from what becomes of it."""
    width, weight, bias = norm.normalized_shape, norm.weight.detach(), norm.bias.detach()
    return [
        F.linear(F.layer_norm(each, width, weight, bias, norm.eps), projection.weight.detach()) for each in flow.crosses
    ]
