"""Segmenter (Strudel et al., ICCV 2021): semantic segmentation with a vision transformer.

timm's vision transformer encodes patches. The decoder is a mask transformer, in which patches and class embeddings
attend to each other and are compared, or a linear layer. Scores of patches are upsampled to pixels. Parameter names are
those of the published checkpoints.
"""

from __future__ import annotations

from typing import Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from upop.models.sizes import ModelConfig, check_heads, check_patches

BACKBONES: dict[str, dict[str, int]] = {
    f"vit_{size}_patch{patch}_384": {
        "patch_size": patch,
        "vision_width": width,
        "vision_depth": depth,
        "vision_heads": width // 64,
        "vision_mlp": 4 * width,
        "decoder_width": width,
        "decoder_heads": width // 64,
        "decoder_mlp": 4 * width,
    }
    for size, patch, width, depth in (
        ("tiny", 16, 192, 12),
        ("small", 16, 384, 12),
        ("small", 32, 384, 12),
        ("base", 8, 768, 12),
        ("base", 16, 768, 12),
        ("base", 32, 768, 12),
        ("large", 16, 1024, 24),
    )
}
"""Published name of an encoder -> sizes; the decoder has the width of its encoder."""

_NORM = nn.LayerNorm  # with torch's eps of 1e-5, as published; timm's own default is 1e-6


class SegmenterConfig(ModelConfig):
    """Sizes of Segmenter before pruning. The defaults are those of the published ViT-S/16 model for ADE20K."""

    image_size: int = Field(
        512, gt=0, description="side of training crops, in pixels, which sets the position embeddings"
    )
    patch_size: int = Field(16, gt=0)
    vision_width: int = Field(384, gt=0)
    vision_depth: int = Field(12, gt=0)
    vision_heads: int = Field(6, gt=0)
    vision_mlp: int = Field(1536, gt=0)
    decoder: Literal["mask_transformer", "linear"] = "mask_transformer"
    decoder_width: int = Field(384, gt=0)
    decoder_depth: int = Field(2, gt=0)
    decoder_heads: int = Field(6, gt=0)
    decoder_mlp: int = Field(1536, gt=0)
    classes: int = Field(150, gt=0)
    encoder_classes: int = Field(1000, ge=0, description="of the encoder's classification head, which is not used")
    drop_path: float = Field(0.1, ge=0, lt=1, description="stochastic depth rate of the encoder's last block")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout of the encoder")
    decoder_drop_path: float = Field(0.0, ge=0, lt=1)
    decoder_dropout: float = Field(0.1, ge=0, lt=1)

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        check_heads(self, "vision", "decoder")
        check_patches(self)
        if self.image_size < self.patch_size:
            raise ValueError(f"image_size ({self.image_size}) is below patch_size ({self.patch_size})")
        return self


def resize_grid(positions: Tensor, grid: tuple[int, int]) -> Tensor:
    """Resize position embeddings of a square grid bilinearly, [1, 1 + side^2, width] -> [1, 1 + rows * columns, width].

    As in the published Segmenter; the first one, of the class token, is unchanged.
    """
    side = round((positions.shape[1] - 1) ** 0.5)
    if grid == (side, side):
        return positions
    patches = positions[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
    patches = F.interpolate(patches, size=grid, mode="bilinear", align_corners=False)
    return torch.cat([positions[:, :1], patches.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)


def _build_encoder(config: SegmenterConfig) -> VisionTransformer:
    encoder = VisionTransformer(
        img_size=config.image_size,
        patch_size=config.patch_size,
        embed_dim=config.vision_width,
        depth=config.vision_depth,
        num_heads=config.vision_heads,
        mlp_ratio=(config.vision_mlp + 0.5) / config.vision_width,  # timm rounds the product down
        num_classes=config.encoder_classes,
        pos_drop_rate=config.dropout,
        proj_drop_rate=config.dropout,
        attn_drop_rate=config.dropout,
        drop_path_rate=config.drop_path,
        norm_layer=_NORM,
        dynamic_img_size=True,
    )
    encoder.head.requires_grad_(False)  # unused: DDP would wait for its gradients
    return encoder


class LinearDecoder(nn.Module):
    """Scores every patch by a linear layer."""

    def __init__(self, config: SegmenterConfig) -> None:
        super().__init__()
        self.head = nn.Linear(config.vision_width, config.classes)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(self, patches: Tensor) -> Tensor:
        """Return scores, [batch, patches, classes], of encoded patches, [batch, patches, vision_width]."""
        scores: Tensor = self.head(patches)
        return scores


class MaskTransformer(nn.Module):
    """Lets patches and class embeddings attend to each other, and scores patches by similarity to each class."""

    def __init__(self, config: SegmenterConfig) -> None:
        super().__init__()
        width = config.decoder_width
        self.classes = config.classes
        self.proj_dec = nn.Linear(config.vision_width, width)
        self.cls_emb = nn.Parameter(torch.empty(1, config.classes, width))
        self.proj_patch = nn.Parameter(width**-0.5 * torch.randn(width, width))
        self.proj_classes = nn.Parameter(width**-0.5 * torch.randn(width, width))
        rates = torch.linspace(0, config.decoder_drop_path, config.decoder_depth, device="cpu").tolist()
        self.blocks = nn.ModuleList(
            Block(
                width,
                config.decoder_heads,
                mlp_ratio=(config.decoder_mlp + 0.5) / width,
                qkv_bias=True,
                proj_drop=config.decoder_dropout,
                attn_drop=config.decoder_dropout,
                drop_path=rate,
                norm_layer=_NORM,
            )
            for rate in rates
        )
        self.decoder_norm = _NORM(width)
        self.mask_norm = _NORM(config.classes)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.cls_emb, std=0.02)

    def forward(self, patches: Tensor) -> Tensor:
        """Return scores, [batch, patches, classes], of encoded patches, [batch, patches, vision_width]."""
        patches = self.proj_dec(patches)
        states = torch.cat([patches, self.cls_emb.expand(patches.shape[0], -1, -1)], dim=1)
        for block in self.blocks:
            states = block(states)
        patches, classes = self.decoder_norm(states).split([patches.shape[1], self.classes], dim=1)
        patches, classes = patches @ self.proj_patch, classes @ self.proj_classes
        patches = patches / patches.norm(dim=-1, keepdim=True)
        classes = classes / classes.norm(dim=-1, keepdim=True)
        scores: Tensor = self.mask_norm(patches @ classes.transpose(1, 2))
        return scores


class Segmenter(nn.Module):
    """A vision transformer and a decoder, for images of any size."""

    def __init__(self, config: SegmenterConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = _build_encoder(config)
        self.decoder = MaskTransformer(config) if config.decoder == "mask_transformer" else LinearDecoder(config)

    def encode(self, images: Tensor) -> Tensor:
        """Return states, [batch, 1 + patches, vision_width]: the class token's, then those of patches, row by row.

        Position embeddings are resized if the grid of patches differs from that of `config.image_size`.

        Args:
            images: [batch, 3, height, width]; sides are multiples of the patch size.
        """
        encoder = self.encoder
        assert encoder.cls_token is not None
        assert encoder.pos_embed is not None
        patches = encoder.patch_embed(images)  # [batch, rows, columns, width]
        positions = resize_grid(encoder.pos_embed, (patches.shape[1], patches.shape[2]))
        tokens = torch.cat([encoder.cls_token.expand(images.shape[0], -1, -1), patches.flatten(1, 2)], dim=1)
        states: Tensor = encoder.norm(encoder.blocks(encoder.pos_drop(tokens + positions)))
        return states

    def forward(self, images: Tensor) -> Tensor:
        """Return logits, [batch, classes, height, width], of images, [batch, 3, height, width], of any size.

        Images are padded with zeros, at the bottom and the right, to a multiple of the patch size; the result is
        cropped.
        """
        height, width = images.shape[-2:]
        patch = self.config.patch_size
        images = F.pad(images, (0, -width % patch, 0, -height % patch))
        rows, columns = images.shape[-2] // patch, images.shape[-1] // patch
        scores = self.decoder(self.encode(images)[:, 1:])  # [batch, patches, classes]
        scores = scores.transpose(1, 2).unflatten(2, (rows, columns))
        logits = F.interpolate(scores, size=images.shape[-2:], mode="bilinear", align_corners=False)
        return logits[..., :height, :width]
