"""COCO captions: pictures with sentences about them."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NotRequired, Self, TypedDict

import torch
from torch import Tensor
from torch.utils.data import Dataset

from upop.data.images import open_image
from upop.data.records import Record, check_images, narrowed, read_records, shown
from upop.data.text import clean_caption
from upop.data.transforms import ImageTransform
from upop.errors import DataError
from upop.reading import LARGEST_DATA, read_json
from upop.sources import Sources

IGNORED = -100
"""The label of a place where no word is to be said."""
CAPTION_TOKENS = 40
"""Where the published code cuts a caption, prompt and both ends included."""

_NUMBER_AT_END = re.compile(r"(?<![0-9])[0-9]{1,18}$")  # more digits do not fit a tensor


class CaptionItem(TypedDict):
    """One picture [3, H, W]; to train on: a prompted caption; to be captioned: the picture's number."""

    image: Tensor
    caption: NotRequired[str]
    image_id: NotRequired[int]


class CaptionBatch(TypedDict):
    """B pictures [B, 3, H, W]; to train on: ids, mask and labels, int64 [B, T]; else image_ids, int64 [B]."""

    images: Tensor
    input_ids: NotRequired[Tensor]
    attention_mask: NotRequired[Tensor]
    labels: NotRequired[Tensor]
    image_ids: NotRequired[Tensor]


class CaptionTrainDataset(Dataset[CaptionItem]):
    """A training file's records: `[{"image": path, "caption": str}]`, one per caption.

    Captions are cleaned, cut to 30 words and put after the prompt. `outside` lets images lie outside of `image_root`.

    Raises DataError, here for anything that is wrong with the annotation file or an image that is missing, and on
    access for an image that cannot be read.
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
        self.file = Path(annotation_file)
        self.root = Path(image_root)
        self.transform = transform
        records = read_records(self.file)
        self._captions: list[str] = []
        self._images: list[str] = []
        for record in records:
            caption = clean_caption(record.text("caption"))
            if not caption:
                raise record.error(f"'caption' holds no words: {shown(record.text('caption'))}.")
            self._captions.append(f"{prompt.rstrip()} {caption}".strip())  # a prompt's last word stays a word
            self._images.append(record.text("image"))
        check_images(self.root, zip(records, self._images, strict=True), outside=outside)

    def __len__(self) -> int:
        """The number of captions."""
        return len(self._captions)

    def sources(self) -> Sources:
        """Return the files that are read."""
        return Sources((self.file,), {image: self.root / image for image in self._images})

    def __getitem__(self, index: int) -> CaptionItem:
        """The record of that number, as drawn this time."""
        picture = open_image(self.root / self._images[index], file=self.file, number=index % len(self))
        return {"image": self.transform(picture), "caption": self._captions[index]}


class CaptionEvalDataset(Dataset[CaptionItem]):
    """An evaluation file's records: `[{"image": path, "caption": [str, ...]}]`, one per picture.

    The number of a picture is the one at the end of its file's name. The captions to compare with come from the COCO
    ground truth where that file exists, and else from the records, which may have none (a test split).

    Attributes:
        references: captions by picture number; empty where there are none.

    `outside` lets images lie outside of `image_root`.

    Raises DataError like `CaptionTrainDataset`, and for numbers that are missing or there twice.
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
        self.file = Path(annotation_file)
        self.root = Path(image_root)
        self.transform = transform
        records = read_records(self.file)
        self._images = [record.text("image") for record in records]
        numbers: dict[int, Record] = {}
        for record, image in zip(records, self._images, strict=True):
            number = image_number(record, image)
            if number in numbers:
                raise record.error(
                    f"the image {image!r} has the number {number}, as has record {numbers[number].number}. "
                    "Results are told apart by these numbers: name the images otherwise."
                )
            numbers[number] = record
        self._numbers = list(numbers)
        self.references = _references(numbers, ground_truth)
        check_images(self.root, zip(records, self._images, strict=True), outside=outside)

    def __len__(self) -> int:
        """The number of pictures."""
        return len(self._images)

    def sources(self) -> Sources:
        """Return the files that are read."""
        return Sources((self.file,), {image: self.root / image for image in self._images})

    def __getitem__(self, index: int) -> CaptionItem:
        """The picture of that number in the file."""
        picture = open_image(self.root / self._images[index], file=self.file, number=index % len(self))
        return {"image": self.transform(picture), "image_id": self._numbers[index]}

    def without(self, numbers: Collection[int]) -> Self:
        """Return the pictures but for those of these places in the file, and their captions, to score the rest."""
        result = narrowed(self, numbers, "_images", "_numbers")
        result.references = {number: self.references[number] for number in result._numbers if self.references}
        return result


def _references(records: Mapping[int, Record], ground_truth: Path) -> dict[int, list[str]]:
    if ground_truth.is_file():
        known = read_ground_truth(ground_truth)
        for number, record in records.items():
            if number not in known:
                raise record.error(
                    f"the ground truth {ground_truth} has no caption of image {number}. "
                    "Check that both belong to the same split."
                )
        return {number: known[number] for number in records}
    without = [record for record in records.values() if "caption" not in record.fields]
    if without and len(without) < len(records):
        raise without[0].error("it has no captions, and other records have. Add them, or leave all out.")
    return {} if without else {number: record.texts("caption") for number, record in records.items()}


def image_number(record: Record, image: str) -> int:
    """Return the number at the end of an image's file name: 391895 of `val2014/COCO_val2014_000000391895.jpg`.

    Raises:
        DataError: there is none, or one that is too long.
    """
    found = _NUMBER_AT_END.search(PurePosixPath(image).stem)
    if not found:
        raise record.error(
            f"the image id is the number (of at most 18 digits) at the end of the file name; {image!r} has none. "
            "Name the image like COCO_val2014_000000391895.jpg."
        )
    return int(found[0])


def read_ground_truth(file: Path) -> dict[int, list[str]]:
    """Return the captions by image number in a file of COCO's form.

    That is `{"annotations": [{"image_id": int, "caption": str, "id": int}], "images": [{"id": int}]}`.

    Raises:
        DataError: it is not of that form; the message names the annotation, counted from 0.
    """
    content = read_json(file, DataError, "It may be cut off.", what="The ground truth", largest=LARGEST_DATA)
    annotations = content.get("annotations") if isinstance(content, dict) else None
    if not isinstance(annotations, list):
        raise DataError(f"The ground truth {file} must hold an object with a list 'annotations', not {shown(content)}.")
    captions: dict[int, list[str]] = {}
    for number, fields in enumerate(annotations):
        if not isinstance(fields, dict):
            raise DataError(f"{file}, record {number}: must be an object with named fields, not {shown(fields)}.")
        record = Record(file, number, fields)
        image = record.get("image_id")
        if not isinstance(image, int) or isinstance(image, bool):
            raise record.error(f"'image_id' must be a whole number, not {shown(image)}.")
        captions.setdefault(image, []).append(record.text("caption"))
    return captions


@dataclass(frozen=True)
class CaptionCollator:
    """Makes a batch of items; a class, so that worker processes can be given it however they are started.

    Texts are padded to the longest of the batch. The first token stays [CLS]: the model puts [DEC] there.

    Attributes:
        tokenizer: a BERT tokenizer.
        prompt_length: how many tokens, [CLS] included, come before the words that are to be said.
    """

    tokenizer: Any
    prompt_length: int

    def __call__(self, items: Sequence[CaptionItem]) -> CaptionBatch:
        """The items as one batch."""
        images = torch.stack([item["image"] for item in items])
        if "image_id" in items[0]:
            return {"images": images, "image_ids": torch.tensor([item["image_id"] for item in items])}
        text = self.tokenizer(
            [item["caption"] for item in items],
            padding="longest",
            truncation=True,
            max_length=CAPTION_TOKENS,
            return_tensors="pt",
        )
        ids, mask = text["input_ids"], text["attention_mask"]
        labels = words_to_say(ids, mask, self.prompt_length)
        return {"images": images, "input_ids": ids, "attention_mask": mask, "labels": labels}


def words_to_say(input_ids: Tensor, attention_mask: Tensor, prompt_length: int) -> Tensor:
    """Return the labels of tokens [B, T]: themselves, or -100 in the prompt and in padding."""
    labels = input_ids.masked_fill(attention_mask == 0, IGNORED)
    labels[:, :prompt_length] = IGNORED
    return labels
