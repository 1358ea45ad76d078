"""Segmenter's published transforms of images and label maps: resizing, crops, flips and photometric distortion.

Random draws use torch's generator.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tvf

from upop.preparation import IMAGENET_MEAN, IMAGENET_STD, Deviation, Mean

IGNORED = 255
"""Label of pixels without a class; they are ignored in training and evaluation."""

Normalization = Literal["vit", "deit"]
Statistics = tuple[Mean, Deviation]
STATISTICS: dict[Normalization, Statistics] = {
    "vit": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),  # of the published ViT checkpoints, in all published runs
    "deit": (IMAGENET_MEAN, IMAGENET_STD),
}
"""Mean and standard deviation of red, green and blue, by the published name."""

RESIZE_RATIO = (0.5, 2.0)
LARGEST_SHARE = 0.75
_LONGEST = 4
_CROPS_TRIED = 10
_BRIGHTNESS = 32 / 255
_CONTRAST = _SATURATION = (0.5, 1.5)
_HUE = 0.1  # of the colour circle

SegmentTransform = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Image, uint8 [3, height, width], and labels, [height, width] -> normalised image, float32, and labels, int64."""


def scaled_size(height: int, width: int, short: int) -> tuple[int, int]:
    """Return height and width with a short side of `short`, in the image's aspect ratio.

    The long side is limited to 4 times `short`; the short side is then smaller.
    """
    factor = min(short / min(height, width), _LONGEST * short / max(height, width))
    return max(1, int(height * factor + 0.5)), max(1, int(width * factor + 0.5))


@dataclass(frozen=True)
class Normalise:
    """The transform of evaluation: it normalises and keeps the size, because the model's window slides over images."""

    statistics: Statistics = STATISTICS["vit"]

    def __call__(self, image: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the normalised image, and the labels unchanged."""
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in self.statistics)
        return image.float().div_(255.0).sub_(mean).div_(std), labels

    def undo(self, image: Tensor) -> Tensor:
        """Return the image as uint8, from a normalised one."""
        mean, std = (torch.tensor(values, device=image.device).view(3, 1, 1) for values in self.statistics)
        return image.mul(std).add(mean).mul(255).round().clamp(0, 255).byte()


@dataclass(frozen=True)
class TrainCrop:
    """The transform of training: resize by a ratio of 0.5 to 2, crop, flip, distort colours, normalise and pad.

    Attributes:
        image_size: short side before the ratio.
        crop_size: side of the square crop.
        augment: False only crops the top left corner at ratio 1, because the generated classes are colours.
        statistics: mean and standard deviation for normalising colours.
    """

    image_size: int
    crop_size: int
    augment: bool = True
    statistics: Statistics = STATISTICS["vit"]

    def __call__(self, image: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return a crop of the image and of its labels."""
        image, labels = self._resized(image, labels)
        top, left = self._corner(labels)
        rows, columns = slice(top, top + self.crop_size), slice(left, left + self.crop_size)
        image, labels = image[:, rows, columns], labels[rows, columns]
        if self.augment:
            if torch.rand(()) < 0.5:
                image, labels = image.flip(2), labels.flip(1)
            image = photometric_jitter(image)
        image, labels = Normalise(self.statistics)(image, labels)
        # Padded after normalising, so that the padding has the mean colour, as published.
        padding = [0, 0, self.crop_size - labels.shape[1], self.crop_size - labels.shape[0]]
        return tvf.pad(image, padding), tvf.pad(labels[None], padding, fill=IGNORED)[0]

    def _resized(self, image: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        height, width = labels.shape
        ratio = _between(*RESIZE_RATIO) if self.augment else 1.0
        size = list(scaled_size(height, width, int(self.image_size * ratio)))
        if size == [height, width]:
            return image, labels
        # Without antialiasing, as in the published pipeline, which resizes with OpenCV.
        image = tvf.resize(image, size, interpolation=v2.InterpolationMode.BILINEAR, antialias=False)
        return image, tvf.resize(labels[None], size, interpolation=v2.InterpolationMode.NEAREST)[0]

    def _corner(self, labels: Tensor) -> tuple[int, int]:
        """Draw the top left corner of a crop, up to ten times, until no class covers more than 75 % of it."""
        if not self.augment:
            return 0, 0
        for _ in range(_CROPS_TRIED):
            top, left = (int(torch.randint(max(side - self.crop_size, 0) + 1, ())) for side in labels.shape)
            crop = labels[top : top + self.crop_size, left : left + self.crop_size]
            counts = crop.flatten().bincount(minlength=IGNORED + 1)[:IGNORED]  # faster than unique, which sorts
            if int((counts > 0).sum()) > 1 and counts.max() < LARGEST_SHARE * counts.sum():
                break
        return top, left


def photometric_jitter(image: Tensor) -> Tensor:
    """Change brightness, contrast, saturation and hue of an image, uint8 [3, height, width], with probability 1/2 each.

    Operations and order are the published ones: contrast is a factor, before or after saturation and hue. torchvision's
    RandomPhotometricDistort also swaps colour channels.
    """
    changed = image.float().div_(255)
    if _chance():
        changed = changed.add_(_between(-_BRIGHTNESS, _BRIGHTNESS)).clamp_(0, 1)
    contrast_first = _chance()
    if contrast_first and _chance():
        changed = changed.mul_(_between(*_CONTRAST)).clamp_(0, 1)
    if _chance():
        changed = saturate(changed, _between(*_SATURATION))
    if _chance():
        changed = turn_hue(changed, _between(-_HUE, _HUE))
    if not contrast_first and _chance():
        changed = changed.mul_(_between(*_CONTRAST)).clamp_(0, 1)
    return changed.mul_(255).round_().clamp_(0, 255).byte()


def saturate(image: Tensor, factor: float) -> Tensor:
    """Multiply the HSV saturation, up to 1; hue and value are unchanged.

    As published; torchvision's adjust_saturation blends with the grey image, which changes the value too.
    """
    value = image.amax(0, keepdim=True)
    spread = value - image.amin(0, keepdim=True)
    largest = (value / spread.clamp_min_(1e-6)).clamp_(max=factor)
    return (value - image).mul_(largest).neg_().add_(value)


def turn_hue(image: Tensor, share: float) -> Tensor:
    """Shift the hue of an image, [3, height, width] from 0 to 1, by a share of the colour circle.

    It equals torchvision's adjust_hue up to rounding in a third of the time (5 ms instead of 16 for 512 x 683 pixels):
    that computes all six cases for every pixel.
    """
    red, green, blue = image
    value = torch.maximum(torch.maximum(red, green), blue)
    spread = value - torch.minimum(torch.minimum(red, green), blue)
    grey = spread.clamp_min(torch.finfo(image.dtype).tiny)
    # Position on a circle of length 6: red is at 0, green at 2, blue at 4.
    of_green = (blue - red).div_(grey).add_(2)
    of_blue = (red - green).div_(grey).add_(4)
    place = torch.where(red == value, (green - blue).div_(grey), torch.where(green == value, of_green, of_blue))
    turned = torch.empty_like(image)
    for channel, opposite in enumerate((3, 5, 1)):  # positions opposite to red, green, blue
        away = (place + (6 * share - opposite)).abs_()
        away = torch.minimum(away, (6 - away).abs_())  # the shorter arc
        torch.sub(value, spread * (2 - away).clamp_(0, 1), out=turned[channel])
    return turned


def _chance() -> bool:
    return bool(torch.rand(()) < 0.5)


def _between(low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand(()))
