"""The published transforms of Segmenter: crops of resized images with their label maps, and changes of their light.

All chance comes from torch's generator.
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
"""The label of pixels that belong to no class; they count neither in training nor in evaluation."""

Normalization = Literal["vit", "deit"]
Statistics = tuple[Mean, Deviation]
STATISTICS: dict[Normalization, Statistics] = {
    "vit": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),  # of the published ViT checkpoints, all published runs here among them
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
"""(image uint8 [3, H, W], labels [H, W]) -> (normalised image float32 [3, h, w], labels int64 [h, w])."""


def scaled_size(height: int, width: int, short: int) -> tuple[int, int]:
    """Return the size in pixels, in the image's proportions, at which its short side is `short`.

    Unless the long side would be above 4 times `short`: then it is that, and the short side less.
    """
    factor = min(short / min(height, width), _LONGEST * short / max(height, width))
    return max(1, int(height * factor + 0.5)), max(1, int(width * factor + 0.5))


@dataclass(frozen=True)
class Normalise:
    """What evaluation does: images keep their size, for the model's windows slide over any."""

    statistics: Statistics = STATISTICS["vit"]

    def __call__(self, image: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The image normalised; the labels as they are."""
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in self.statistics)
        return image.float().div_(255.0).sub_(mean).div_(std), labels

    def undo(self, image: Tensor) -> Tensor:
        """The image as bytes, from a normalised one."""
        mean, std = (torch.tensor(values, device=image.device).view(3, 1, 1) for values in self.statistics)
        return image.mul(std).add(mean).mul(255).round().clamp(0, 255).byte()


@dataclass(frozen=True)
class TrainCrop:
    """What training does: resize by a ratio of 0.5 to 2, crop, mirror, change the light, normalise, and fill up.

    Attributes:
        image_size: what the short side is brought to, before the ratio.
        crop_size: side of the square crop.
        augment: False takes the top left corner of the image at ratio 1 as it is: generated classes are colours.
        statistics: mean and deviation that colours are normalised by.
    """

    image_size: int
    crop_size: int
    augment: bool = True
    statistics: Statistics = STATISTICS["vit"]

    def __call__(self, image: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """A crop of the image, and the labels of its pixels."""
        image, labels = self._resized(image, labels)
        top, left = self._corner(labels)
        rows, columns = slice(top, top + self.crop_size), slice(left, left + self.crop_size)
        image, labels = image[:, rows, columns], labels[rows, columns]
        if self.augment:
            if torch.rand(()) < 0.5:
                image, labels = image.flip(2), labels.flip(1)
            image = photometric_jitter(image)
        image, labels = Normalise(self.statistics)(image, labels)
        # Filled up after normalising, so the filling is of the mean colour, as published.
        padding = [0, 0, self.crop_size - labels.shape[1], self.crop_size - labels.shape[0]]
        return tvf.pad(image, padding), tvf.pad(labels[None], padding, fill=IGNORED)[0]

    def _resized(self, image: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        height, width = labels.shape
        ratio = _between(*RESIZE_RATIO) if self.augment else 1.0
        size = list(scaled_size(height, width, int(self.image_size * ratio)))
        if size == [height, width]:
            return image, labels
        # OpenCV, which the published pipeline resizes with, does not filter against aliasing.
        image = tvf.resize(image, size, interpolation=v2.InterpolationMode.BILINEAR, antialias=False)
        return image, tvf.resize(labels[None], size, interpolation=v2.InterpolationMode.NEAREST)[0]

    def _corner(self, labels: Tensor) -> tuple[int, int]:
        """Draw the top left corner of a crop; up to ten times, until no class has more than its share."""
        if not self.augment:
            return 0, 0
        for _ in range(_CROPS_TRIED):
            top, left = (int(torch.randint(max(side - self.crop_size, 0) + 1, ())) for side in labels.shape)
            crop = labels[top : top + self.crop_size, left : left + self.crop_size]
            counts = crop.flatten().bincount(minlength=IGNORED + 1)[:IGNORED]  # faster than to sort, as unique does
            if int((counts > 0).sum()) > 1 and counts.max() < LARGEST_SHARE * counts.sum():
                break
        return top, left


def photometric_jitter(image: Tensor) -> Tensor:
    """Change brightness, contrast, saturation and hue of an image of bytes [3, H, W], each with probability 1/2.

    The published operations and their order: contrast multiplies, and comes before saturation and hue or after them.
    (torchvision's RandomPhotometricDistort also swaps colour channels.)
    """
    changed = image.float().div_(255)
    if _chance():
        changed = changed.add_(_between(-_BRIGHTNESS, _BRIGHTNESS)).clamp_(0, 1)
    contrast_first = _chance()
    if contrast_first and _chance():
        changed = changed.mul_(_between(*_CONTRAST)).clamp_(0, 1)
    if _chance():
        changed = _saturate(changed, _between(*_SATURATION))
    if _chance():
        changed = turn_hue(changed, _between(-_HUE, _HUE))
    if not contrast_first and _chance():
        changed = changed.mul_(_between(*_CONTRAST)).clamp_(0, 1)
    return changed.mul_(255).round_().clamp_(0, 255).byte()


def _saturate(image: Tensor, factor: float) -> Tensor:
    """Multiply the saturation of HSV, which reaches at most 1, and leave hue and value as they are.

    As published. torchvision's adjust_saturation blends with the grey image, which moves the value too.
    """
    value = image.amax(0, keepdim=True)
    spread = value - image.amin(0, keepdim=True)
    largest = (value / spread.clamp_min_(1e-6)).clamp_(max=factor)
    return (value - image).mul_(largest).neg_().add_(value)


def turn_hue(image: Tensor, share: float) -> Tensor:
    """Turn the hue of an image [3, H, W] of 0 to 1 by a share of the colour circle; saturation and value stay.

    The same as torchvision's adjust_hue up to rounding, in a third of its time: that one makes all six colours that
    each pixel may get.
    """
    red, green, blue = image
    value = torch.maximum(torch.maximum(red, green), blue)
    spread = value - torch.minimum(torch.minimum(red, green), blue)
    grey = spread.clamp_min(torch.finfo(image.dtype).tiny)
    # Where on a circle of six parts: red is at 0, green at 2, blue at 4.
    of_green = (blue - red).div_(grey).add_(2)
    of_blue = (red - green).div_(grey).add_(4)
    place = torch.where(red == value, (green - blue).div_(grey), torch.where(green == value, of_green, of_blue))
    turned = torch.empty_like(image)
    for channel, opposite in enumerate((3, 5, 1)):  # where a colour has nothing of red, green, blue
        away = (place + (6 * share - opposite)).abs_()
        away = torch.minimum(away, (6 - away).abs_())  # the shorter way round
        torch.sub(value, spread * (2 - away).clamp_(0, 1), out=turned[channel])
    return turned


def _chance() -> bool:
    return bool(torch.rand(()) < 0.5)


def _between(low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand(()))
