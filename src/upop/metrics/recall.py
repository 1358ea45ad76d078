"""Recall of image-text retrieval: TR@k and IR@k, as published for COCO and Flickr30k."""

from __future__ import annotations

import torch
from torch import Tensor

CUTS = (1, 5, 10)
"""The published recalls: at 1, 5 and 10."""


def recall_scores(
    texts: Tensor, text_scores: Tensor, images: Tensor, image_scores: Tensor, image_of_text: Tensor
) -> dict[str, float]:
    """Return TR@k and IR@k, the percentage of queries with a correct candidate among the best k, and their mean r_mean.

    Args:
        texts: candidates for each image, in any order, [images, k].
        text_scores: their similarities, [images, k].
        images: candidates for each text, [texts, l].
        image_scores: their similarities, [texts, l].
        image_of_text: index of each text's image, [texts].
    """
    best_texts, best_images = best_first(texts, text_scores), best_first(images, image_scores)
    metrics = {
        **_recalls("TR", image_of_text[best_texts] == torch.arange(len(texts)).unsqueeze(1)),
        **_recalls("IR", best_images == image_of_text.unsqueeze(1)),
    }
    return {**metrics, "r_mean": sum(metrics.values()) / len(metrics)}


def best_first(numbers: Tensor, scores: Tensor) -> Tensor:
    """Return candidates sorted by decreasing score, [queries, k]; ties keep their order."""
    return numbers.gather(1, torch.argsort(scores, dim=1, descending=True, stable=True))


def _recalls(name: str, right: Tensor) -> dict[str, float]:
    return {f"{name}@{cut}": 100 * float(right[:, :cut].any(1).double().mean()) for cut in CUTS}
