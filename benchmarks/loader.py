"""Images per second that one core decodes and transforms: upop's data sets against Pillow and torchvision.

Images are generated: smooth colours with noise, JPEGs of `--width` x `--height` pixels, as large in bytes as COCO's
are on average (about 160 kB). Each way reads the same files and makes normalised tensors of them:

- plain: `Image.open(...).convert("RGB")` and the usual transforms of torchvision (of timm for classification, whose
  training is published with them), with the same operations of RandAugment; for segmentation the usual ones on Pillow
  images.
- ours: the data sets that `make_loader` reads, draws seeded by sample among the rest of what they do.

Both take turns in one process with one thread. Its processor time counts, so that other programs on the machine do
not. A core's rate is the median over the turns. For evaluation the result includes the largest difference of the
tensors: zero, or float rounding. In training the two draw different crops, so rates average over all images and turns.

    OMP_NUM_THREADS=1 python benchmarks/loader.py --images 24 --turns 10
"""

from __future__ import annotations

import argparse
import io
import json
import random
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from timm.data.transforms import RandomResizedCropAndInterpolation
from timm.data.transforms_factory import create_transform
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import transforms
from torchvision.transforms import functional as tvf

from upop.data.caption import CaptionTrainDataset
from upop.data.classification import ImageFolderDataset
from upop.data.classification_transforms import Augmentation
from upop.data.classification_transforms import eval_transform as classification_eval
from upop.data.classification_transforms import train_transform as classification_train
from upop.data.segmentation import SegmentationDataset
from upop.data.segmentation_transforms import IGNORED, RESIZE_RATIO, STATISTICS, TrainCrop, scaled_size
from upop.data.transforms import CROP_SCALE, MEAN, STD, RandAugment, eval_transform, train_transform
from upop.files import write_json
from upop.machine import machine
from upop.runs.loaders import SeededDataset

RESULTS = Path(__file__).parent / "results"
_QUALITY = 92
_CLASSES = 150
_BICUBIC = transforms.InterpolationMode.BICUBIC

Read = Callable[[int], Any]
"""Number of an image -> its tensor; where it has labels, a pair."""


def draw_image(seed: int, width: int, height: int, noise: float) -> Image.Image:
    """Return smooth random colours on several scales, with `noise` (a share of their deviation) on every pixel."""
    chance = np.random.default_rng(seed)
    total = np.zeros((height, width, 3), np.float32)
    for octave in range(1, 9):
        sides = max(2, height * 2**octave // 512), max(2, width * 2**octave // 512)
        for channel in range(3):
            coarse = Image.fromarray(chance.normal(size=sides).astype(np.float32))
            total[..., channel] += 0.62**octave * np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))
    total += noise * total.std() * chance.normal(size=total.shape)
    low, high = np.percentile(total, [0.5, 99.5])
    return Image.fromarray(np.clip((total - low) * 255 / (high - low), 0, 255).astype(np.uint8))


def write_data(folder: Path, count: int, width: int, height: int, noise: float) -> dict[str, Any]:
    """Write the images in the forms that the data sets read; return what they are."""
    sizes = []
    samples = []
    for number in range(count):
        content = io.BytesIO()
        draw_image(number, width, height, noise).save(content, "JPEG", quality=_QUALITY)
        sizes.append(len(content.getvalue()))
        name = f"picture_{number:04d}"
        for place in ("plain", "train/one", "images/training"):
            (folder / place).mkdir(parents=True, exist_ok=True)
            (folder / place / f"{name}.jpg").write_bytes(content.getvalue())
        labels = np.random.default_rng(number).integers(0, _CLASSES, (height // 60, width // 60), dtype=np.uint8)
        (folder / "annotations" / "training").mkdir(parents=True, exist_ok=True)
        Image.fromarray(labels).resize((width, height), Image.Resampling.NEAREST).save(
            folder / "annotations" / "training" / f"{name}.png"
        )
        samples.append({"image": f"plain/{name}.jpg", "caption": "a picture of colours", "image_id": name})
    (folder / "records.json").write_text(json.dumps(samples))
    return {"count": count, "width": width, "height": height, "mean_kilobytes": statistics.mean(sizes) / 1000}


class PlainSegmentation:
    """The usual training transforms of segmentation on Pillow images."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.jitter = transforms.ColorJitter(32 / 255, 0.5, 0.5, 0.1)

    def __call__(self, image: Image.Image, labels: Image.Image) -> tuple[Tensor, Tensor]:
        """The normalised crop, and its labels."""
        ratio = RESIZE_RATIO[0] + (RESIZE_RATIO[1] - RESIZE_RATIO[0]) * float(torch.rand(()))
        size = list(scaled_size(image.height, image.width, int(self.size * ratio)))
        image = tvf.resize(image, size)
        labels = tvf.resize(labels, size, transforms.InterpolationMode.NEAREST)
        padding = [0, 0, max(0, self.size - size[1]), max(0, self.size - size[0])]
        image, labels = tvf.pad(image, padding), tvf.pad(labels, padding, fill=IGNORED)
        crop = transforms.RandomCrop.get_params(image, (self.size, self.size))
        image, labels = tvf.crop(image, *crop), tvf.crop(labels, *crop)
        if torch.rand(()) < 0.5:
            image, labels = tvf.hflip(image), tvf.hflip(labels)
        tensor = tvf.normalize(tvf.to_tensor(self.jitter(image)), *STATISTICS["vit"])
        return tensor, tvf.pil_to_tensor(labels)[0].long()


class Ours:
    """The images of one of upop's data sets, drawn again in every turn."""

    def __init__(self, samples: Dataset[Any]) -> None:
        self._samples = SeededDataset(samples, seed=0)

    def begin(self, turn: int) -> None:
        """Say which turn the next draws are for."""
        self._samples.set_epoch(turn)

    def __call__(self, number: int) -> Tensor:
        """The image of that number."""
        image: Tensor = self._samples[number]["image"]
        return image


def ways(folder: Path) -> dict[str, tuple[Read, Read]]:
    """Return the plain and the upop loader, by the name of their purpose."""
    files = sorted((folder / "plain").iterdir())

    def opened(path: Path) -> Image.Image:
        with Image.open(path) as image:
            return image.convert("RGB")

    def plain(transform: Callable[[Image.Image], Any]) -> Read:
        return lambda number: transform(opened(files[number]))

    def captions(transform: Any) -> Read:
        return Ours(CaptionTrainDataset(folder / "records.json", folder, transform, prompt="a picture of "))

    def published(size: int) -> Read:
        return plain(
            transforms.Compose(
                [
                    transforms.RandomResizedCrop(size, scale=CROP_SCALE, interpolation=_BICUBIC),
                    transforms.RandomHorizontalFlip(),
                    PlainRandAugment(),
                    transforms.ToTensor(),
                    transforms.Normalize(MEAN, STD),
                ]
            )
        )

    def whole(size: int) -> Read:
        steps = [transforms.Resize((size, size), _BICUBIC), transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
        return plain(transforms.Compose(steps))

    def classes(transform: Any, training: bool) -> Read:
        return Ours(ImageFolderDataset(folder, "train", transform, training=training))

    augmentation = Augmentation()
    deit: Any = classification_train(224, augmentation)
    for step in deit.transforms:
        if isinstance(step, RandomResizedCropAndInterpolation):
            step.__class__ = RandomResizedCropAndInterpolation  # all else there is timm's
    deit_eval = create_transform(input_size=224, is_training=False, interpolation="bicubic", crop_pct=0.875)
    segments = PlainSegmentation(512)
    maps = [folder / "annotations" / "training" / f"{path.stem}.png" for path in files]
    return {
        "BLIP 384, training": (published(384), captions(train_transform(384))),
        "BLIP 384, evaluation": (whole(384), captions(eval_transform(384))),
        "CLIP 336, training": (published(336), captions(train_transform(336))),
        "DeiT 224, training": (plain(deit), classes(classification_train(224, augmentation), True)),
        "DeiT 224, evaluation": (plain(deit_eval), classes(classification_eval(224), False)),
        "Segmenter 512, training": (
            lambda number: segments(opened(files[number]), Image.open(maps[number]))[0],
            Ours(SegmentationDataset(folder, "training", TrainCrop(512, 512), _CLASSES)),
        ),
    }


class PlainRandAugment(RandAugment):
    """The same operations on the same draws, all of them computed by torchvision, even those that change nothing."""

    def __call__(self, image: Image.Image) -> Image.Image:
        """The image after the drawn operations."""
        for _ in range(self.operations):
            number = int(torch.randint(10, ()))
            if torch.rand(()) < 0.5:
                image = self._operation(number, image)
        return image

    def _operation(self, number: int, image: Image.Image) -> Image.Image:
        sign = -1 if torch.rand(()) < 0.5 else 1
        moves = {5: (0, (0, 0), (8.53, 0)), 6: (0, (0, 0), (0, 8.53)), 7: (0, (5, 0), (0, 0)), 8: (0, (0, 5), (0, 0))}
        simple: dict[int, Callable[[Image.Image], Image.Image]] = {
            0: lambda image: image,
            1: tvf.autocontrast,
            2: tvf.equalize,
            3: lambda image: tvf.adjust_brightness(image, 1.0),
            4: lambda image: tvf.adjust_sharpness(image, 1.0),
        }
        if number in simple:
            return simple[number](image)
        angle, shift, shear = moves.get(number, (15, (0, 0), (0, 0)))
        moved: Image.Image = tvf.affine(
            image,
            angle=sign * angle,
            translate=[sign * part for part in shift],
            scale=1.0,
            shear=[sign * part for part in shear],
            interpolation=transforms.InterpolationMode.BILINEAR,
            fill=[128, 128, 128],
        )
        return moved


def measure(pair: tuple[Read, Read], count: int, turns: int, *, compared: bool) -> dict[str, Any]:
    """Return each way's images per second of a core, turn by turn, and what ours gains."""
    names = ("plain", "ours")
    rates: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(turns + 1):
        for name, read in list(zip(names, pair, strict=True))[:: 1 if turn % 2 else -1]:
            torch.manual_seed(turn)
            random.seed(turn)
            np.random.seed(turn)
            if isinstance(read, Ours):
                read.begin(turn)
            start = time.thread_time()
            for number in range(count):
                read(number)
            if turn:  # the first turn warms up
                rates[name].append(count / (time.thread_time() - start))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    result = {"per_second_and_core": medians, "times_plain": medians["ours"] / medians["plain"], "turns": rates}
    if compared:
        result["largest_difference"] = max(float((pair[0](n) - pair[1](n)).abs().max()) for n in range(count))
    return result


def main(arguments: list[str] | None = None) -> None:
    """Measure, print the table, write the JSON file."""
    parser = argparse.ArgumentParser(description="Images per second and core, beside Pillow and torchvision.")
    parser.add_argument("--images", type=int, default=24)
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--width", type=int, default=640)
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--noise", type=float, default=0.32, help="decides how large the files are")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        images = write_data(Path(place), options.images, options.width, options.height, options.noise)
        found = {
            name: measure(pair, options.images, options.turns, compared=name.endswith("evaluation"))
            for name, pair in ways(Path(place)).items()
        }
    table = Table("for", "plain", "ours", "times plain", title="Images per second and core")
    for name, result in found.items():
        rates = result["per_second_and_core"]
        table.add_row(name, f"{rates['plain']:.0f}", f"{rates['ours']:.0f}", f"{result['times_plain']:.2f}")
    Console(width=110).print(table)
    about = machine("cpu")
    slug = "-".join("".join(c if c.isalnum() else " " for c in str(about["device"]).lower()).split())
    content = {
        "machine": {**about, "shared": "others computed meanwhile; processor time of one thread is counted"},
        "command": shlex.join(["python", *sys.argv]),
        "pictures": images,
        "ways": found,
    }
    write_json(options.out / f"loader_{slug}.json", content)


if __name__ == "__main__":
    main()
