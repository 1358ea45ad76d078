"""Image folders with ImageNet's layout, `ROOT/{train,val,test}/CLASS/*`; classes are in alphabetical order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NotRequired, Self, TypedDict

import torch
from timm.data.distributed_sampler import RepeatAugSampler
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from upop.data.classification_transforms import Mixing, seeded_libraries
from upop.data.images import ENDINGS, Bounds, Listed, describe_others, list_images, open_image
from upop.data.samples import narrowed
from upop.data.transforms import ImageTransform
from upop.errors import DataError, nearest
from upop.sources import Sources

_SHOWN = 5
_DRAWS = 2**32  # number of numpy's seeds
_ROUNDED_FROM = 100_000  # the published rounding would drop too much of an epoch of a smaller set
_ROUND = 256


class ImageItem(TypedDict):
    """A sample: image, [3, size, size], class index, and in training a seed for mixing its batch."""

    image: Tensor
    label: int
    draw: NotRequired[int]


class ImageBatch(TypedDict):
    """Images, [batch, 3, size, size], labels, int64 [batch], and soft targets of mixed images, [batch, classes]."""

    images: Tensor
    labels: Tensor
    targets: NotRequired[Tensor]


def class_names(root: str | Path) -> list[str]:
    """Return the class names of a data set, by index: the folders in `train`, or else in `val` or `test`.

    Raises:
        DataError: there is no such folder, or it holds no folders.
    """
    root = Path(root)
    for split in ("train", "val", "test"):
        if (root / split).is_dir():
            return _folders(root, split)
    return _folders(root, "train")


class ImageFolderDataset(Dataset[ImageItem]):
    """The images of a split, class by class, in the order of their names.

    Args:
        root: the folder of the splits.
        split: "train", "val" or "test".
        transform: image -> tensor; random draws use torch's generator.
        training: whether samples have seeds for mixing their batch.
        classes: number of classes of the model; None skips the check.
        outside: whether links may lead outside of `root`.

    Hidden files and folders are ignored, and so are files without an image extension.

    Attributes:
        names: of the classes.
        notes: remarks about ignored files.

    Raises:
        DataError: folders are missing or empty, classes differ from the training split's, or there are more than the
            model has; on access, an image cannot be read.
    """

    def __init__(
        self,
        root: str | Path,
        split: str,
        transform: ImageTransform,
        *,
        training: bool,
        classes: int | None = None,
        outside: bool = False,
    ) -> None:
        root = Path(root)
        self.folder, self.transform, self.training = root / split, transform, training
        self.notes: list[str] = []
        self.names = class_names(root)
        _check_same(self.folder, _folders(root, split), self.names)
        if classes is not None and len(self.names) > classes:
            raise DataError(
                f"{self.folder / self.names[classes]} has label {classes}, counted from 0 in the order of names, and "
                f"classes={classes} is set. There are {len(self.names)} folders: set classes to that number, or leave "
                "it out."
            )
        found = self._listed(Bounds(root, outside=outside))
        empty = [name for name, listed in zip(self.names, found, strict=True) if not listed.images]
        if empty:
            raise DataError(
                f"The class folder {self.folder / empty[0]} holds no image ({', '.join(ENDINGS)})"
                f"{f', and neither do {len(empty) - 1} others' if len(empty) > 1 else ''}. Fill it, or remove it from "
                "all splits."
            )
        self._images = [(path, label) for label, listed in enumerate(found) for path in listed.images]

    def _listed(self, bounds: Bounds) -> list[Listed]:
        """Return the images of every class; record other files, and images outside of class folders."""
        try:
            beside = list_images(self.folder, bounds, deep=False)
            found = [list_images(self.folder / name, bounds) for name in self.names]
        except OSError as error:
            raise DataError(f"{error.filename} cannot be read: {error.strerror}. Check its permissions.") from error
        if beside.images:
            count, first = len(beside.images), beside.images[0]
            self.notes.append(f"Left out of {self.folder}: {count} images outside of class folders, such as {first}.")
        if others := describe_others(found, self.folder):
            self.notes.append(others)
        return found

    def __len__(self) -> int:
        """The number of images."""
        return len(self._images)

    def sources(self) -> Sources:
        """Return the files that are read."""
        paths = [Path(path) for path, _ in self._images]
        return Sources((), {path.relative_to(self.folder).as_posix(): path for path in paths})

    def __getitem__(self, index: int) -> ImageItem:
        """The sample at an index, with a random augmentation in training."""
        path, label = self._images[index]
        opened = open_image(path, file=self.folder, number=index)
        if not self.training:
            return {"image": self.transform(opened), "label": label}
        with seeded_libraries(int(torch.randint(_DRAWS, ()))):
            image = self.transform(opened)
        return {"image": image, "label": label, "draw": int(torch.randint(_DRAWS, ()))}

    def without(self, numbers: Collection[int]) -> Self:
        """Return the data set without the samples at these indices."""
        return narrowed(self, numbers, "_images")


def _folders(root: Path, split: str) -> list[str]:
    folder = root / split
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        place = root if root.is_dir() else root.parent
        near = nearest(split if root.is_dir() else root.name, _names(place))
        raise DataError(
            f"The folder {folder} cannot be read{near}: {error.strerror or error}. Images must be in "
            f"{root}/train/CLASS, {root}/val/CLASS and, optionally, {root}/test/CLASS."
        ) from error
    names = [entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")]
    if not names:
        images = sum(entry.suffix.lower() in ENDINGS for entry in entries)
        raise DataError(
            f"{folder} holds {images} images, but no class folders. Put the images of each class into a folder with "
            "its name (ImageNet's validation images come without such folders)."
        )
    return names


def _names(folder: Path) -> list[str]:
    try:
        return [path.name for path in folder.iterdir()]
    except OSError:
        return []


def _check_same(folder: Path, found: Sequence[str], wanted: Sequence[str]) -> None:
    """Check that all splits have the same class folders, whose order defines the labels."""
    lacking, unknown = (sorted(set(one) - set(other)) for one, other in ((wanted, found), (found, wanted)))
    if lacking or unknown:
        differing = [
            f"{what} {', '.join(names[:_SHOWN])}{', ...' if len(names) > _SHOWN else ''} ({len(names)} in all)"
            for what, names in (("lacks", lacking), ("adds", unknown))
            if names
        ]
        raise DataError(
            f"The class folders of {folder} are not those of {folder.parent / 'train'}: it {' and '.join(differing)}. "
            "Every split needs the same folders."
        )


class RepeatedSampler(Sampler[int]):
    """Repeated augmentation: an epoch has `repeats` augmented copies of some samples, and its usual length.

    Copies have the index sample + copy * samples. Epochs differ, but do not depend on the number of processes.
    """

    def __init__(self, samples: Dataset[ImageItem], repeats: int, seed: int) -> None:
        count = len(samples)  # type: ignore[arg-type]
        self._count, self._seed = count, seed
        rounded = _ROUND if count >= _ROUNDED_FROM else 0
        self._library = RepeatAugSampler(samples, 1, 0, num_repeats=repeats, selected_round=rounded)
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Set the next epoch."""
        self._library.set_epoch(hash((self._seed, epoch)) & 0x7FFF_FFFF_FFFF_FFFF)

    def __len__(self) -> int:
        """The number of samples in an epoch, copies included."""
        return len(self._library)

    def __iter__(self) -> Iterator[int]:
        """Yield the indices of an epoch."""
        seen: Counter[int] = Counter()
        for sample in self._library:
            yield sample + seen[sample] * self._count
            seen[sample] += 1


@dataclass(frozen=True)
class ImageCollator:
    """Collates items; a class, because workers need a picklable collator.

    Attributes:
        mixing: mixes the images of training batches; None leaves them unchanged.
    """

    mixing: Mixing | None = None

    def __call__(self, items: Sequence[ImageItem]) -> ImageBatch:
        """Return the items as one batch."""
        images = torch.stack([item["image"] for item in items])
        labels = torch.tensor([item["label"] for item in items])
        if self.mixing is None or "draw" not in items[0]:
            return {"images": images, "labels": labels}
        images, targets = self.mixing.mix(images, labels, items[0]["draw"])
        return {"images": images, "labels": labels, "targets": targets}
