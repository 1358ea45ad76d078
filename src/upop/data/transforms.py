"""The published image transforms of BLIP and CLIP: image -> normalised float tensor, [3, size, size]."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import RandomResizedCrop, v2
from torchvision.transforms.v2 import functional as tvf

from upop.preparation import CLIP_MEAN, CLIP_STD, PUBLISHED, Images

ImageTransform = Callable[[Image.Image], Tensor]

MEAN, STD = CLIP_MEAN, CLIP_STD
CROP_SCALE = (0.5, 1.0)
_CROP_RATIO = [3 / 4, 4 / 3]

RANDAUGMENT_OPS = 2
RANDAUGMENT_LEVEL = 5
_LEVELS = 10
_FILL = (128, 128, 128)

_BICUBIC, _BILINEAR = v2.InterpolationMode.BICUBIC, v2.InterpolationMode.BILINEAR


def eval_transform(image_size: int, images: Images = PUBLISHED) -> ImageTransform:
    """Return the transform of evaluation: resize to image_size x image_size (bicubic, as published) and normalise."""
    return _Finish(image_size, images)


def train_transform(image_size: int, augment: bool = True, images: Images = PUBLISHED) -> ImageTransform:
    """Return the transform of training: random crop (50 to 100 % of the area), random flip, RandAugment, normalise.

    Without `augment` it is that of evaluation, because texts about generated images name counts and positions. Random
    draws use torch's generator.
    """
    if not augment:
        return eval_transform(image_size, images)
    return _Train(image_size, images)


def resized_crop(
    image: Image.Image,
    crop: tuple[int, int, int, int],
    size: tuple[int, int],
    interpolation: v2.InterpolationMode,
) -> Image.Image:
    """Crop a rectangle and resize it, for training: with torch, which is four times as fast as Pillow.

    Results differ from Pillow's by rounding: one of 255 levels in some pixels, rarely two. Evaluation uses Pillow.

    Args:
        image: the image.
        crop: top, left, height and width in pixels.
        size: height and width of the result.
        interpolation: bilinear or bicubic.
    """
    part = tvf.pil_to_tensor(tvf.crop(image, *crop))
    resized: Image.Image = tvf.to_pil_image(tvf.resize(part, list(size), interpolation=interpolation, antialias=True))
    return resized


class _Train:
    """Random crop, random flip, RandAugment, `_Finish`; v2's generic transforms have more overhead than work."""

    def __init__(self, image_size: int, images: Images) -> None:
        self.image_size = image_size
        self.augment = RandAugment()
        self.finish = _Finish(image_size, images)
        # Tensors support only these two.
        self.interpolation = _BILINEAR if images.interpolation == "bilinear" else _BICUBIC

    def __call__(self, image: Image.Image) -> Tensor:
        crop = RandomResizedCrop.get_params(image, list(CROP_SCALE), _CROP_RATIO)
        cropped = resized_crop(image, crop, (self.image_size, self.image_size), self.interpolation)
        if torch.rand(()) < 0.5:
            cropped = tvf.horizontal_flip(cropped)
        return self.finish(self.augment(cropped))


class _Finish:
    """Resizes if needed, and normalises."""

    def __init__(self, image_size: int, images: Images) -> None:
        self.image_size = image_size
        self.images = images
        self.mean = torch.tensor(images.mean).view(3, 1, 1)
        self.std = torch.tensor(images.std).view(3, 1, 1)

    def __call__(self, image: Image.Image) -> Tensor:
        side = self.image_size
        if image.size != (side, side):
            size = _size(image, self.images.resized_to(side), self.images)
            if size != [image.height, image.width]:
                way = v2.InterpolationMode(self.images.interpolation)
                image = tvf.resize(image, size, interpolation=way, antialias=True)
            if size != [side, side]:
                image = tvf.center_crop(image, [side, side])  # pads smaller images with black
        # Contiguous planes of uint8: arithmetic on interleaved colours takes twice the time.
        tensor: Tensor = tvf.pil_to_tensor(image).contiguous()
        return tensor.float().div_(255.0).sub_(self.mean).div_(self.std)


def _size(image: Image.Image, side: int, images: Images) -> list[int]:
    """Return height and width of the resized image."""
    if images.resize == "squash":
        return [side, side]
    short, long = sorted(image.size)
    # Rounded like the libraries of the checkpoints: torchvision rounds down, open_clip to the nearest.
    other = int(side * long / short) if images.resize == "crop" else max(1, round(side * short / long))
    is_short_high = (image.height == short) == (images.resize == "crop")
    return [side, other] if is_short_high else [other, side]


class RandAugment:
    """The published RandAugment: two operations, each with probability 1/2, at level 5 of 10.

    Level 5 shears by 0.15, shifts by 5 pixels and rotates by 15 degrees, in either direction, and leaves brightness and
    sharpness unchanged. torchvision's RandAugment has other operations and scales.
    """

    def __init__(self, operations: int = RANDAUGMENT_OPS, level: int = RANDAUGMENT_LEVEL) -> None:
        self.operations = operations
        self.level = level

    def __call__(self, image: Image.Image) -> Image.Image:
        """Return the augmented image, in the same size."""
        for _ in range(self.operations):
            operation = _OPERATIONS[int(torch.randint(len(_OPERATIONS), ()))]
            if torch.rand(()) < 0.5:
                image = operation(image, self.level / _LEVELS)
        return image


def _either_way(value: float) -> float:
    return -value if torch.rand(()) < 0.5 else value


def _factor(strength: float) -> float:
    """Return a factor of 0.1 to 1.9; 1 is the identity."""
    return 0.1 + 1.8 * strength


def _enhance(change: Callable[[Image.Image, float], Image.Image], image: Image.Image, strength: float) -> Image.Image:
    factor = _factor(strength)
    return image if factor == 1.0 else change(image, factor)


def _move(
    image: Image.Image,
    *,
    angle: float = 0.0,
    x: float = 0.0,
    y: float = 0.0,
    shear_x: float = 0.0,
    shear_y: float = 0.0,
) -> Image.Image:
    """Rotate by degrees about the centre, shift by pixels, or shear by a slope about the top left corner."""
    if angle == shear_x == shear_y == 0.0:  # copying whole pixels is much faster, with the same result
        shifted = Image.new(image.mode, image.size, _FILL)
        shifted.paste(image, (round(x), round(y)))
        return shifted
    shear = [math.degrees(math.atan(shear_x)), math.degrees(math.atan(shear_y))]
    moved: Image.Image = tvf.affine(
        image,
        angle=angle,
        translate=[round(x), round(y)],
        scale=1.0,
        shear=shear,
        interpolation=v2.InterpolationMode.BILINEAR,
        fill=list(_FILL),
        center=[0.0, 0.0] if any(shear) else None,
    )
    return moved


# (image, strength from 0 to 1) -> image.
_OPERATIONS: tuple[Callable[[Image.Image, float], Image.Image], ...] = (
    lambda image, _: image,
    lambda image, _: tvf.autocontrast(image),
    lambda image, _: tvf.equalize(image),
    lambda image, strength: _enhance(tvf.adjust_brightness, image, strength),
    lambda image, strength: _enhance(tvf.adjust_sharpness, image, strength),
    lambda image, strength: _move(image, shear_x=_either_way(0.3 * strength)),
    lambda image, strength: _move(image, shear_y=_either_way(0.3 * strength)),
    lambda image, strength: _move(image, x=_either_way(10.0 * strength)),
    lambda image, strength: _move(image, y=_either_way(10.0 * strength)),
    lambda image, strength: _move(image, angle=_either_way(30.0 * strength)),
)
