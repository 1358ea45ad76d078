"""Data sets of an annotation file with one image per sample, as COCO's and Flickr30K's are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from torch import Tensor
from torch.utils.data import Dataset

from upop.data.images import open_image
from upop.data.samples import Sample, check_images, read_samples
from upop.data.transforms import ImageTransform
from upop.sources import Sources

ItemT = TypeVar("ItemT")


class AnnotatedImages(Dataset[ItemT]):
    """What such data sets share: the file's samples, where the images lie, and one image by its number.

    A data set is as long as it has images. A subclass reads what else it needs of `_samples`, and then calls
    `_check_images`.
    """

    def __init__(self, annotation_file: str | Path, image_root: str | Path, transform: ImageTransform) -> None:
        self.file, self.root, self.transform = Path(annotation_file), Path(image_root), transform

    def _samples(self) -> list[Sample]:
        """Return the file's samples; DataError where one has no image."""
        samples = read_samples(self.file)
        self._images = [sample.text("image") for sample in samples]
        return samples

    def _check_images(self, samples: Sequence[Sample], *, outside: bool) -> None:
        """Raise DataError for an image that is missing, or lies outside of the root where that is not allowed."""
        check_images(self.root, zip(samples, self._images, strict=True), outside=outside)

    def __len__(self) -> int:
        """The number of images."""
        return len(self._images)

    def sources(self) -> Sources:
        """Return the files that are read."""
        return Sources((self.file,), {image: self.root / image for image in self._images})

    def _image(self, index: int) -> Tensor:
        """Return an image [3, H, W] by its number in the file; DataError where it cannot be read."""
        return self.transform(open_image(self.root / self._images[index], file=self.file, number=index % len(self)))
