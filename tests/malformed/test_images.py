"""Every broken image and label map ends in an error that names file and sample; odd images show their pixels."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms.v2.functional import pil_to_tensor

from malformed import images as table
from upop.data import classification_transforms, transforms
from upop.data.classification import ImageFolderDataset
from upop.data.images import open_image
from upop.data.nlvr import NlvrDataset
from upop.data.segmentation import SegmentationDataset
from upop.data.segmentation_transforms import IGNORED, TrainCrop
from upop.errors import BadImageError, DataError

CLASSES = 3


def nlvr(folder: Path) -> tuple[Any, Path]:
    for name in ("0.png", "1.png"):
        (folder / name).write_bytes(table.PNG)
    sample = {"sentence": "a dog", "label": "True", "images": ["0.png", "1.png"]}
    (folder / "nlvr.json").write_text(json.dumps([sample]))
    return NlvrDataset(folder / "nlvr.json", folder, np.asarray, swap=False), folder / "1.png"  # type: ignore[arg-type]


def classification(folder: Path) -> tuple[Any, Path]:
    for name in ("a", "b"):
        (folder / "train" / name).mkdir(parents=True)
        (folder / "train" / name / "0.jpg").write_bytes(table.PNG)
    return ImageFolderDataset(folder, "train", np.asarray, training=False), folder / "train" / "a" / "0.jpg"  # type: ignore[arg-type]


def segmentation(folder: Path, *, maps: bool = False) -> tuple[Any, Path]:
    for kind in ("images", "annotations"):
        (folder / kind / "training").mkdir(parents=True)
        Image.new("L", (table.WIDTH, table.HEIGHT), 1).save(folder / kind / "training" / "0.png")
    samples = SegmentationDataset(folder, "training", lambda *both: both, CLASSES)
    return samples, folder / ("annotations" if maps else "images") / "training" / "0.png"


READERS: dict[str, Callable[[Path], tuple[Any, Path]]] = {
    "nlvr": nlvr,
    "classification": classification,
    "segmentation": segmentation,
    "label map": lambda folder: segmentation(folder, maps=True),
}


def refused(samples: Any, path: Path) -> None:
    with pytest.raises(BadImageError) as caught:
        samples[0]
    error = caught.value
    text = str(error)
    assert path.name in text and error.image == str(path)
    assert "sample 0" in text or "label map" in text
    assert error.sample == 0
    assert error.reason and error.reason in text
    assert "again" in text  # what to do


@pytest.mark.parametrize("reader", [name for name in READERS if name != "label map"])
@pytest.mark.parametrize("what", table.BROKEN)
def test_broken_images(tmp_path: Path, reader: str, what: str) -> None:
    samples, path = READERS[reader](tmp_path)
    path.write_bytes(table.BROKEN[what])
    refused(samples, path)


@pytest.mark.parametrize("what", [what for what in table.BROKEN if not what.startswith("numbers")])
def test_broken_label_maps(tmp_path: Path, what: str) -> None:
    samples, path = READERS["label map"](tmp_path)
    path.write_bytes(table.BROKEN[what])
    refused(samples, path)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("what", table.PLACES)
def test_gone_since(tmp_path: Path, reader: str, what: str) -> None:
    samples, path = READERS[reader](tmp_path)
    table.PLACES[what](path)
    refused(samples, path)


@pytest.mark.filterwarnings("ignore:.*EXIF:UserWarning")  # Pillow's, of the notes alone
@pytest.mark.parametrize("what", table.ODD)
def test_odd_images_show_their_pixels(tmp_path: Path, what: str) -> None:
    content, wanted, tolerance = table.ODD[what]
    (tmp_path / "picture.png").write_bytes(content)
    found = open_image(tmp_path / "picture.png", file=tmp_path, number=0)
    assert found.mode == "RGB"
    pixels = np.asarray(found).astype(int)
    assert pixels.shape == wanted.shape
    assert np.abs(pixels - wanted).max() <= tolerance


@pytest.mark.parametrize("what", ["1 x 1", "1 x 400"])
def test_images_of_any_size_are_trained_on(tmp_path: Path, what: str) -> None:
    (tmp_path / "picture.png").write_bytes(table.ODD[what][0])
    found = open_image(tmp_path / "picture.png", file=tmp_path, number=0)
    for transform in (
        transforms.train_transform(16),
        transforms.eval_transform(16),
        classification_transforms.train_transform(16, classification_transforms.Augmentation()),
        classification_transforms.eval_transform(16),
    ):
        for _ in range(50):  # some draw
            assert transform(found).shape == (3, 16, 16)
    labels = torch.zeros(found.height, found.width, dtype=torch.long)
    image, labels = TrainCrop(16, 16)(pil_to_tensor(found), labels)
    assert image.shape == (3, 16, 16) and labels.shape == (16, 16)


def test_label_maps_lie_over_the_stored_pixels(tmp_path: Path) -> None:
    """A camera's orientation turns no image that has a label map."""
    samples, path = segmentation(tmp_path)
    exif = Image.Exif()
    exif[0x0112] = 6
    table.image().save(path, exif=exif)
    assert (samples[0]["image"].permute(1, 2, 0).numpy() == table.PIXELS).all()


@pytest.mark.parametrize("what", table.MAPS)
def test_wrong_label_maps(tmp_path: Path, what: str) -> None:
    samples, path = segmentation(tmp_path, maps=True)
    path.unlink()
    table.MAPS[what]().save(path)
    with pytest.raises(DataError) as caught:
        samples[0]
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("mode", ["L", "P", "I;16", "I"])
def test_label_maps_of_all_kinds_of_numbers(tmp_path: Path, mode: str) -> None:
    samples, path = segmentation(tmp_path, maps=True)
    labels = np.arange(table.WIDTH * table.HEIGHT).reshape(table.HEIGHT, table.WIDTH) % (CLASSES + 1)
    kind = {"I;16": np.uint16, "I": np.int32}.get(mode, np.uint8)
    found = Image.fromarray(labels.astype(kind))
    if mode == "P":
        found.putpalette([*range(256)] * 3)
    path.unlink()
    found.save(path, "TIFF" if mode == "I" else "PNG")
    wanted = np.where(labels == 0, IGNORED, labels - 1)
    assert (samples[0]["labels"].numpy() == wanted).all()


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_file_that_was_cut_is_refused_or_whole(tmp_path: Path, data: st.DataObject) -> None:
    """What is lost may be no part of the image: then all its pixels are there."""
    whole = data.draw(st.sampled_from([table.PNG, table.JPEG, table.GIF, table.WEBP, table.TIFF, table.BMP]))
    path = tmp_path / "picture.png"
    path.write_bytes(whole)
    wanted = np.asarray(open_image(path, file=tmp_path, number=3))
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    try:
        found = np.asarray(open_image(path, file=tmp_path, number=3))
    except BadImageError as error:
        assert "sample 3" in str(error)
    else:
        assert (found == wanted).all()


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_bytes_are_refused_or_an_image(tmp_path: Path, data: st.DataObject) -> None:
    content = bytearray(data.draw(st.sampled_from([table.PNG, table.JPEG, table.GIF, table.WEBP, table.TIFF])))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "picture.jpg"
    path.write_bytes(bytes(content))
    try:
        found = open_image(path, file=tmp_path, number=3)
    except BadImageError as error:
        assert "sample 3" in str(error)
    else:
        assert found.mode == "RGB"
