"""NLVR2: sentences that are true or false for a pair of images."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypedDict

import torch
from torch import Tensor
from torch.utils.data import Dataset

from upop.data.images import open_image
from upop.data.samples import check_images, narrowed, read_samples
from upop.data.text import NLVR_WORDS, clean_caption, swap_left_right, tokenize
from upop.data.transforms import ImageTransform
from upop.sources import Sources

LABELS = ("False", "True")


class NlvrItem(TypedDict):
    """A sample: two images, [3, height, width], the cleaned sentence, and its label, 1 (true) or 0."""

    image0: Tensor
    image1: Tensor
    sentence: str
    label: int


class NlvrBatch(TypedDict):
    """Images, [2 * batch, 3, height, width], all left ones first; token ids, mask and labels, int64 [batch, ...]."""

    images: Tensor
    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor


class NlvrDataset(Dataset[NlvrItem]):
    """The samples of an annotation file, `[{"sentence": str, "label": "True"|"False", "images": [str, str]}]`.

    Image paths are relative to `image_root`; `outside` allows images elsewhere. With `swap` (training), the two images
    are swapped with probability 1/2, and so are the words left and right in the sentence. Random draws use torch's
    generator.

    Raises:
        DataError: the annotation file is not valid or an image is missing; on access, an image cannot be read.
    """

    def __init__(
        self,
        annotation_file: str | Path,
        image_root: str | Path,
        transform: ImageTransform,
        *,
        swap: bool,
        outside: bool = False,
    ) -> None:
        self.file = Path(annotation_file)
        self.root = Path(image_root)
        self.transform = transform
        self.swap = swap
        samples = read_samples(self.file)
        self._sentences: list[str] = []
        self._labels: list[int] = []
        self._images: list[tuple[str, str]] = []
        for sample in samples:
            sentence = clean_caption(sample.text("sentence"), NLVR_WORDS)
            if not sentence:
                raise sample.error(f"'sentence' holds no words: {sample.text('sentence')!r}.")
            first, second = sample.texts("images", 2)
            self._sentences.append(sentence)
            self._labels.append(sample.one_of("label", LABELS))
            self._images.append((first, second))
        pairs = zip(samples, self._images, strict=True)
        check_images(self.root, ((sample, image) for sample, images in pairs for image in images), outside=outside)

    def __len__(self) -> int:
        """The number of samples."""
        return len(self._labels)

    def sources(self) -> Sources:
        """Return the files that are read."""
        return Sources(
            (self.file,), {image: self.root / image for image in (image for pair in self._images for image in pair)}
        )

    def __getitem__(self, index: int) -> NlvrItem:
        """The sample at an index, with a random augmentation."""
        sentence, (first, second) = self._sentences[index], self._images[index]
        if self.swap and torch.rand(()) < 0.5:
            sentence, first, second = swap_left_right(sentence), second, first
        return {
            "image0": self._load(index, first),
            "image1": self._load(index, second),
            "sentence": sentence,
            "label": self._labels[index],
        }

    def without(self, numbers: Collection[int]) -> Self:
        """Return the data set without the samples at these indices."""
        return narrowed(self, numbers, "_sentences", "_labels", "_images")

    def _load(self, index: int, image: str) -> Tensor:
        return self.transform(open_image(self.root / image, file=self.file, number=index % len(self)))


@dataclass(frozen=True)
class NlvrCollator:
    """Collates items; a class, because workers need a picklable collator.

    Texts are padded to the longest of the batch. The first token is [CLS]; the model replaces it by [ENC].
    """

    tokenizer: Any
    max_length: int | None = None

    def __call__(self, items: Sequence[NlvrItem]) -> NlvrBatch:
        """Return the items as one batch."""
        ids, mask = tokenize(self.tokenizer, [item["sentence"] for item in items], self.max_length)
        images = [item["image0"] for item in items] + [item["image1"] for item in items]
        return {
            "images": torch.stack(images),
            "input_ids": ids,
            "attention_mask": mask,
            "labels": torch.tensor([item["label"] for item in items]),
        }


def collate_nlvr(tokenizer: Any, max_length: int | None = None) -> NlvrCollator:
    """Return the collate function of an `NlvrDataset`; it truncates sentences to max_length tokens, if given."""
    return NlvrCollator(tokenizer, max_length)
