"""ADE20K: images with label maps.

`ROOT/images/{training,validation}/NAME.jpg` and `ROOT/annotations/{training,validation}/NAME.png`: label maps hold 1 to
150, and 0 for no class. The optional `ROOT/objectInfo150.txt` names the classes.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Self, TypedDict

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as tvf

from upop.data.images import ENDINGS, Bounds, describe_others, list_images, open_image, opened
from upop.data.samples import narrowed
from upop.data.segmentation_transforms import IGNORED, SegmentTransform
from upop.errors import BadImageError, DataError, nearest
from upop.reading import read_text, reason
from upop.sources import Sources

FOLDER = Path("ade20k") / "ADEChallengeData2016"
"""Folder of ADE20K, relative to the root of all data sets."""
NAMES = "objectInfo150.txt"
_MODES = ("L", "P", "1", "I", "I;16")  # Pillow's modes with one number per pixel


class SegmentItem(TypedDict):
    """A sample: image, [3, height, width], labels, int64 [height, width] (255 is no class), its index and its name."""

    image: Tensor
    labels: Tensor
    number: int
    name: str


class SegmentBatch(TypedDict):
    """Images, [batch, 3, height, width], and labels, int64 [batch, height, width]; lists if sizes differ."""

    images: Tensor | list[Tensor]
    labels: Tensor | list[Tensor]
    numbers: Tensor
    names: list[str]


class SegmentationDataset(Dataset[SegmentItem]):
    """The images of a split with their labels, sorted by name.

    Label maps hold 1 to `classes`, which become 0 to classes - 1, and 0 or 255 for no class, which become 255.

    Hidden files are ignored, and so are files with other extensions; `notes` says which. `outside` allows links that
    lead outside of `root`.

    Raises:
        DataError: a folder has no images, or an image has no map; on access, a file cannot be read, the size of a map
            differs from its image's, or a label is above `classes`.
    """

    def __init__(
        self,
        root: str | Path,
        split: str,
        transform: SegmentTransform,
        classes: int = 150,
        *,
        outside: bool = False,
    ) -> None:
        self.root, self.split, self.classes = Path(root), split, classes
        self.transform = transform
        bounds = Bounds(self.root, outside=outside)
        self.notes: list[str] = []
        self._images = self._files("images", ENDINGS, "images", bounds)
        maps = self._files("annotations", (".png",), "label maps", bounds)
        self._maps = {path.stem: path for path in maps}
        missing = [path for path in self._images if path.stem not in self._maps]
        if missing:
            rest = f" {len(missing)} maps are missing." if len(missing) > 1 else ""
            raise DataError(
                f"The image {missing[0]} has no label map {self.root / 'annotations' / split / missing[0].stem}.png."
                f"{rest} Fetch the annotations again, or remove the images without one."
            )
        for files in (self._images, maps):
            twice = len(files) - len({path.stem for path in files})
            if twice:
                raise DataError(
                    f"{files[0].parent} holds {twice} names twice, with different extensions. Keep one of each."
                )

    def __len__(self) -> int:
        """The number of images."""
        return len(self._images)

    def sources(self) -> Sources:
        """Return the files that are read: images and maps."""
        paths = [*self._images, *self._maps.values()]
        return Sources((), {path.relative_to(self.root).as_posix(): path for path in paths})

    def __getitem__(self, index: int) -> SegmentItem:
        """The sample at an index, with a random augmentation in training."""
        number = index % len(self)
        path = self._images[number]
        # Not turned upright: label maps match the stored pixels.
        stored = tvf.pil_to_tensor(open_image(path, file=path.parent, number=number, upright=False))
        labels = self._labels(path, number)
        if labels.shape != stored.shape[1:]:
            raise DataError(
                f"{self._maps[path.stem]} has {labels.shape[1]} x {labels.shape[0]} pixels, and its image "
                f"{path} {stored.shape[2]} x {stored.shape[1]}. A map must have its image's size."
            )
        image, labels = self.transform(stored, labels)
        return {"image": image, "labels": labels, "number": number, "name": path.stem}

    def without(self, numbers: Collection[int]) -> Self:
        """Return the data set without the samples at these indices."""
        return narrowed(self, numbers, "_images")

    def _files(self, part: str, endings: tuple[str, ...], what: str, bounds: Bounds) -> list[Path]:
        folder = self.root / part / self.split
        try:
            listed = list_images(folder, bounds, endings, deep=False)
        except OSError as error:
            near = [path.name for path in folder.parent.iterdir()] if folder.parent.is_dir() else []
            raise DataError(
                f"The folder of {what} {folder} cannot be read{nearest(folder.name, near)}: {error.strerror}. "
                f"It must be in {FOLDER} under dataset_root, or under the environment's DATASET."
            ) from error
        if not listed.images:
            raise DataError(f"The folder {folder} holds no {what} ({', '.join(endings)}).")
        if others := describe_others([listed], folder, endings):
            self.notes.append(others)
        return [Path(path) for path in listed.images]

    def _labels(self, image_path: Path, number: int) -> Tensor:
        path = self._maps[image_path.stem]
        try:
            with opened(path) as image:
                image.load()  # detects truncated files first
                mode = image.mode
                found = tvf.pil_to_tensor(image)[0].long() if mode in _MODES else None
        except Exception as error:  # a broken file makes the decoders raise nearly anything
            reason = str(error) or type(error).__name__
            raise BadImageError(
                f"The label map {path} cannot be read: {reason}. It may be truncated or not an image; fetch it again.",
                str(path),
                str(path.parent),
                number,
                reason,
            ) from error
        if found is None:
            raise DataError(
                f"The label map {path} must hold one number per pixel (a grey or palette PNG), not {mode}. "
                "ADE20K's scene parsing set (ADEChallengeData2016) has such maps."
            )
        found = torch.where(found == IGNORED, 0, found)
        highest = int(found.max())
        if highest > self.classes or int(found.min()) < 0:
            raise DataError(
                f"The label map {path} holds label {highest}, but classes is {self.classes}: labels are 0 (no class) "
                f"and 1 to {self.classes}. Set classes to the number of classes of this data set."
            )
        return torch.where(found == 0, IGNORED, found - 1)


def collate_segments(items: Sequence[SegmentItem]) -> SegmentBatch:
    """Return a batch: stacked if all images have the same size, else in lists."""
    images, labels = [item["image"] for item in items], [item["labels"] for item in items]
    alike = len({image.shape for image in images}) == 1
    return {
        "images": torch.stack(images) if alike else images,
        "labels": torch.stack(labels) if alike else labels,
        "numbers": torch.tensor([item["number"] for item in items]),
        "names": [item["name"] for item in items],
    }


def class_names(root: str | Path, classes: int) -> list[str]:
    """Return the class names in the last column of `objectInfo150.txt`; "class 1", ... without that file.

    Raises:
        DataError: it has another number of classes.
    """
    path = Path(root) / NAMES
    if not path.is_file():
        return [f"class {number}" for number in range(1, classes + 1)]
    try:
        lines = read_text(path).splitlines()[1:]
    except (OSError, ValueError) as error:
        raise DataError(f"The names of classes in {path} cannot be read: {reason(error)}.") from error
    names = [line.split("\t")[-1].strip() for line in lines if line.strip()]
    if len(names) != classes:
        raise DataError(f"{path} names {len(names)} classes, and classes is {classes}. Set classes to that number.")
    return names
