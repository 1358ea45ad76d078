"""Metrics of segmentation, from a confusion matrix of pixels."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics.functional.classification import multiclass_confusion_matrix

from upop.data.segmentation_transforms import IGNORED


def confusion(predicted: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Return pixel counts by true class (rows) and predicted class (columns), int64 [classes, classes].

    Args:
        predicted: classes from 0, of any shape.
        labels: true classes, of the same shape; 255 is ignored.
        classes: number of classes.
    """
    found: Tensor = multiclass_confusion_matrix(
        predicted.flatten(), labels.flatten(), num_classes=classes, ignore_index=IGNORED, validate_args=False
    )
    return found


def iou_per_class(counts: Tensor) -> Tensor:
    """Return intersection over union per class in percent, [classes], from a confusion matrix; NaN for absent ones."""
    hits = counts.diagonal().double()
    return 100 * hits / (counts.sum(0) + counts.sum(1) - hits)


def segmentation_scores(counts: Tensor) -> dict[str, float]:
    """Return mIoU, pixel accuracy and mean class accuracy in percent, from a confusion matrix.

    mIoU leaves out classes that are neither present nor predicted; class accuracy leaves out those not present.
    """
    hits = counts.diagonal().double()
    return {
        "mIoU": float(iou_per_class(counts).nanmean()),
        "pixel accuracy": float(100 * hits.sum() / counts.sum()),
        "class accuracy": float((100 * hits / counts.sum(1)).nanmean()),
    }


def named_ious(counts: Tensor, names: list[str]) -> dict[str, float | None]:
    """Return name of a class -> its intersection over union in percent; None if it never occurs."""
    values = iou_per_class(counts)
    return {
        name: None if torch.isnan(value) else round(float(value), 4) for name, value in zip(names, values, strict=True)
    }
