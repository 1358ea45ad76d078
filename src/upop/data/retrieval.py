"""Retrieval (COCO, Flickr30K): an image with one caption to train on, images with all captions to search."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired, Self, TypedDict

import torch
from torch import Tensor

from upop.data.annotated import AnnotatedImages
from upop.data.samples import Sample, narrowed, shown
from upop.data.text import clean_caption
from upop.data.transforms import ImageTransform

TEXT_TOKENS = 35
"""Longest caption, in tokens."""


class RetrievalItem(TypedDict):
    """An image [3, S, S] and the number of the image; in training also one of its captions, cleaned."""

    image: Tensor
    number: int
    caption: NotRequired[str]


class RetrievalPairs(AnnotatedImages[RetrievalItem]):
    """Training pairs: `[{"image": path, "caption": str, "image_id": str}]`; pairs of one image_id belong together.

    The paths of images start from `image_root`, and with `outside` may leave it.

    Raises DataError, here for anything that is wrong with the annotation file or an image that is missing, and on
    access for an image that cannot be read.
    """

    def __init__(
        self,
        annotation_file: str | Path,
        image_root: str | Path,
        transform: ImageTransform,
        *,
        outside: bool = False,
    ) -> None:
        super().__init__(annotation_file, image_root, transform)
        samples = self._samples()
        self._captions = [_cleaned(sample, sample.text("caption")) for sample in samples]
        numbers: dict[str, int] = {}
        self._numbers = [numbers.setdefault(_image_id(sample), len(numbers)) for sample in samples]
        self._check_images(samples, outside=outside)

    def __getitem__(self, index: int) -> RetrievalItem:
        """The pair of that number, as drawn this time."""
        return {
            "image": self._image(index),
            "number": self._numbers[index],
            "caption": self._captions[index],
        }


class RetrievalGallery(AnnotatedImages[RetrievalItem]):
    """Images with all their captions: `[{"image": path, "caption": [str, ...]}]`; items are the images alone.

    With `outside`, images may lie outside of `image_root`.

    Raises DataError as `RetrievalPairs` does, and for an image without captions.

    Attributes:
        texts: all captions, cleaned, image by image.
        image_of_text: the number of each caption's image, [texts].
    """

    def __init__(
        self,
        annotation_file: str | Path,
        image_root: str | Path,
        transform: ImageTransform,
        *,
        outside: bool = False,
    ) -> None:
        super().__init__(annotation_file, image_root, transform)
        samples = self._samples()
        captions = [[_cleaned(sample, text) for text in sample.texts("caption")] for sample in samples]
        self.texts = [text for texts in captions for text in texts]
        self.image_of_text = torch.tensor([number for number, texts in enumerate(captions) for _ in texts])
        self._check_images(samples, outside=outside)

    def __getitem__(self, index: int) -> RetrievalItem:
        """The image of that number."""
        return {"image": self._image(index), "number": index % len(self)}

    def without(self, numbers: Collection[int]) -> Self:
        """Return the gallery but for the images of these numbers and their texts; the rest is numbered anew."""
        result = narrowed(self, numbers, "_images")
        owners = self.image_of_text.tolist()
        texts = [(text, owner) for text, owner in zip(self.texts, owners, strict=True) if owner not in numbers]
        new = {owner: place for place, owner in enumerate(n for n in range(len(self)) if n not in numbers)}
        result.texts = [text for text, _ in texts]
        result.image_of_text = torch.tensor([new[owner] for _, owner in texts], dtype=torch.long)
        return result


@dataclass(frozen=True)
class RetrievalCollator:
    """Makes a batch of items; a class, so that worker processes can be given it however they are started.

    The batch holds images [B, 3, S, S] and ids [batch] (numbers of the images); of training pairs also input_ids and
    attention_mask, [batch, tokens], padded to the longest caption.
    """

    tokenizer: Any
    max_length: int = TEXT_TOKENS

    def __call__(self, items: Sequence[RetrievalItem]) -> dict[str, Tensor]:
        """The items as one batch."""
        batch = {
            "images": torch.stack([item["image"] for item in items]),
            "ids": torch.tensor([item["number"] for item in items]),
        }
        captions = [item["caption"] for item in items if "caption" in item]
        return {**batch, **self.tokenize(captions)} if captions else batch

    def tokenize(self, texts: list[str]) -> dict[str, Tensor]:
        """Texts as input_ids and attention_mask, [texts, T]."""
        words = self.tokenizer(
            texts, padding="longest", truncation=True, max_length=self.max_length, return_tensors="pt"
        )
        return {name: words[name] for name in ("input_ids", "attention_mask")}


def _cleaned(sample: Sample, text: str) -> str:
    caption = clean_caption(text)
    if not caption:
        raise sample.error(f"'caption' holds no words: {shown(text)}.")
    return caption


def _image_id(sample: Sample) -> str:
    found = sample.get("image_id")
    if isinstance(found, bool) or not isinstance(found, str | int) or found == "":
        raise sample.error(f"'image_id' must be a text or a whole number, not {shown(found)}.")
    return str(found)
