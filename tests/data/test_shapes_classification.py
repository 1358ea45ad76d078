"""Generated images in ImageNet's layout: what most shapes are names the class, and no image is in two splits."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from data.test_shapes_sets import digests
from pixels import components, seen
from upop.cli.app import app
from upop.data.classification import ImageFolderDataset, class_names
from upop.data.classification_transforms import eval_transform
from upop.demo import Summary, write_shapes
from upop.demo.draw import COLOUR_VALUES
from upop.errors import SettingError
from upop.preparation import Images

SIZE = 36
SIDE = 128


@pytest.fixture(scope="module")
def summary(tmp_path_factory: pytest.TempPathFactory) -> Summary:
    return write_shapes("classification", tmp_path_factory.mktemp("set") / "set", seed=4, size=SIZE, image_size=SIDE)


def images(summary: Summary, split: str) -> list[Path]:
    return sorted((summary.folder / split).glob("*/*.png"))


def test_the_layout_is_that_of_imagenet(summary: Summary) -> None:
    assert summary.settings == {"data_path": str(summary.folder)}
    assert summary.records == {"train": SIZE, "val": 120, "test": 120}
    assert len(class_names(summary.folder)) == 12
    for split, count in summary.records.items():
        assert len(images(summary, split)) == count
        records = ImageFolderDataset(summary.folder, split, eval_transform(48, Images(resize="crop")), training=False)
        assert set(Counter(records[number]["label"] for number in range(count)).values()) == {count // 12}


def test_the_class_is_what_most_shapes_are(summary: Summary) -> None:
    """Read from the pixels."""
    for path in images(summary, "val")[::3]:
        with Image.open(path) as image:
            shapes = seen(image.convert("RGB"))
        assert 5 <= len(shapes) <= 9
        said = []
        for looks in (Counter(shape.colour for shape in shapes), Counter(shape.kind for shape in shapes)):
            (most, count), *others = looks.most_common()
            assert all(count > other for _, other in others)
            said.append(most)
        assert path.parent.name == "-".join(said)


def cells(path: Path) -> frozenset[tuple[str, int, int]]:
    """Colours and their thirds of the image, or of its mirror image, whichever is less."""
    with Image.open(path) as image:
        pixels = torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8).view(SIDE, SIDE, 3)
    found = []
    for name, colour in COLOUR_VALUES.items():
        for area in components(pixels, colour):
            row, column = (3 * sum(place[axis] for place in area) // len(area) // SIDE for axis in (0, 1))
            found.append((name, row, column))
    mirrored = [(name, row, 2 - column) for name, row, column in found]
    return frozenset(min(sorted(found), sorted(mirrored)))


def test_no_image_is_in_two_splits_not_even_mirrored(summary: Summary) -> None:
    train, val, test = ({cells(path) for path in images(summary, split)} for split in summary.records)
    assert not train & val
    assert not train & test
    assert not val & test


def test_same_bytes_and_a_smaller_set_is_the_beginning_of_a_larger_one(summary: Summary, tmp_path: Path) -> None:
    small = write_shapes("classification", tmp_path / "small", seed=4, size=13, image_size=SIDE)
    found = {name: digest for name, digest in digests(small.folder).items() if name != "shapes.json"}
    assert len(found) == small.images == 13 + 120 + 120
    assert found.items() <= digests(summary.folder).items()
    other = write_shapes("classification", tmp_path / "other", seed=5, size=13, image_size=SIDE)
    assert not set(found.values()) & set(digests(other.folder).values())


def test_the_command_writes_it(tmp_path: Path) -> None:
    done = CliRunner().invoke(
        app, ["data", "shapes", "--task", "classification", "--out", str(tmp_path / "set"), "--size", "12"]
    )
    assert done.exit_code == 0, done.output
    assert "12 train, 120 val, 120 test" in " ".join(done.output.split())


def test_every_class_needs_an_image(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="at least 12, one image per class, not 11"):
        write_shapes("classification", tmp_path / "set", seed=1, size=11)
    assert not (tmp_path / "set").exists()
