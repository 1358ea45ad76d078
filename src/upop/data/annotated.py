"""Base of data sets with one annotation file and one image per sample, such as COCO and Flickr30K."""

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
    """Base of these data sets: samples, image paths, and access to images by index.

    The length is the number of images. A subclass reads further fields from `_samples`, then calls `_check_images`.
    """

    def __init__(self, annotation_file: str | Path, image_root: str | Path, transform: ImageTransform) -> None:
        self.file, self.root, self.transform = Path(annotation_file), Path(image_root), transform

    def _samples(self) -> list[Sample]:
        """Return the samples of the file; DataError if one has no image."""
        samples = read_samples(self.file)
        self._images = [sample.text("image") for sample in samples]
        return samples

    def _check_images(self, samples: Sequence[Sample], *, outside: bool) -> None:
        """Raise DataError for an image that is missing, or outside of the root without permission."""
        check_images(self.root, zip(samples, self._images, strict=True), outside=outside)

    def __len__(self) -> int:
        """The number of images."""
        return len(self._images)

    def sources(self) -> Sources:
        """Return the files that are read."""
        return Sources((self.file,), {image: self.root / image for image in self._images})

    def _image(self, index: int) -> Tensor:
        """Return an image, [3, height, width], by its index; DataError if it cannot be read."""
        return self.transform(open_image(self.root / self._images[index], file=self.file, number=index % len(self)))
