"""Data sets of images from rows: with captions, or with class labels."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NotRequired, Protocol, Self, TypedDict

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import RandomResizedCrop

from upop.data.rows import Row, Rows
from upop.errors import DataError
from upop.pruning.errors import some_of
from upop.sources import Sources

ImageChange = Callable[[Image.Image], Image.Image]
Crop = Literal["mild", "strong"]

_AREAS: Mapping[Crop, tuple[float, float]] = {"mild": (0.9, 1.0), "strong": (0.2, 1.0)}


class Processor(Protocol):
    """Makes a model's inputs, as `upop.checkpoints.processors` does."""

    def images(self, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        """Return the model's inputs for images."""
        ...

    def texts(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Return the model's inputs for texts."""
        ...


class ImageSample(TypedDict):
    """An image and its number, with a caption or a class label."""

    image: Image.Image
    number: int
    caption: NotRequired[str]
    label: NotRequired[int]


@dataclass(frozen=True)
class CropAtRandom:
    """A random crop; strong crops are also flipped with probability 1/2.

    Mild crops (90 to 100 % of the area, as in open_clip) keep captions true; strong ones (20 to 100 %) are for class
    labels.
    """

    kind: Crop

    def __call__(self, image: Image.Image) -> Image.Image:
        """Return the crop; random draws use torch's generator."""
        place = RandomResizedCrop.get_params(image, list(_AREAS[self.kind]), [3 / 4, 4 / 3])
        top, left, height, width = place
        part = image.crop((left, top, left + width, top + height))
        flipped = self.kind == "strong" and float(torch.rand(())) < 0.5
        return part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flipped else part


def unchanged(image: Image.Image) -> Image.Image:
    """Return the image."""
    return image


class CaptionedImages(Dataset[ImageSample]):
    """Images, each with one of its captions, drawn at random.

    Args:
        rows: of kind "caption".
        transform: applied before the processor.
    """

    def __init__(self, rows: Rows, transform: ImageChange = unchanged) -> None:
        self.rows, self.transform = rows, transform
        self.notes = rows.notes

    def __len__(self) -> int:
        """The number of rows."""
        return len(self.rows)

    def __getitem__(self, index: int) -> ImageSample:
        """The sample at an index, with a random caption and augmentation."""
        row = self.rows[index]
        caption = row.captions[int(torch.randint(len(row.captions), ()))]
        return {"image": self.transform(_only_image(row)), "number": index, "caption": caption}

    def sources(self) -> Sources:
        """Return the files that are read."""
        return self.rows.sources()


class ImageGallery(Dataset[ImageSample]):
    """Images with all their captions; its items are the images. Rows with the same file are one image.

    Args:
        rows: of kind "caption".

    Attributes:
        texts: all captions, image by image.
        image_of_text: index of each caption's image, [texts].
    """

    transform: ImageChange = staticmethod(unchanged)

    def __init__(self, rows: Rows) -> None:
        self.rows = rows
        self.notes = rows.notes
        places: dict[Path | int, int] = {}
        captions: list[list[str]] = []
        self._rows: list[int] = []
        for number, row in enumerate(rows):
            image = row.images[0]
            place = places.setdefault(image if isinstance(image, Path) else number, len(captions))
            if place == len(captions):
                captions.append([])
                self._rows.append(number)
            captions[place].extend(row.captions)
        self._set_texts(captions)

    def _set_texts(self, captions: list[list[str]]) -> None:
        self._captions = captions
        self.texts = [text for texts in captions for text in texts]
        owners = [number for number, texts in enumerate(captions) for _ in texts]
        self.image_of_text = torch.tensor(owners, dtype=torch.long)

    def __len__(self) -> int:
        """The number of images."""
        return len(self._rows)

    def __getitem__(self, index: int) -> ImageSample:
        """The image of that number."""
        number = index % len(self)
        return {"image": self.transform(_only_image(self.rows[self._rows[number]])), "number": number}

    def sources(self) -> Sources:
        """Return the files that are read."""
        return self.rows.sources()

    def without(self, numbers: Collection[int]) -> Self:
        """Return the gallery without the images at these indices and their texts, renumbered."""
        kept = [number for number in range(len(self)) if number not in numbers]
        result = copy.copy(self)
        result._rows = [self._rows[number] for number in kept]
        result._set_texts([self._captions[number] for number in kept])
        return result


class LabelledImages(Dataset[ImageSample]):
    """Images with class labels.

    Args:
        rows: of kind "label".
        transform: applied before the processor.
        classes: class names in the model's order; by default in that of the rows.

    Attributes:
        names: class names, by index.

    Raises:
        DataError: the rows have a class that the model lacks.
    """

    def __init__(self, rows: Rows, transform: ImageChange = unchanged, classes: Sequence[str] | None = None) -> None:
        self.rows, self.transform = rows, transform
        self.notes = rows.notes
        self.names = tuple(rows.names if classes is None else classes)
        place = {name: number for number, name in enumerate(self.names)}
        unknown = [name for name in rows.names if name not in place]
        if unknown:
            raise DataError(
                f"{rows.table.source} has {len(unknown)} classes that the model lacks: {some_of(unknown)}. The model's "
                f"{len(place)} classes are {some_of(self.names)}. Rename them in the data."
            )
        self._numbers = [place[name] for name in rows.names]

    def __len__(self) -> int:
        """The number of images."""
        return len(self.rows)

    def __getitem__(self, index: int) -> ImageSample:
        """The image of that number."""
        number = index % len(self)
        row = self.rows[number]
        return {"image": self.transform(_only_image(row)), "number": number, "label": self._numbers[row.label]}

    def sources(self) -> Sources:
        """Return the files that are read."""
        return self.rows.sources()

    def without(self, numbers: Collection[int]) -> Self:
        """Return the data set without the images at these indices."""
        result = copy.copy(self)
        result.rows = self.rows.without(numbers)
        return result


@dataclass(frozen=True)
class ImageSampleCollator:
    """Collates samples: the processor's inputs for images and captions, and `ids` and `labels`, [batch]."""

    processor: Processor

    def __call__(self, items: Sequence[ImageSample]) -> dict[str, Tensor]:
        """Return the samples as one batch."""
        batch = {
            **self.processor.images([item["image"] for item in items]),
            "ids": torch.tensor([item["number"] for item in items]),
        }
        captions = [item["caption"] for item in items if "caption" in item]
        labels = [item["label"] for item in items if "label" in item]
        words = self.processor.texts(captions) if captions else {}
        return {**batch, **words, **({"labels": torch.tensor(labels)} if labels else {})}

    def tokenize(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Return the model's inputs for texts, [texts, tokens] each."""
        return self.processor.texts(texts)


def _only_image(row: Row) -> Image.Image:
    """Return the first image of a row."""
    return row.open_images()[0]
