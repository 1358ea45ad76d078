"""Which files are images, where they may lie, and what is never opened."""

from __future__ import annotations

import io
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from upop.data import images
from upop.data.caption import CaptionEvalDataset, CaptionTrainDataset
from upop.data.classification import ImageFolderDataset
from upop.data.images import ENDINGS, Bounds, list_images, open_image
from upop.data.nlvr import NlvrDataset
from upop.data.retrieval import RetrievalGallery, RetrievalPairs
from upop.data.segmentation import SegmentationDataset
from upop.data.vqa import VqaDataset, VqaTrainingDataset
from upop.errors import BadImageError, DataError
from upop.tasks import TASKS, find_task

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"


def write_image(path: Path, form: str | None = None, mode: str = "RGB", size: tuple[int, int] = (8, 6)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size).save(path, form)
    return path


def opened(path: Path) -> Image.Image:
    return open_image(path, file=Path("list.json"), number=3)


def reason(path: Path) -> str:
    with pytest.raises(BadImageError) as caught:
        opened(path)
    assert str(path) in str(caught.value) and "sample 3" in str(caught.value)
    return caught.value.reason


@pytest.mark.parametrize("form", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000"])
def test_the_content_tells_the_kind_and_not_the_name(tmp_path: Path, form: str) -> None:
    assert opened(write_image(tmp_path / "a.eps", form)).size == (8, 6)


@pytest.mark.parametrize("form", ["ICO", "PCX", "TGA", "SGI", "DDS", "PDF"])
def test_other_kinds_are_refused_whatever_they_are_called(tmp_path: Path, form: str) -> None:
    assert "not an image in a supported format (JPEG, PNG" in reason(write_image(tmp_path / "a.jpg", form))


def test_no_other_program_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def started(*arguments: Any, **_options: Any) -> None:
        raise AssertionError(f"{arguments} was started")

    monkeypatch.setattr(subprocess, "check_call", started)
    monkeypatch.setattr(subprocess, "Popen", started)
    for name in ("a.eps", "a.jpg", "a.png"):
        (tmp_path / name).write_bytes(EPS)
        assert "not an image in a supported format" in reason(tmp_path / name)


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "zero.jpg").symlink_to("/dev/zero")
    assert reason(tmp_path / "pipe.jpg") == "it is a named pipe, not a file"
    assert "folder" in reason(tmp_path / "folder.jpg") or "directory" in reason(tmp_path / "folder.jpg")
    assert reason(tmp_path / "zero.jpg") == "it is a device, not a file"


def test_sizes_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "one side is over 1000 times the other" in reason(write_image(tmp_path / "a.png", size=(1, 1001)))
    assert opened(write_image(tmp_path / "b.png", size=(1000, 1))).size == (1000, 1)
    monkeypatch.setattr(images, "MOST_PIXELS", 47)
    assert reason(write_image(tmp_path / "c.png")) == "it has 8 x 6 pixels, and the limit is 47 in all"
    monkeypatch.setattr(images, "_MOST_BYTES", 10)
    assert "and the limit is 10" in reason(tmp_path / "b.png")


def test_a_image_that_claims_much_is_refused_before_its_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a program took Pillow's own bound away."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    buffer = io.BytesIO()
    Image.new("1", (30_000, 30_000)).save(buffer, "PNG")
    (tmp_path / "a.png").write_bytes(buffer.getvalue())
    assert "30,000 x 30,000 pixels" in reason(tmp_path / "a.png")


NOWHERE = Path("nowhere.json")
ROW = {
    "sentence": "a dog",
    "label": "True",
    "caption": "a dog",
    "image_id": "1",
    "question": "a dog?",
    "answer": ["yes"] * 10,
    "question_id": 1,
    "dataset": "vqa",
}
READERS: dict[str, Callable[[Path, Path, bool], Any]] = {
    "nlvr": lambda file, root, out: NlvrDataset(file, root, np.asarray, swap=False, outside=out),  # type: ignore[arg-type]
    "captions": lambda file, root, out: CaptionTrainDataset(file, root, np.asarray, prompt="", outside=out),  # type: ignore[arg-type]
    "to caption": lambda file, root, out: CaptionEvalDataset(file, root, np.asarray, NOWHERE, outside=out),  # type: ignore[arg-type]
    "pairs": lambda file, root, out: RetrievalPairs(file, root, np.asarray, outside=out),  # type: ignore[arg-type]
    "gallery": lambda file, root, out: RetrievalGallery(file, root, np.asarray, outside=out),  # type: ignore[arg-type]
    "answers": lambda file, root, out: VqaTrainingDataset([file], {"vqa": root, "vg": root}, np.asarray, outside=out),  # type: ignore[arg-type]
    "questions": lambda file, root, out: VqaDataset(file, {"vqa": root, "vg": root}, np.asarray, outside=out),  # type: ignore[arg-type]
}


def annotated(folder: Path, reader: str, image: str) -> Path:
    listed = reader in ("to caption", "gallery")
    row = {**ROW, "image": image, "images": ["in/1.png", image], "caption": ["a dog"] if listed else "a dog"}
    first = {**row, "image": "in/9.png", "images": ["in/9.png", "in/9.png"], "question_id": 0}
    (folder / "list.json").write_text(json.dumps([first, row]))
    return folder / "list.json"


OUTSIDE = ("../2.png", "in/../../2.png", "{}/2.png", "4.png", "away/3.png", "hub/2.png", "/2.png")
INSIDE = ("here/1.png", "5.png", "in/../in/1.png", "{}/pictures/in/1.png", "hub/pictures/5.png")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder of images, one beside it, and links that leave it."""
    write_image(tmp_path / "pictures" / "in" / "1.png")
    write_image(tmp_path / "pictures" / "in" / "9.png")
    write_image(tmp_path / "2.png")
    write_image(tmp_path / "else" / "3.png")
    folder = tmp_path / "pictures"
    (folder / "4.png").symlink_to(tmp_path / "2.png")
    (folder / "away").symlink_to(tmp_path / "else")
    (folder / "here").symlink_to("in")
    (folder / "5.png").symlink_to("in/1.png")
    (folder / "hub").symlink_to("..")
    return folder


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    "image", ["../2.png", "in/../../2.png", "{}/2.png", "4.png", "away/3.png", "hub/2.png", "/2.png"]
)
def test_images_outside_of_their_folder_are_refused_by_row(tmp_path: Path, root: Path, reader: str, image: str) -> None:
    image = image.format(tmp_path)
    file = annotated(tmp_path, reader, image)
    with pytest.raises(DataError) as caught:
        READERS[reader](file, root, False)
    described = str(caught.value)
    assert described.startswith(f"{file}, sample 1: the image '{image}' ")
    assert f"outside of the image root {root}" in described and "--allow-outside" in described
    if Path(root / image).exists():
        assert len(READERS[reader](file, root, True)) == 2


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    "image", ["here/1.png", "5.png", "in/../in/1.png", "{}/pictures/in/1.png", "hub/pictures/5.png"]
)
def test_whatever_leads_to_an_image_inside_is_taken(tmp_path: Path, root: Path, reader: str, image: str) -> None:
    (tmp_path / "link").symlink_to(root)
    image = image.format(tmp_path)
    for folder in (root, tmp_path / "link", Path(os.path.relpath(root))):
        assert len(READERS[reader](annotated(tmp_path, reader, image), folder, False)) == 2


def test_what_is_no_file_is_told_at_the_start(tmp_path: Path, root: Path) -> None:
    os.mkfifo(root / "pipe1.png")
    for image in ("pipe1.png", "in", "."):
        with pytest.raises(DataError, match="is not a file under the image root"):
            READERS["nlvr"](annotated(tmp_path, "nlvr", image), root, False)


def classes(folder: Path) -> Path:
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            write_image(folder / split / name / "1.jpg")
    return folder


def listed(folder: Path, **options: Any) -> ImageFolderDataset:
    return ImageFolderDataset(folder, "train", np.asarray, training=False, **options)  # type: ignore[arg-type]


def test_images_of_all_common_endings_are_read(tmp_path: Path) -> None:
    folder = classes(tmp_path)
    for ending in ENDINGS:
        write_image(folder / "train" / "cat" / f"b{ending}", "PNG")
        write_image(folder / "train" / "cat" / f"c{ending.upper()}", "PNG")
    samples = listed(folder)
    assert len(samples) == 2 + 2 * len(ENDINGS)
    assert [samples[number]["label"] for number in range(len(samples))] == [0] * (len(samples) - 1) + [1]
    assert not samples.notes


def test_hidden_files_and_folders_are_no_data_at_any_depth(tmp_path: Path) -> None:
    folder = classes(tmp_path)
    for name in ("._1.jpg", ".ipynb_checkpoints/1-checkpoint.jpg", "more/.hidden/2.jpg", ".DS_Store.png"):
        write_image(folder / "train" / "cat" / name)
    write_image(folder / "train" / ".cache" / "1.jpg")
    write_image(folder / "train" / "cat" / "more" / "3.jpg")
    samples = listed(folder)
    assert samples.names == ["cat", "dog"]
    assert len(samples) == 3
    assert not samples.notes


def test_files_that_are_left_out_are_counted_and_said(tmp_path: Path) -> None:
    folder = classes(tmp_path)
    for name in ("cat/a.txt", "cat/b.TXT", "dog/more/Thumbs.db", "dog/README"):
        write_image(folder / "train" / name, "PNG")
    write_image(folder / "train" / "3.jpg")
    beside, others = listed(folder).notes
    assert "1 images outside of class folders" in beside and "train/3.jpg" in beside
    assert "4 files" in others and ".txt (1)" in others and "no extension (1)" in others and "cat/a.txt" in others


def test_links_between_folders_end(tmp_path: Path) -> None:
    folder = classes(tmp_path)
    (folder / "train" / "cat" / "again").symlink_to(".")
    (folder / "train" / "cat" / "up").symlink_to("..")
    assert len(listed(folder)) == 2 + 1  # the dog is below the cat, too


def test_links_of_class_folders_stay_inside(tmp_path: Path) -> None:
    folder = classes(tmp_path / "data")
    elsewhere = write_image(tmp_path / "else" / "2.jpg")
    (folder / "train" / "cat" / "2.jpg").symlink_to(elsewhere)
    with pytest.raises(DataError, match=r"train/cat/2\.jpg is a link to .*else/2\.jpg, outside"):
        listed(folder)
    assert len(listed(folder, outside=True)) == 3
    (folder / "train" / "cat" / "2.jpg").unlink()
    (folder / "train" / "emu").symlink_to(elsewhere.parent)
    (folder / "val" / "emu").mkdir()
    with pytest.raises(DataError, match="train/emu is a link to"):
        listed(folder)
    assert len(listed(folder, outside=True)) == 3


def test_label_maps_are_the_files_that_were_found(tmp_path: Path) -> None:
    for number, (one, other) in enumerate([("jpg", "PNG"), ("JPEG", "png"), ("gif", "Png"), ("jfif", "png")]):
        write_image(tmp_path / "images" / "training" / f"{number}.{one}", "PNG")
        write_image(tmp_path / "annotations" / "training" / f"{number}.{other}", "PNG", "L")
    write_image(tmp_path / "images" / "training" / "._0.jpg")
    write_image(tmp_path / "annotations" / "training" / ".ipynb_checkpoints" / "0.png")
    (tmp_path / "images" / "training" / "list.txt").write_text("")
    samples = SegmentationDataset(tmp_path, "training", lambda *both: both, 3)
    assert [samples[number]["labels"].unique().tolist() for number in range(len(samples))] == [[255]] * 4
    assert len(samples.notes) == 1 and "list.txt" in samples.notes[0]
    write_image(tmp_path / "annotations" / "training" / "0.png", "PNG", "L")
    with pytest.raises(DataError, match="holds 1 names twice"):
        SegmentationDataset(tmp_path, "training", lambda *both: both, 3)


def test_a_label_map_that_is_a_pipe_is_refused(tmp_path: Path) -> None:
    write_image(tmp_path / "images" / "training" / "1.jpg")
    (tmp_path / "annotations" / "training").mkdir(parents=True)
    os.mkfifo(tmp_path / "annotations" / "training" / "1.png")
    samples = SegmentationDataset(tmp_path, "training", lambda *both: both, 3)
    with pytest.raises(BadImageError, match="a named pipe, not a file"):
        samples[0]


def test_a_listing_is_in_the_order_of_names(tmp_path: Path) -> None:
    names = ["b/2.png", "b/10.png", "a.png", "b/c/1.png", "B/1.png"]
    for name in names:
        write_image(tmp_path / name)
    found = list_images(tmp_path, Bounds(tmp_path, outside=False)).images
    assert [str(Path(path).relative_to(tmp_path)) for path in found] == [
        "a.png",
        "B/1.png",
        "b/10.png",
        "b/2.png",
        "b/c/1.png",
    ]


@pytest.mark.parametrize("task", TASKS)
def test_every_task_has_the_setting(task: str) -> None:
    assert find_task(task).settings.model_fields["allow_outside"].default is False
