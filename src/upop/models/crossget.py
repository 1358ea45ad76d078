"""CLIP with CrossGET: both towers merge tokens layer by layer, guided by cross tokens (arXiv 2305.17455).

Parameter names are those of transformers' CLIPModel; the cross tokens are `vision_model.encoder.cross_image` and
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
from upop.tokens.layer import Merger, Place, Site, place_of, set_merging
from upop.tokens.losses import cross_loss, layer_by_layer, matching_loss
from upop.tokens.matching import removable

_LARGEST_SCALE = 4.6052
"""Maximum of the logarithm of the similarities' scale."""


class CrossGetConfig(ClipSizes):
    """Sizes of a CLIP model and how many tokens its layers remove. The defaults are those of ViT-B/16 at 224 pixels."""

    image_size: int = Field(224, gt=0, description="side of the square input images, in pixels")
    patch_size: int = Field(16, gt=0)
    vision_width: int = Field(768, gt=0)
    vision_depth: int = Field(12, gt=0)
    vision_heads: int = Field(12, gt=0)
    vision_mlp: int = Field(3072, gt=0)
    text_width: int = Field(512, gt=0)
    text_heads: int = Field(8, gt=0)
    text_mlp: int = Field(2048, gt=0)
    embed_dim: int = Field(512, gt=0, description="size of the features")
    cross: bool = Field(True, description="whether to use cross tokens; without them no tokens are removed")
    rv: int = Field(16, ge=0, description="image tokens removed per layer")
    rl: int = Field(0, ge=0, description="text tokens removed per layer")
    merge_padding: bool = Field(
        False, description="merge padding like words, as published; a text's features then depend on its padding"
    )


class Encoded(NamedTuple):
    """The output of a tower for a batch.

    Attributes:
        features: not normalised, [batch, embed_dim].
        crosses: projected cross tokens of every layer, [batch, embed_dim] each.
        flow: the record of merged tokens.
    """

    features: Tensor
    crosses: list[Tensor]
    flow: Flow


class CrossLosses(NamedTuple):
    """The losses of a batch of pairs, scalars: the contrastive loss, and the cross loss."""

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
        """Set the number of image and text tokens that every layer removes; weights do not change.

        A model without cross tokens is a plain CLIP, whose image tokens `upop.merge_tokens` merges.
        """
        config = self.config = self.config.model_copy(update={"rv": rv, "rl": rl})
        if not config.cross:
            return
        _merge(self.vision_model, Merger((rv,) * config.vision_depth))
        _merge(self.text_model, Merger((rl,) * config.text_depth, causal=True, merge_padding=config.merge_padding))

    @property
    def dummy_inputs(self) -> dict[str, Tensor]:
        """Small inputs, for `upop.find_prunable` to trace the model."""
        words = some_words(self.config)["input_ids"]
        words[:, -1] = self.config.vocab_size - 1
        return {"images": some_images(self.config), "input_ids": words}

    def encode_image(self, images: Tensor) -> Encoded:
        """Encode images, [batch, 3, size, size]."""
        tower: Any = self.vision_model
        states = tower.pre_layrnorm(tower.embeddings(images))
        states, flow = _through(tower, states, "cross_image")
        features = self.visual_projection(tower.post_layernorm(states[:, 0]))
        return Encoded(features, _projected(flow, tower.pre_layrnorm, self.visual_projection), flow)

    def encode_text(self, input_ids: Tensor) -> Encoded:
        """Encode texts, token ids [batch, tokens]; each ends with the last word of the vocabulary."""
        embeddings: Any = self.text_model.embeddings
        if self.config.rl:  # the number of removed tokens depends on the length, which must not depend on the batch
            input_ids = F.pad(input_ids, (0, max(0, self.config.max_positions - input_ids.shape[1])))
        return self.encode_words(embeddings.token_embedding(input_ids), input_ids.argmax(1))

    def encode_words(self, words: Tensor, ends: Tensor) -> Encoded:
        """Encode texts given as embeddings without positions, [batch, tokens, hidden].

        Args:
            words: the embeddings.
            ends: position of each text's end token, [batch].
        """
        tower: Any = self.text_model
        states = words + tower.embeddings.position_embedding.weight[: words.shape[1]]
        states, flow = _through(tower, states, "cross_text", ends)
        assert flow.guide is not None
        ends = states.gather(1, flow.guide[:, None, None].expand(-1, 1, states.shape[2])).squeeze(1)
        features = self.text_projection(tower.final_layer_norm(ends))
        return Encoded(features, _projected(flow, tower.final_layer_norm, self.text_projection), flow)

    def forward(
        self, images: Tensor, input_ids: Tensor, ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor] | CrossLosses:
        """Return the normalised features of images and texts; with `ids`, the losses of a batch of pairs.

        Args:
            images: [batch, 3, size, size].
            input_ids: token ids of the texts, [texts, tokens]; one text per image if `ids` are given.
            ids: image number of each pair, [batch]; pairs with equal numbers are positives.
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


def _merge(tower: Any, merger: Merger) -> None:
    """Turn on token merging in the layers of a tower of transformers."""
    for number, layer in enumerate(tower.encoder.layers):
        set_merging(layer, Place(merger, Site(), number))


def _through(tower: Any, states: Tensor, cross: str, ends: Tensor | None = None) -> tuple[Tensor, Flow]:
    """Run the layers of a tower; `cross` is the name of its cross tokens, `ends` the positions of texts' end tokens."""
    layers = tower.encoder.layers
    place = place_of(layers[0])
    if place is None:
        mask = None if ends is None else states.new_full((states.shape[1],) * 2, -torch.inf).triu(1)[None, None]
        for layer in layers:
            states = layer(states, mask)
        return states, Flow(None, guide=ends)
    merger = place.merger
    states = merger.start(states, ends, getattr(tower.encoder, cross, None))
    for layer in layers:
        states = layer(states, None, is_causal=merger.causal)
    flow = flow_of(states, merger)
    assert flow is not None
    return states, flow


def _projected(flow: Flow, norm: nn.LayerNorm, projection: nn.Linear) -> list[Tensor]:
    """Project cross tokens to features, with gradients for the cross tokens only."""
    width, weight, bias = norm.normalized_shape, norm.weight.detach(), norm.bias.detach()
    return [
        F.linear(F.layer_norm(each, width, weight, bias, norm.eps), projection.weight.detach()) for each in flow.crosses
    ]


def published_macs(config: CrossGetConfig) -> int:
    """Return the multiply-adds of one pair, counted as in the published logs, with norms and matching."""
    sizes, embed = config, config.embed_dim
    patches = (sizes.image_size // sizes.patch_size) ** 2
    extra = 1 if sizes.cross else 0
    first = patches + 1 + extra
    layers, _ = _published_layers(
        first, sizes.vision_width, sizes.vision_mlp, sizes.vision_depth, sizes.rv, protected=2
    )
    width = sizes.vision_width
    image = patches * width * 3 * sizes.patch_size**2 + 5 * first * width + layers + 5 * width + width * embed
    layers, left = _published_layers(
        sizes.max_positions + extra, sizes.text_width, sizes.text_mlp, sizes.text_depth, sizes.rl, protected=3
    )
    text = layers + 5 * left * sizes.text_width + embed * sizes.text_width
    return image + text + embed


def _published_layers(
    tokens: int, width: int, mlp: int, depth: int, removed: int, *, protected: int
) -> tuple[int, int]:
    """Return the multiply-adds of a tower's layers, and the number of tokens left."""
    total = 0
    for _ in range(depth):
        left = tokens - removable(tokens, protected, removed)
        matching = tokens**2 * width + tokens * width if removed else 0
        attention = 4 * tokens * width**2 + 2 * tokens**2 * width
        total += 5 * (tokens + left) * width + attention + matching + 2 * left * width * mlp
        tokens = left
    return total, tokens
