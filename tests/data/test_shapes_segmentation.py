"""Generated scenes with label maps: ADE20K's layout, maps that fit their images, and no scene in two splits."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as tvf
from typer.testing import CliRunner

from upop.cli.app import app
from upop.data.segmentation import FOLDER, SegmentationDataset, class_names
from upop.data.segmentation_transforms import IGNORED
from upop.demo import Summary, write_shapes
from upop.demo.draw import COLOUR_VALUES
from upop.demo.segmentation_files import CLASSES

SIZE = 60


@pytest.fixture(scope="module")
def summary(tmp_path_factory: pytest.TempPathFactory) -> Summary:
    return write_shapes("segmentation", tmp_path_factory.mktemp("set") / "set", seed=4, size=SIZE, image_size=96)


def digests(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def pairs(summary: Summary, split: str) -> list[tuple[Tensor, Tensor]]:
    """Images of bytes and their labels, -1 in place of 255."""

    def as_it_is(image: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return image, torch.where(labels == IGNORED, -1, labels)

    records = SegmentationDataset(summary.folder / FOLDER, split, as_it_is, len(CLASSES))
    return [(record["image"], record["labels"]) for record in (records[number] for number in range(len(records)))]


def test_the_layout_is_that_of_ade20k(summary: Summary) -> None:
    root = summary.folder / "ade20k" / "ADEChallengeData2016"
    assert summary.settings == {"dataset_root": str(summary.folder)}
    assert summary.records == {"training": SIZE, "validation": 50}
    for split, count in summary.records.items():
        images = sorted(path.stem for path in (root / "images" / split).iterdir())
        assert len(images) == count
        assert images == sorted(path.stem for path in (root / "annotations" / split).glob("*.png"))
    with Image.open(root / "annotations" / "training" / "ADE_train_00000001.png") as labels:
        assert (labels.mode, labels.size) == ("L", (96, 96))
    assert class_names(root, 13) == list(CLASSES)
    assert not (summary.folder / "tokenizer").exists()


def test_maps_say_what_the_images_show(summary: Summary) -> None:
    shown = set()
    for image, labels in pairs(summary, "training"):
        for label in set(labels.unique().tolist()) - {-1, 0}:
            colour = torch.tensor(COLOUR_VALUES[CLASSES[label].split()[0]]).view(3, 1)
            pixels = image[:, labels == label].float()
            # Pixels on an edge are mixed, up to half and half.
            nearer = (pixels - colour).norm(dim=0) < (pixels - 242).norm(dim=0)
            assert float(nearer.float().mean()) > 0.9
            shown.add(label)
        background = image[:, labels == 0].float()
        assert float((background.amin(0) > 225).float().mean()) > 0.95
    assert shown == set(range(1, 13))


@pytest.mark.parametrize(("kind", "share"), [("circle", 0.785), ("square", 1.0), ("triangle", 0.55)])
def test_shapes_fill_what_their_kind_fills(summary: Summary, kind: str, share: float) -> None:
    filled = []
    for _, labels in pairs(summary, "training"):
        for label in labels.unique().tolist():
            if label > 0 and CLASSES[label].endswith(kind):
                rows, columns = (labels == label).nonzero(as_tuple=True)
                places = [int(end) for axis in (rows, columns) for end in (axis.min(), axis.max())]
                if min(places) > 3 and max(places) < 92:  # else the frame has cut it
                    filled.append(len(rows) / ((1 + places[1] - places[0]) * (1 + places[3] - places[2])))
    alone = max(filled)  # two of a class lie apart, and their common box is emptier
    assert alone == pytest.approx(share, abs=0.07)


def test_a_frame_belongs_to_no_class(summary: Summary) -> None:
    for _, labels in pairs(summary, "validation"):
        inner = labels[3:-3, 3:-3]
        assert bool((inner >= 0).all())
        assert int((labels == -1).sum()) == labels.numel() - inner.numel()


def test_the_same_arguments_give_the_same_bytes_and_another_seed_others(summary: Summary, tmp_path: Path) -> None:
    again = write_shapes("segmentation", tmp_path / "again", seed=4, size=SIZE, image_size=96)
    assert digests(again.folder) == digests(summary.folder)
    other = write_shapes("segmentation", tmp_path / "other", seed=5, size=SIZE, image_size=96)
    assert not set(digests(other.folder).values()) & set(digests(summary.folder).values())


def test_a_smaller_set_is_the_beginning_of_a_larger_one(summary: Summary, tmp_path: Path) -> None:
    small = write_shapes("segmentation", tmp_path / "small", seed=4, size=7, image_size=96)
    files = {name: digest for name, digest in digests(small.folder).items() if name.endswith(".png")}
    assert len(files) == 2 * small.images
    assert files.items() <= digests(summary.folder).items()


@pytest.mark.slow
def test_no_map_of_one_split_is_in_another_nor_its_mirror_image(tmp_path: Path) -> None:
    summary = write_shapes("segmentation", tmp_path / "set", seed=1, size=1500)
    seen: dict[str, set[bytes]] = {}
    for split, mirrors in (("training", (False, True)), ("validation", (False,))):
        maps = [labels for _, labels in pairs(summary, split)]
        flips: list[Callable[[Tensor], Tensor]] = [lambda one: one, lambda one: one.flip(1)][: len(mirrors)]
        seen[split] = {_cells(flip(labels)) for labels in maps for flip in flips}
    assert not seen["training"] & seen["validation"]


def _cells(labels: Tensor) -> bytes:
    """What each of the nine cells shows, and whether it is a large shape: the same for look-alikes."""
    cells = []
    for rows in labels.tensor_split(3, 0):
        for cell in rows.tensor_split(3, 1):
            inside = cell[cell > 0]
            shown = len(inside) > 20  # else it is the edge of a neighbour
            cells += [int(inside.mode().values) if shown else 0, int(len(inside) > 100)]
    return bytes(cells)


def test_the_command_writes_it_as_jpeg(tmp_path: Path) -> None:
    flags = ["--size", "5", "--image-size", "32", "--image-format", "jpeg", "--out", str(tmp_path / "set")]
    done = CliRunner().invoke(app, ["data", "shapes", "--task", "segmentation", *flags])
    assert done.exit_code == 0, done.output
    assert "5 training" in done.output
    records = SegmentationDataset(tmp_path / "set" / FOLDER, "training", lambda *pair: pair, len(CLASSES))
    assert len(records) == 5
    assert tvf.get_size(records[0]["image"]) == [32, 32]
