"""How images become what a model takes: in which way they are resized, and which colours become zero and one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"]
Resize = Literal["squash", "crop", "pad"]
"""squash: both sides become the model's; crop: the short one does, and the middle is cut out; pad: the long one does,
and the rest is black (in classification, as timm does it, of the mean colour)."""
Mean = tuple[float, float, float]
Deviation = tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]]

CLIP_MEAN: Mean = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD: Deviation = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN: Mean = (0.485, 0.456, 0.406)
IMAGENET_STD: Deviation = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Images:
    """How images are brought to a model's size and range; by default as published for BLIP and CLIP.

    Attributes:
        mean: of red, green and blue, from 0 to 1, which becomes zero.
        std: their deviation, which becomes one.
        interpolation: of resizing.
        resize: in which way.
        crop_ratio: the model's side as a share of that which is resized to; the middle is cut out.
    """

    mean: Mean = CLIP_MEAN
    std: Deviation = CLIP_STD
    interpolation: Interpolation = "bicubic"
    resize: Resize = "squash"
    crop_ratio: float = 1.0

    def resized_to(self, side: int) -> int:
        """Return the side in pixels that images are resized to before `side` is cut out of their middle."""
        return int(side / self.crop_ratio + 1e-6)  # 224 / (224 / 232) is a bit below 232


PUBLISHED = Images()
