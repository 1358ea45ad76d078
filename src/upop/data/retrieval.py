"""Retrieval (COCO, Flickr30K): image-caption pairs in training, images with all captions in evaluation."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired, Self, TypedDict

import torch
from torch import Tensor

from upop.data.annotated import AnnotatedImages
from upop.data.samples import Sample, narrowed, shown
from upop.data.text import clean_caption, tokenize
from upop.data.transforms import ImageTransform

TEXT_TOKENS = 35
"""Maximum tokens of a caption."""


class RetrievalItem(TypedDict):
    """An image, [3, size, size], and its number; in training also a cleaned caption."""

    image: Tensor
    number: int
    caption: NotRequired[str]


class RetrievalPairs(AnnotatedImages[RetrievalItem]):
    """Training pairs, `[{"image": path, "caption": str, "image_id": str}]`; pairs with one image_id are positives.

    Image paths are relative to `image_root`; `outside` allows images elsewhere.

    Raises:
        DataError: the annotation file is not valid or an image is missing; on access, an image cannot be read.
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
        """The pair at an index, with a random augmentation."""
        return {
            "image": self._image(index),
            "number": self._numbers[index],
            "caption": self._captions[index],
        }


class RetrievalGallery(AnnotatedImages[RetrievalItem]):
    """Images with all their captions, `[{"image": path, "caption": [str, ...]}]`; its items are the images.

    `outside` allows images outside of `image_root`.

    Attributes:
        texts: all captions, cleaned, image by image.
        image_of_text: index of each caption's image, [texts].

    Raises:
        DataError: as for `RetrievalPairs`, and if an image has no captions.
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
        """The image at an index."""
        return {"image": self._image(index), "number": index % len(self)}

    def without(self, numbers: Collection[int]) -> Self:
        """Return the gallery without the images at these indices and their texts, renumbered."""
        result = narrowed(self, numbers, "_images")
        owners = self.image_of_text.tolist()
        texts = [(text, owner) for text, owner in zip(self.texts, owners, strict=True) if owner not in numbers]
        new = {owner: place for place, owner in enumerate(n for n in range(len(self)) if n not in numbers)}
        result.texts = [text for text, _ in texts]
        result.image_of_text = torch.tensor([new[owner] for _, owner in texts], dtype=torch.long)
        return result


@dataclass(frozen=True)
class RetrievalCollator:
    """Collates items; a class, because workers need a picklable collator.

    A batch has images, [batch, 3, size, size], and ids, the numbers of the images, [batch]; in training also input_ids
    and attention_mask, [batch, tokens], padded to the longest caption.
    """

    tokenizer: Any
    max_length: int = TEXT_TOKENS

    def __call__(self, items: Sequence[RetrievalItem]) -> dict[str, Tensor]:
        """Return the items as one batch."""
        batch = {
            "images": torch.stack([item["image"] for item in items]),
            "ids": torch.tensor([item["number"] for item in items]),
        }
        captions = [item["caption"] for item in items if "caption" in item]
        return {**batch, **self.tokenize(captions)} if captions else batch

    def tokenize(self, texts: list[str]) -> dict[str, Tensor]:
        """Return input_ids and attention_mask of texts, [texts, tokens]."""
        ids, mask = tokenize(self.tokenizer, texts, self.max_length)
        return {"input_ids": ids, "attention_mask": mask}


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
