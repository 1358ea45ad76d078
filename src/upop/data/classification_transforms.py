"""The augmentation of DeiT, by timm: RandAugment, random erasing, and mixing (mixup, cutmix)."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
from PIL import Image
from timm.data.auto_augment import AugmentOp, AutoAugment, posterize
from timm.data.mixup import Mixup
from timm.data.transforms import RandomResizedCropAndInterpolation
from timm.data.transforms_factory import create_transform
from torch import Tensor

from upop.data.transforms import ImageTransform, resized_crop
from upop.errors import SettingError
from upop.preparation import IMAGENET_MEAN, IMAGENET_STD, Images

POLICY = "rand-m9-mstd0.5-inc1"
"""DeiT's RandAugment policy, by timm's name."""

CropInterpolation = Literal["bicubic", "bilinear", "random"]
Erasing = Literal["const", "rand", "pixel"]
MixMode = Literal["batch", "pair", "elem"]


@dataclass(frozen=True)
class Augmentation:
    """Settings of the augmentation in training.

    Attributes:
        policy: timm's name of a policy, such as `POLICY`; None for colour jitter alone.
        color_jitter: strength of the jitter of brightness, contrast and saturation, without a policy.
        interpolation: of the crops.
        erasing: probability of random erasing.
        erasing_mode: content of the erased rectangle: zeros, one random colour, or random pixels.
        erasing_count: maximum number of rectangles.
    """

    policy: str | None = POLICY
    color_jitter: float = 0.4
    interpolation: CropInterpolation = "bicubic"
    erasing: float = 0.25
    erasing_mode: Erasing = "pixel"
    erasing_count: int = 1


IMAGENET = Images(IMAGENET_MEAN, IMAGENET_STD, resize="crop", crop_ratio=0.875)
"""Preparation of images in DeiT's evaluation."""
_CROP_MODES = {"squash": "squash", "crop": "center", "pad": "border"}


def train_transform(image_size: int, augmentation: Augmentation, images: Images = IMAGENET) -> ImageTransform:
    """Return the transform of training: a random crop (8 to 100 % of the area) and flip, then the augmentation.

    `images` gives mean and standard deviation.

    Raises:
        SettingError: timm has no such policy.
    """
    try:
        transform: Any = create_transform(
            input_size=image_size,
            is_training=True,
            auto_augment=augmentation.policy,
            color_jitter=augmentation.color_jitter,
            interpolation=augmentation.interpolation,
            re_prob=augmentation.erasing,
            re_mode=augmentation.erasing_mode,
            re_count=augmentation.erasing_count,
            mean=images.mean,
            std=images.std,
        )
    except Exception as error:  # timm raises errors of several types
        raise SettingError(
            f"auto_augment={augmentation.policy!r} is not a policy of timm ({error or type(error).__name__}). "
            f"Use {POLICY}, original, v0, or null for none."
        ) from error
    for step in transform.transforms:
        if type(step) is RandomResizedCropAndInterpolation:
            step.__class__ = _Crop
        for operation in _operations(step):
            if operation.aug_fn is posterize:
                operation.aug_fn = _posterize
    return cast(ImageTransform, transform)


def _operations(step: Any) -> list[AugmentOp]:
    """Return the operations of a policy step; none for other steps."""
    if isinstance(step, AutoAugment):
        return [operation for part in step.policy for operation in part]
    return [operation for operation in getattr(step, "ops", ()) if isinstance(operation, AugmentOp)]


def _posterize(image: Image.Image, bits: int, **kwargs: Any) -> Image.Image:
    """Posterize like timm, and also to 0 bits, which its highest level needs and Pillow 13 rejects."""
    if bits < 1:
        return Image.new(image.mode, image.size)
    posterized: Image.Image = posterize(image, bits, **kwargs)
    return posterized


class _Crop(RandomResizedCropAndInterpolation):
    """timm's random crop, resized faster."""

    def __call__(self, image: Image.Image) -> Image.Image:
        """The crop, of the requested size."""
        top, left, height, width = self.get_params(image, self.scale, self.ratio)  # type: ignore[no-untyped-call]
        # For images of a few pixels, timm may draw empty crops.
        crop = (min(top, image.height - 1), min(left, image.width - 1), max(height, 1), max(width, 1))
        several = isinstance(self.interpolation, (tuple, list))
        return resized_crop(
            image, crop, self.size, random.choice(self.interpolation) if several else self.interpolation
        )


def eval_transform(image_size: int, images: Images = IMAGENET) -> ImageTransform:
    """Return the transform of evaluation: by default the short side becomes image_size / crop_ratio; a centre crop.

    `images` may choose another way to resize.
    """
    return cast(
        ImageTransform,
        create_transform(
            input_size=image_size,
            is_training=False,
            interpolation=images.interpolation,
            mean=images.mean,
            std=images.std,
            crop_pct=image_size / (images.resized_to(image_size) + 0.5),  # timm rounds down
            crop_mode=_CROP_MODES[images.resize],
        ),
    )


@dataclass(frozen=True)
class Mixing:
    """Mixup and cutmix of training batches.

    Attributes:
        classes: number of classes.
        mixup: mixup alpha; 0 turns it off.
        cutmix: cutmix alpha; 0 turns it off.
        cutmix_minmax: smallest and largest side of the rectangle as shares of the image's, instead of `cutmix`.
        probability: of mixing a batch.
        switch: probability of cutmix if both are on.
        mode: whether weights are drawn per batch, pair or element.
        smoothing: label smoothing.
    """

    classes: int
    mixup: float = 0.8
    cutmix: float = 1.0
    cutmix_minmax: tuple[float, float] | None = None
    probability: float = 1.0
    switch: float = 0.5
    mode: MixMode = "batch"
    smoothing: float = 0.1

    @property
    def active(self) -> bool:
        """Whether mixup or cutmix is on."""
        return self.mixup > 0 or self.cutmix > 0 or self.cutmix_minmax is not None

    def mix(self, images: Tensor, labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Return mixed images and soft targets, [batch, classes].

        Args:
            images: [batch, 3, size, size], with an even batch; changed in place.
            labels: class indices, [batch].
            seed: of all random draws.
        """
        library: Any = Mixup(
            mixup_alpha=self.mixup,
            cutmix_alpha=self.cutmix,
            cutmix_minmax=self.cutmix_minmax,
            prob=self.probability,
            switch_prob=self.switch,
            mode=self.mode,
            label_smoothing=self.smoothing,
            num_classes=self.classes,
        )
        with seeded_libraries(seed):
            mixed, targets = library(images, labels)
        return mixed, targets


@contextmanager
def seeded_libraries(seed: int) -> Iterator[None]:
    """Seed the generators of Python and numpy, which timm uses, within the block (seed 0 to 2^32 - 1)."""
    python, numbers = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numbers)
