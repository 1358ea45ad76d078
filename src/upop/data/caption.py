"""COCO captions: images with captions."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NotRequired, Self, TypedDict

import torch
from torch import Tensor

from upop.data.annotated import AnnotatedImages
from upop.data.samples import Sample, narrowed, shown
from upop.data.text import clean_caption, tokenize
from upop.data.transforms import ImageTransform
from upop.errors import DataError
from upop.reading import LARGEST_DATA, read_json

IGNORED = -100
"""Label of positions without a loss."""
CAPTION_TOKENS = 40
"""Maximum tokens of a caption in the published code, with prompt and special tokens."""

_NUMBER_AT_END = re.compile(r"(?<![0-9])[0-9]{1,18}$")  # more digits do not fit a tensor


class CaptionItem(TypedDict):
    """An image, [3, height, width]; in training a caption with prompt, in evaluation the image's number."""

    image: Tensor
    caption: NotRequired[str]
    image_id: NotRequired[int]


class CaptionBatch(TypedDict):
    """Images, [batch, 3, height, width]; in training token ids, mask and labels, int64 [batch, tokens].

    In evaluation image_ids, int64 [batch].
    """

    images: Tensor
    input_ids: NotRequired[Tensor]
    attention_mask: NotRequired[Tensor]
    labels: NotRequired[Tensor]
    image_ids: NotRequired[Tensor]


class CaptionTrainDataset(AnnotatedImages[CaptionItem]):
    """The samples of a training file, `[{"image": path, "caption": str}]`, one per caption.

    Captions are cleaned, truncated to 30 words and appended to the prompt. `outside` allows images outside of
    `image_root`.

    Raises:
        DataError: the annotation file is not valid or an image is missing; on access, an image cannot be read.
    """

    def __init__(
        self,
        annotation_file: str | Path,
        image_root: str | Path,
        transform: ImageTransform,
        *,
        prompt: str,
        outside: bool = False,
    ) -> None:
        super().__init__(annotation_file, image_root, transform)
        self._captions: list[str] = []
        samples = self._samples()
        for sample in samples:
            caption = clean_caption(sample.text("caption"))
            if not caption:
                raise sample.error(f"'caption' holds no words: {shown(sample.text('caption'))}.")
            self._captions.append(f"{prompt.rstrip()} {caption}".strip())  # the prompt's last word stays separate
        self._check_images(samples, outside=outside)

    def __getitem__(self, index: int) -> CaptionItem:
        """The sample at an index, with a random augmentation."""
        return {"image": self._image(index), "caption": self._captions[index]}


class CaptionEvalDataset(AnnotatedImages[CaptionItem]):
    """The samples of an evaluation file, `[{"image": path, "caption": [str, ...]}]`, one per image.

    The number at the end of a file name identifies the image. References come from the COCO ground truth file if it
    exists, else from the samples, which may have none (a test split). `outside` allows images outside of `image_root`.

    Attributes:
        references: number of an image -> captions; empty if there are none.

    Raises:
        DataError: as for `CaptionTrainDataset`, and if image numbers are missing or not unique.
    """

    def __init__(
        self,
        annotation_file: str | Path,
        image_root: str | Path,
        transform: ImageTransform,
        ground_truth: Path,
        *,
        outside: bool = False,
    ) -> None:
        super().__init__(annotation_file, image_root, transform)
        samples = self._samples()
        numbers: dict[int, Sample] = {}
        for sample, image in zip(samples, self._images, strict=True):
            number = image_number(sample, image)
            if number in numbers:
                raise sample.error(
                    f"the image {image!r} has the number {number}, as has sample {numbers[number].number}. "
                    "Results need unique numbers: rename the images."
                )
            numbers[number] = sample
        self._numbers = list(numbers)
        self.references = _references(numbers, ground_truth)
        self._check_images(samples, outside=outside)

    def __getitem__(self, index: int) -> CaptionItem:
        """The image at an index of the file."""
        return {"image": self._image(index), "image_id": self._numbers[index]}

    def without(self, numbers: Collection[int]) -> Self:
        """Return the data set without the images at these indices."""
        result = narrowed(self, numbers, "_images", "_numbers")
        result.references = {number: self.references[number] for number in result._numbers if self.references}
        return result


def _references(samples: Mapping[int, Sample], ground_truth: Path) -> dict[int, list[str]]:
    if ground_truth.is_file():
        known = read_ground_truth(ground_truth)
        for number, sample in samples.items():
            if number not in known:
                raise sample.error(
                    f"the ground truth {ground_truth} has no caption of image {number}. "
                    "Check that both belong to the same split."
                )
        return {number: known[number] for number in samples}
    without = [sample for sample in samples.values() if "caption" not in sample.fields]
    if without and len(without) < len(samples):
        raise without[0].error("it has no captions, but other samples do. Add them, or remove all.")
    return {} if without else {number: sample.texts("caption") for number, sample in samples.items()}


def image_number(sample: Sample, image: str) -> int:
    """Return the number at the end of an image's file name: 391895 of `val2014/COCO_val2014_000000391895.jpg`.

    Raises:
        DataError: it has no number, or one of more than 18 digits.
    """
    found = _NUMBER_AT_END.search(PurePosixPath(image).stem)
    if not found:
        raise sample.error(
            f"the image id is the number (at most 18 digits) at the end of the file name; {image!r} has none. "
            "Name the image like COCO_val2014_000000391895.jpg."
        )
    return int(found[0])


def read_ground_truth(file: Path) -> dict[int, list[str]]:
    """Return image number -> captions, from a file in COCO's format.

    That is `{"annotations": [{"image_id": int, "caption": str, "id": int}], "images": [{"id": int}]}`.

    Raises:
        DataError: the file has another format; the message names the annotation, counted from 0.
    """
    content = read_json(file, DataError, "It may be cut off.", what="The ground truth", largest=LARGEST_DATA)
    annotations = content.get("annotations") if isinstance(content, dict) else None
    if not isinstance(annotations, list):
        raise DataError(f"The ground truth {file} must hold an object with a list 'annotations', not {shown(content)}.")
    captions: dict[int, list[str]] = {}
    for number, fields in enumerate(annotations):
        if not isinstance(fields, dict):
            raise DataError(f"{file}, sample {number}: must be an object with named fields, not {shown(fields)}.")
        sample = Sample(file, number, fields)
        image = sample.get("image_id")
        if not isinstance(image, int) or isinstance(image, bool):
            raise sample.error(f"'image_id' must be a whole number, not {shown(image)}.")
        captions.setdefault(image, []).append(sample.text("caption"))
    return captions


@dataclass(frozen=True)
class CaptionCollator:
    """Collates items; a class, because workers need a picklable collator.

    Texts are padded to the longest of the batch. The first token is [CLS]; the model replaces it by [DEC].

    Attributes:
        tokenizer: a BERT tokenizer.
        prompt_length: tokens of the prompt, with [CLS].
    """

    tokenizer: Any
    prompt_length: int

    def __call__(self, items: Sequence[CaptionItem]) -> CaptionBatch:
        """Return the items as one batch."""
        images = torch.stack([item["image"] for item in items])
        if "image_id" in items[0]:
            return {"images": images, "image_ids": torch.tensor([item["image_id"] for item in items])}
        ids, mask = tokenize(self.tokenizer, [item["caption"] for item in items], CAPTION_TOKENS)
        labels = caption_labels(ids, mask, self.prompt_length)
        return {"images": images, "input_ids": ids, "attention_mask": mask, "labels": labels}


def caption_labels(input_ids: Tensor, attention_mask: Tensor, prompt_length: int) -> Tensor:
    """Return labels, [batch, tokens]: the token ids, and -100 in the prompt and in padding."""
    labels = input_ids.masked_fill(attention_mask == 0, IGNORED)
    labels[:, :prompt_length] = IGNORED
    return labels
