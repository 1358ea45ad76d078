"""The published image transforms of BLIP and CLIP: from an image to a normalised float tensor [3, s, s]."""

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
    """The transform of evaluation: resize to image_size x image_size pixels (as published, bicubic) and normalise."""
    return _Finish(image_size, images)


def train_transform(image_size: int, augment: bool = True, images: Images = PUBLISHED) -> ImageTransform:
    """The transform of training: random crop of half to all of the area, random flip, RandAugment, normalise.

    Without `augment` it is the evaluation's: generated images must keep their counts and positions. All
    chance comes from torch's generator.
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
    """Cut out a rectangle and resize it, for training: torch does so four times as fast as Pillow.

    It differs by rounding: one level of 255 in some of the pixels, seldom two. Evaluation keeps to Pillow.

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
    """A random crop and flip, RandAugment, `_Finish`; plain classes, as v2's generic ones cost more than the work."""

    def __init__(self, image_size: int, images: Images) -> None:
        self.image_size = image_size
        self.augment = RandAugment()
        self.finish = _Finish(image_size, images)
        # Tensors know these two alone.
        self.interpolation = _BILINEAR if images.interpolation == "bilinear" else _BICUBIC

    def __call__(self, image: Image.Image) -> Tensor:
        crop = RandomResizedCrop.get_params(image, list(CROP_SCALE), _CROP_RATIO)
        cropped = resized_crop(image, crop, (self.image_size, self.image_size), self.interpolation)
        if torch.rand(()) < 0.5:
            cropped = tvf.horizontal_flip(cropped)
        return self.finish(self.augment(cropped))


class _Finish:
    """Resizes where needed, and normalises."""

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
                image = tvf.center_crop(image, [side, side])  # where it is smaller, black is added
        # As bytes into planes of colours: arithmetic on colours that lie side by side takes twice the time.
        tensor: Tensor = tvf.pil_to_tensor(image).contiguous()
        return tensor.float().div_(255.0).sub_(self.mean).div_(self.std)


def _size(image: Image.Image, side: int, images: Images) -> list[int]:
    """Return the height and width that an image is resized to."""
    if images.resize == "squash":
        return [side, side]
    short, long = sorted(image.size)
    # Rounded as the libraries do whose checkpoints ask for it: torchvision down, open_clip to the nearest.
    other = int(side * long / short) if images.resize == "crop" else max(1, round(side * short / long))
    is_short_high = (image.height == short) == (images.resize == "crop")
    return [side, other] if is_short_high else [other, side]


class RandAugment:
    """The published RandAugment: two operations, each done with probability 1/2, at level 5 of 10.

    Level 5 shears by 0.15, shifts by 5 pixels and turns by 15 degrees, either way, and leaves brightness and
    sharpness as they are; torchvision's own RandAugment has other operations and other scales, so its levels
    mean other things.
    """

    def __init__(self, operations: int = RANDAUGMENT_OPS, level: int = RANDAUGMENT_LEVEL) -> None:
        self.operations = operations
        self.level = level

    def __call__(self, image: Image.Image) -> Image.Image:
        """The image after the drawn operations, of the same size."""
        for _ in range(self.operations):
            operation = _OPERATIONS[int(torch.randint(len(_OPERATIONS), ()))]
            if torch.rand(()) < 0.5:
                image = operation(image, self.level / _LEVELS)
        return image


def _either_way(value: float) -> float:
    return -value if torch.rand(()) < 0.5 else value


def _factor(strength: float) -> float:
    """0.1 to 1.9; 1 changes nothing."""
    return 0.1 + 1.8 * strength


def _enhance(change: Callable[[Image.Image, float], Image.Image], image: Image.Image, strength: float) -> Image.Image:
    factor = _factor(strength)
    return image if factor == 1.0 else change(image, factor)  # which would be computed only to give the same


def _move(
    image: Image.Image,
    *,
    angle: float = 0.0,
    x: float = 0.0,
    y: float = 0.0,
    shear_x: float = 0.0,
    shear_y: float = 0.0,
) -> Image.Image:
    """Turn by degrees about the centre, shift by pixels, or shear by a slope about the top left corner."""
    if angle == shear_x == shear_y == 0.0:  # whole pixels are copied, which is much faster and gives the same
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


# Each takes an image and a strength of 0 to 1.
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
