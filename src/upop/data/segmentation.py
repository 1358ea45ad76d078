"""ADE20K: images, and a map of labels for each.

`ROOT/images/{training,validation}/NAME.jpg` and `ROOT/annotations/{training,validation}/NAME.png`: a map holds 0 where
no class was given, and 1 to 150 else. `ROOT/objectInfo150.txt`, if it is there, names the classes.
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
"""Below the folder of all data sets."""
NAMES = "objectInfo150.txt"
_MODES = ("L", "P", "1", "I", "I;16")  # maps of numbers; P, a palette, shows each number as a colour


class SegmentItem(TypedDict):
    """One sample: image [3, h, w], labels int64 [h, w] (255 is no class), its number in the split, and its name."""

    image: Tensor
    labels: Tensor
    number: int
    name: str


class SegmentBatch(TypedDict):
    """B samples: tensors [B, 3, h, w] and int64 [B, h, w] where all are of one size, else lists of B tensors."""

    images: Tensor | list[Tensor]
    labels: Tensor | list[Tensor]
    numbers: Tensor
    names: list[str]


class SegmentationDataset(Dataset[SegmentItem]):
    """The images of a split with their labels, in the order of their names.

    Labels of a file are 0 (or 255) for no class, which becomes 255, and 1 to `classes`, which become 0 to classes - 1.

    Files whose names begin with a dot are none of the data; others that do not end like images or maps are left
    out, and `notes` says which. `outside` lets links lead outside of `root`.

    Raises DataError, here for folders without images and for images without a map, and on access for a file that
    cannot be read, a map of another size than its image, and a label above `classes`.
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
            rest = f" {len(missing)} maps are missing in all." if len(missing) > 1 else ""
            raise DataError(
                f"The image {missing[0]} has no label map {self.root / 'annotations' / split / missing[0].stem}.png."
                f"{rest} Fetch the annotations again, or take away the images without one."
            )
        for files in (self._images, maps):
            twice = len(files) - len({path.stem for path in files})
            if twice:
                raise DataError(f"{files[0].parent} holds {twice} names twice, with other endings. Keep one.")

    def __len__(self) -> int:
        """The number of images."""
        return len(self._images)

    def sources(self) -> Sources:
        """Return the files that are read: images and maps."""
        paths = [*self._images, *self._maps.values()]
        return Sources((), {path.relative_to(self.root).as_posix(): path for path in paths})

    def __getitem__(self, index: int) -> SegmentItem:
        """The image of that number, as drawn this time."""
        number = index % len(self)
        path = self._images[number]
        # As stored: maps are drawn over the stored pixels.
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
        """Return the samples but for those of these numbers, to score the rest."""
        return narrowed(self, numbers, "_images")

    def _files(self, part: str, endings: tuple[str, ...], what: str, bounds: Bounds) -> list[Path]:
        folder = self.root / part / self.split
        try:
            listed = list_images(folder, bounds, endings, deep=False)
        except OSError as error:
            near = [path.name for path in folder.parent.iterdir()] if folder.parent.is_dir() else []
            raise DataError(
                f"The folder of {what} {folder} cannot be read{nearest(folder.name, near)}: {error.strerror}. "
                f"It is looked for below dataset_root, or the environment's DATASET, in {FOLDER}."
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
                image.load()  # a file that is cut off is so whatever it holds
                mode = image.mode
                found = tvf.pil_to_tensor(image)[0].long() if mode in _MODES else None
        except Exception as error:  # a broken file makes the decoders raise nearly anything
            reason = str(error) or type(error).__name__
            raise BadImageError(
                f"The label map {path} cannot be read: {reason}. It may be cut off or no image at all; fetch it again.",
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
                f"The label map {path} holds label {highest}, and there are {self.classes} classes: labels are 0 (no "
                f"class) and 1 to {self.classes}. Set classes to the number of classes of this data set."
            )
        return torch.where(found == 0, IGNORED, found - 1)


def collate_segments(items: Sequence[SegmentItem]) -> SegmentBatch:
    """Make a batch: stacked where all images are of one size, in lists else."""
    images, labels = [item["image"] for item in items], [item["labels"] for item in items]
    alike = len({image.shape for image in images}) == 1
    return {
        "images": torch.stack(images) if alike else images,
        "labels": torch.stack(labels) if alike else labels,
        "numbers": torch.tensor([item["number"] for item in items]),
        "names": [item["name"] for item in items],
    }


def class_names(root: str | Path, classes: int) -> list[str]:
    """Return the names of the classes from `objectInfo150.txt`: the last column, or "class 1", ... where it is missing.

    Raises:
        DataError: it names another number of classes.
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
