"""Samples with an image, made of rows: an image with its captions, or with its class."""

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
        """Return the inputs that images become."""
        ...

    def texts(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Return the inputs that texts become."""
        ...


class ImageSample(TypedDict):
    """An image, its number, and its caption or its class where there is one."""

    image: Image.Image
    number: int
    caption: NotRequired[str]
    label: NotRequired[int]


@dataclass(frozen=True)
class CropAtRandom:
    """Cuts a random part out of an image, and flips every second one where the crop is strong.

    Mild crops (90 to 100 % of the area, as in open_clip) keep what captions say of places; strong ones (20 to 100 %)
    are for classes.
    """

    kind: Crop

    def __call__(self, image: Image.Image) -> Image.Image:
        """The part, drawn by torch's random numbers."""
        place = RandomResizedCrop.get_params(image, list(_AREAS[self.kind]), [3 / 4, 4 / 3])
        top, left, height, width = place
        part = image.crop((left, top, left + width, top + height))
        flipped = self.kind == "strong" and float(torch.rand(())) < 0.5
        return part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flipped else part


def unchanged(image: Image.Image) -> Image.Image:
    """The image."""
    return image


class CaptionedImages(Dataset[ImageSample]):
    """Images with one of their captions each, drawn anew every time.

    Args:
        rows: of kind "caption".
        transform: changes an image before it is processed.
    """

    def __init__(self, rows: Rows, transform: ImageChange = unchanged) -> None:
        self.rows, self.transform = rows, transform
        self.notes = rows.notes

    def __len__(self) -> int:
        """The number of rows."""
        return len(self.rows)

    def __getitem__(self, index: int) -> ImageSample:
        """The row of that number, as drawn this time."""
        row = self.rows[index]
        caption = row.captions[int(torch.randint(len(row.captions), ()))]
        return {"image": self.transform(_only_image(row)), "number": index, "caption": caption}

    def sources(self) -> Sources:
        """Return the files that are read."""
        return self.rows.sources()


class ImageGallery(Dataset[ImageSample]):
    """Images with all their captions; rows that name the same file are one image. Items are the images alone.

    Args:
        rows: of kind "caption".

    Attributes:
        texts: all captions, image by image.
        image_of_text: the number of each caption's image, [texts].
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
        """Return the gallery but for the images of these numbers and their texts; the rest is numbered anew."""
        kept = [number for number in range(len(self)) if number not in numbers]
        result = copy.copy(self)
        result._rows = [self._rows[number] for number in kept]
        result._set_texts([self._captions[number] for number in kept])
        return result


class LabelledImages(Dataset[ImageSample]):
    """Images with the number of their class.

    Args:
        rows: of kind "label".
        transform: changes an image before it is processed.
        classes: names of the classes as the model numbers them; by default as the rows do.

    Attributes:
        names: of the classes, by their numbers.

    Raises:
        DataError: the rows have a class that the model does not have.
    """

    def __init__(self, rows: Rows, transform: ImageChange = unchanged, classes: Sequence[str] | None = None) -> None:
        self.rows, self.transform = rows, transform
        self.notes = rows.notes
        self.names = tuple(rows.names if classes is None else classes)
        place = {name: number for number, name in enumerate(self.names)}
        unknown = [name for name in rows.names if name not in place]
        if unknown:
            raise DataError(
                f"{rows.table.source} has {len(unknown)} classes that are none of the {len(place)} of the model: "
                f"{some_of(unknown)}. The model has {some_of(self.names)}. Rename them in the data."
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
        """Return the images but those of these numbers."""
        result = copy.copy(self)
        result.rows = self.rows.without(numbers)
        return result


@dataclass(frozen=True)
class ImageSampleCollator:
    """Makes batches of samples: what the processor makes of images and captions, and `ids` and `labels`, [batch]."""

    processor: Processor

    def __call__(self, items: Sequence[ImageSample]) -> dict[str, Tensor]:
        """The samples as one batch."""
        batch = {
            **self.processor.images([item["image"] for item in items]),
            "ids": torch.tensor([item["number"] for item in items]),
        }
        captions = [item["caption"] for item in items if "caption" in item]
        labels = [item["label"] for item in items if "label" in item]
        words = self.processor.texts(captions) if captions else {}
        return {**batch, **words, **({"labels": torch.tensor(labels)} if labels else {})}

    def tokenize(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Texts as inputs of the model, [texts, T] each."""
        return self.processor.texts(texts)


def _only_image(row: Row) -> Image.Image:
    """Return a row's image, of several the first."""
    return row.open_images()[0]
