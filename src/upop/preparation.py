"""Preparation of images for a model: resizing and normalisation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"]
Resize = Literal["squash", "crop", "pad"]
"""squash: both sides are resized to the model's; crop: the short side, followed by a centre crop; pad: the long side,
followed by padding with black (in classification, as in timm, with the mean colour)."""
Mean = tuple[float, float, float]
Deviation = tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]]

CLIP_MEAN: Mean = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD: Deviation = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN: Mean = (0.485, 0.456, 0.406)
IMAGENET_STD: Deviation = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Images:
    """Size and normalisation of images; by default as published for BLIP and CLIP.

    Attributes:
        mean: mean of red, green and blue, in [0, 1].
        std: standard deviation of red, green and blue.
        interpolation: interpolation of resizing.
        resize: how to reach a square.
        crop_ratio: the model's image side as a share of the resized one, before the centre crop.
    """

    mean: Mean = CLIP_MEAN
    std: Deviation = CLIP_STD
    interpolation: Interpolation = "bicubic"
    resize: Resize = "squash"
    crop_ratio: float = 1.0

    def resized_to(self, side: int) -> int:
        """Return the side in pixels to resize to before the centre crop of `side`."""
        return int(side / self.crop_ratio + 1e-6)  # 224 / (224 / 232) is a bit below 232


PUBLISHED = Images()
