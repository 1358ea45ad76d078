"""Shared by the classification tasks: top-k predictions and examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from upop.data.classification import ImageFolderDataset
from upop.data.row_images import LabelledImages
from upop.examples import Album, Answer, Example
from upop.runs.examples import untransformed

TOP = 5


def likeliest(logits: Tensor) -> Tensor:
    """Return the likeliest classes, best first, [batch, 5]; fewer columns if there are fewer classes."""
    return logits.topk(min(TOP, logits.shape[1])).indices


def accuracies(predictions: Mapping[str, Tensor]) -> dict[str, float]:
    """Return acc@1 and, where there are five classes, acc@5, in percent.

    Args:
        predictions: "answers", the likeliest classes [N, k], and "labels" [N].
    """
    answers, labels = predictions["answers"], predictions["labels"]
    right = answers == labels.unsqueeze(1)
    cuts = (1, TOP) if answers.shape[1] == TOP else (1,)
    return {f"acc@{cut}": 100 * float(right[:, :cut].any(1).double().mean()) for cut in cuts}


def labelled_examples(
    found: Mapping[str, Mapping[str, Any]],
    samples: LabelledImages | ImageFolderDataset,
    numbers: Sequence[int],
    album: Album,
) -> list[Example]:
    """Return images and the likeliest classes, with the true class.

    Args:
        found: name of a model -> its "answers", the likeliest classes, [len(numbers), k].
        samples: of a held-out split.
        numbers: indices of the samples.
        album: stores the images.
    """
    names = dict(enumerate(samples.names))  # the model may have more classes than the data
    shown, plain = [], untransformed(samples)
    for place, number in enumerate(numbers):
        item = plain[number]
        answers = {}
        for model, rows in found.items():
            first, *others = [names.get(label, f"class {label}") for label in rows["answers"][place].tolist()]
            then = f"then {', '.join(others[:2])}" if others else None
            answers[model] = Answer(text=first, note=then, right=first == names[item["label"]])
        truth = Answer(text=names[item["label"]])
        shown.append(Example(images=(album.add(item["image"], str(number)),), truth=truth, answers=answers))
    return shown
