"""Sliding-window segmentation of images of any size, at one or several scales, as published for Segmenter."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upop.data.segmentation_transforms import scaled_size
from upop.pruning.precision import precise

SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
"""Scales of the published multi-scale evaluation; each runs on the image and its mirror image."""


@dataclass(frozen=True)
class Window:
    """A square window that slides over images.

    Attributes:
        size: its side in pixels.
        stride: pixels between windows; the last ones end at the edge of the image.
        batch: windows per forward pass; bounds the memory.
    """

    size: int
    stride: int
    batch: int = 8

    def places(self, height: int, width: int) -> Iterator[tuple[int, int]]:
        """Yield the top left corner of every window over an image that is at least as large as a window."""
        for top in self._starts(height):
            for left in self._starts(width):
                yield top, left

    def _starts(self, length: int) -> list[int]:
        last = length - self.size
        return [*range(0, last, self.stride), last]


def segment(
    model: nn.Module,
    images: Sequence[Tensor],
    window: Window,
    short: int,
    scales: Sequence[float] = (1.0,),
    *,
    flips: bool = False,
) -> list[Tensor]:
    """Return class probabilities of every image, [classes, height, width], in its own size.

    Args:
        model: images, [batch, 3, size, size] -> logits, [batch, classes, size, size].
        images: normalised images, [3, height, width], of any sizes.
        window: slides over them.
        short: pixels of the short side at scale 1.
        scales: probabilities are averaged over them.
        flips: whether to average over mirrored images too.
    """
    totals: list[Tensor] = []
    versions = [(scale, flip) for scale in scales for flip in ((False, True) if flips else (False,))]
    for scale, flip in versions:
        # The published code rounds the sides of a scale down.
        resized = [_resized(one, scaled_size(one.shape[1], one.shape[2], int(short * scale))) for one in images]
        found = [
            slide(model, image.flip(2) if flip else image, window, original.shape[1:], flipped=flip)
            for image, original in zip(resized, images, strict=True)
        ]
        totals = [total + one for total, one in zip(totals, found, strict=True)] if totals else found
    return [total / len(versions) for total in totals]


def slide(model: nn.Module, image: Tensor, window: Window, size: Sequence[int], *, flipped: bool = False) -> Tensor:
    """Return class probabilities, [classes, *size], of one image, [3, height, width].

    Logits are averaged where windows overlap. An image with a side below the window's is enlarged first, with its
    aspect ratio.

    Args:
        model: images, [batch, 3, window, window] -> logits, [batch, classes, window, window].
        image: normalised.
        window: slides over it.
        size: height and width of the result, in pixels.
        flipped: whether the image was mirrored; the result is mirrored back.
    """
    if min(image.shape[1:]) < window.size:
        image = _resized(image, _enlarged(image.shape[1], image.shape[2], window.size))
    places = list(window.places(*image.shape[1:]))
    summed: Tensor | None = None
    count = image.new_zeros(image.shape[1:], dtype=torch.float32)
    for first in range(0, len(places), window.batch):
        chunk = places[first : first + window.batch]
        crops = [image[:, top : top + window.size, left : left + window.size] for top, left in chunk]
        logits = precise(model(torch.stack(crops)))
        if summed is None:
            summed = logits.new_zeros(logits.shape[1], *image.shape[1:])
        for (top, left), one in zip(chunk, logits, strict=True):
            summed[:, top : top + window.size, left : left + window.size] += one
            count[top : top + window.size, left : left + window.size] += 1
    assert summed is not None
    averaged = F.interpolate((summed / count)[None], tuple(size), mode="bilinear", align_corners=False)[0]
    return (averaged.flip(2) if flipped else averaged).softmax(0)


def _enlarged(height: int, width: int, side: int) -> tuple[int, int]:
    """Return height and width with a short side of `side`; the long one is rounded down, as published."""
    return (side, int(width / height * side)) if height < width else (int(height / width * side), side)


def _resized(image: Tensor, size: tuple[int, int]) -> Tensor:
    # Without antialiasing, as in the published pipeline, which resizes with OpenCV.
    if tuple(image.shape[1:]) == size:
        return image
    return F.interpolate(image[None], size, mode="bilinear", align_corners=False)[0]
