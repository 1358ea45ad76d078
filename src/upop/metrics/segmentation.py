"""How well label maps fit: counts of pixels in a confusion matrix, and the usual metrics read off it."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics.functional.classification import multiclass_confusion_matrix

from upop.data.segmentation_transforms import IGNORED


def confusion(predicted: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Return how many pixels of each class (rows) were taken for each class (columns), int64 [classes, classes].

    Args:
        predicted: classes from 0, of any shape.
        labels: the true ones, of the same shape; pixels with 255 do not count.
        classes: how many there are.
    """
    found: Tensor = multiclass_confusion_matrix(
        predicted.flatten(), labels.flatten(), num_classes=classes, ignore_index=IGNORED, validate_args=False
    )
    return found


def iou_per_class(counts: Tensor) -> Tensor:
    """Return intersection over union per class, in percent, from a confusion matrix; NaN for classes never met."""
    hits = counts.diagonal().double()
    return 100 * hits / (counts.sum(0) + counts.sum(1) - hits)


def segmentation_scores(counts: Tensor) -> dict[str, float]:
    """Return mIoU, pixel accuracy and mean class accuracy in percent, from a confusion matrix.

    Classes that are neither there nor predicted do not count in the first, those that are not there not in the last.
    """
    hits = counts.diagonal().double()
    return {
        "mIoU": float(iou_per_class(counts).nanmean()),
        "pixel accuracy": float(100 * hits.sum() / counts.sum()),
        "class accuracy": float((100 * hits / counts.sum(1)).nanmean()),
    }


def named_ious(counts: Tensor, names: list[str]) -> dict[str, float | None]:
    """Return the class's name -> its intersection over union in percent, or None where it was never met."""
    values = iou_per_class(counts)
    return {
        name: None if torch.isnan(value) else round(float(value), 4) for name, value in zip(names, values, strict=True)
    }
