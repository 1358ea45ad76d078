"""ADE20K's images and label maps: what is read, how crops are made, and what each damaged file says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as tvf

from upop.data.segmentation import NAMES, SegmentationDataset, class_names, collate_segments
from upop.data.segmentation_transforms import (
    IGNORED,
    LARGEST_SHARE,
    STATISTICS,
    Normalise,
    TrainCrop,
    photometric_jitter,
    saturate,
    scaled_size,
    turn_hue,
)
from upop.errors import DataError

CLASSES = 5


def save_map(path: Path, labels: Tensor) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    tvf.to_pil_image(labels.to(torch.uint8)[None]).save(path)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three training images of other sizes, with labels 0 to 5."""
    for number, (height, width) in enumerate([(20, 30), (33, 24), (16, 16)]):
        generator = torch.Generator().manual_seed(number)
        image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)
        path = tmp_path / "images" / "training" / f"ADE_train_{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        tvf.to_pil_image(image).save(path)
        labels = torch.arange(height * width).view(height, width) % (CLASSES + 1)
        save_map(tmp_path / "annotations" / "training" / path.name, labels)
    return tmp_path


def dataset(
    root: Path, transform: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
) -> SegmentationDataset:
    return SegmentationDataset(root, "training", transform or Normalise(), CLASSES)


def test_label_0_is_no_class_and_others_begin_at_0(root: Path) -> None:
    samples = dataset(root)
    assert [samples[number]["name"] for number in range(len(samples))] == [f"ADE_train_{n}" for n in range(3)]
    sample = samples[1]
    assert sample["image"].shape == (3, 33, 24)
    given = torch.arange(33 * 24).view(33, 24) % (CLASSES + 1)
    assert torch.equal(sample["labels"], torch.where(given == 0, IGNORED, given - 1))
    assert sample["labels"].dtype == torch.long


def test_a_sample_again_is_the_same_image(root: Path) -> None:
    samples = dataset(root)
    assert samples[4]["number"] == 1
    assert torch.equal(samples[4]["labels"], samples[1]["labels"])


@pytest.mark.parametrize("mode", ["L", "P", "I;16"])
def test_maps_of_numbers_in_any_depth(root: Path, mode: str) -> None:
    labels = Image.new("L", (30, 20), 3)
    if mode == "P":
        labels = Image.new("P", (30, 20), 3)
        labels.putpalette([9, 9, 9] * 256)
    elif mode != "L":
        labels = Image.fromarray(tvf.pil_to_tensor(labels)[0].to(torch.int32).numpy()).convert(mode)
    labels.save(root / "annotations" / "training" / "ADE_train_0.png")
    assert set(dataset(root)[0]["labels"].unique().tolist()) == {2}


def test_label_255_is_no_class_too(root: Path) -> None:
    save_map(root / "annotations" / "training" / "ADE_train_0.png", torch.full((20, 30), 255))
    assert set(dataset(root)[0]["labels"].unique().tolist()) == {IGNORED}


def _break(path: str, change: Callable[[Path], object]) -> Callable[[Path], None]:
    def harm(root: Path) -> None:
        change(root / path)

    return harm


MAP = "annotations/training/ADE_train_1.png"
AT_START: list[tuple[str, Callable[[Path], None], str]] = [
    ("no map", _break(MAP, Path.unlink), r"ADE_train_1\.png has no label map .*annotations/training/ADE_train_1\.png"),
    (
        "no folder",
        _break("images/training", lambda path: path.rename(path.with_name("trainnig"))),
        r"did you mean 'trainnig'",
    ),
    ("no root", _break("", lambda path: path.rename(path.with_name("elsewhere"))), r"No such file.*DATASET"),
    ("empty", _break("images/training", lambda path: [each.unlink() for each in path.iterdir()]), "holds no images"),
    ("twice", _break("images/training/ADE_train_1.jpg", lambda path: path.write_bytes(b"")), "names twice"),
]
ON_ACCESS: list[tuple[str, Callable[[Path], None], str]] = [
    (
        "label",
        _break(MAP, lambda path: save_map(path, torch.full((33, 24), 6))),
        r"ADE_train_1\.png holds label 6, but classes is 5",
    ),
    (
        "size",
        _break(MAP, lambda path: save_map(path, torch.ones(32, 24))),
        r"24 x 32 pixels, and its image .*ADE_train_1\.png 24 x 33",
    ),
    (
        "colours",
        _break(MAP, lambda path: Image.new("RGB", (24, 33)).save(path)),
        r"ADE_train_1\.png must hold one number per pixel.*RGB",
    ),
    (
        "cut map",
        _break(MAP, lambda path: path.write_bytes(path.read_bytes()[:60])),
        r"label map .*ADE_train_1\.png cannot be read",
    ),
    (
        "no image",
        _break("images/training/ADE_train_1.png", lambda path: path.write_text("hello")),
        r"ADE_train_1\.png cannot be read",
    ),
]


@pytest.mark.parametrize(("harm", "says"), [case[1:] for case in AT_START], ids=[case[0] for case in AT_START])
def test_what_is_missing_is_said_at_the_start(root: Path, harm: Callable[[Path], None], says: str) -> None:
    harm(root)
    with pytest.raises(DataError, match=says):
        dataset(root)


@pytest.mark.parametrize(("harm", "says"), [case[1:] for case in ON_ACCESS], ids=[case[0] for case in ON_ACCESS])
def test_a_damaged_file_is_named(root: Path, harm: Callable[[Path], None], says: str) -> None:
    harm(root)
    samples = dataset(root)
    assert samples[0]["number"] == 0
    with pytest.raises(DataError, match=says):
        samples[1]


def test_names_of_classes(root: Path) -> None:
    assert class_names(root, 2) == ["class 1", "class 2"]
    (root / NAMES).write_text("Idx\tRatio\tTrain\tVal\tStuff\tName\n1\t0.5\t1\t1\t1\twall\n2\t0.1\t1\t1\t1\tsky, the\n")
    assert class_names(root, 2) == ["wall", "sky, the"]
    with pytest.raises(DataError, match=r"names 2 classes, and classes is 3"):
        class_names(root, 3)
    (root / NAMES).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match=r"objectInfo150\.txt cannot be read"):
        class_names(root, 3)


def test_images_of_other_sizes_come_as_lists(root: Path) -> None:
    samples = dataset(root)
    batch = collate_segments([samples[0], samples[1]])
    assert [tuple(image.shape) for image in batch["images"]] == [(3, 20, 30), (3, 33, 24)]
    assert batch["names"] == ["ADE_train_0", "ADE_train_1"]
    crops = dataset(root, TrainCrop(24, 16))
    stacked = collate_segments([crops[number] for number in range(3)])
    assert isinstance(stacked["images"], Tensor)
    assert stacked["images"].shape == (3, 3, 16, 16)
    assert stacked["labels"].shape == (3, 16, 16)
    assert stacked["numbers"].tolist() == [0, 1, 2]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(9, 70), st.integers(9, 70), st.integers(8, 40))
def test_crops_keep_image_and_map_aligned(seed: int, height: int, width: int, side: int) -> None:
    """An image that is bright exactly where its label is 1 stays so, whatever is drawn."""
    torch.manual_seed(seed)
    labels = torch.zeros(height, width, dtype=torch.long)
    top, left = int(torch.randint(height, ())), int(torch.randint(width, ()))
    labels[top:, left:] = 1
    image = (labels * 200 + 25).to(torch.uint8).expand(3, -1, -1)
    crop, cropped = TrainCrop(32, side)(image, labels)
    assert crop.shape == (3, side, side)
    assert cropped.shape == (side, side)
    assert set(cropped.unique().tolist()) <= {0, 1, IGNORED}
    assert bool((crop[:, cropped == IGNORED] == 0).all())  # filled up with the mean colour
    bright, dark = crop[0][cropped == 1], crop[0][cropped == 0]
    if len(bright) and len(dark):
        middle = (bright.max() + dark.min()) / 2
        # Pixels on the edge are mixed.
        wrong = int((bright < middle).sum() + (dark > middle).sum())
        assert wrong <= 4 * side


def test_crops_look_for_places_with_more_than_one_class() -> None:
    labels = torch.zeros(64, 64, dtype=torch.long)
    labels[:, 40:] = 1
    image = torch.zeros(3, 64, 64, dtype=torch.uint8)
    transform = TrainCrop(64, 16)
    torch.manual_seed(0)
    shares = []
    for _ in range(60):
        counts = transform(image, labels)[1].unique(return_counts=True)[1].float()
        shares.append(float(counts.max() / counts.sum()))
    # Of all places of such a crop, about one in six has both classes in these shares.
    assert sum(share < LARGEST_SHARE for share in shares) > 30


def test_without_augmentation_a_crop_is_the_image() -> None:
    image = torch.randint(0, 256, (3, 24, 24), dtype=torch.uint8)
    labels = torch.randint(0, 3, (24, 24))
    for seed in range(3):
        torch.manual_seed(seed)
        crop, same = TrainCrop(24, 24, augment=False)(image, labels)
        assert torch.equal(same, labels)
        assert torch.equal(Normalise().undo(crop), image)


def test_crops_vary_in_size_and_side() -> None:
    torch.manual_seed(0)
    image = torch.zeros(3, 40, 40, dtype=torch.uint8)
    labels = torch.arange(1600).view(40, 40) % 200
    drawn = {TrainCrop(40, 20)(image, labels)[1].numpy().tobytes() for _ in range(12)}
    assert len(drawn) == 12


@pytest.mark.parametrize(("name", "grey"), [("vit", 0.0), ("deit", (0.5 - 0.485) / 0.229)])
def test_normalisations(name, grey: float) -> None:
    image = torch.tensor([0, 128, 255], dtype=torch.uint8).view(3, 1, 1)
    normalised, _ = Normalise(STATISTICS[name])(image, torch.zeros(1, 1))
    again = Normalise(STATISTICS[name]).undo(normalised)
    assert torch.equal(again, image)
    middle, _ = Normalise(STATISTICS[name])(torch.full((3, 1, 1), 128, dtype=torch.uint8), torch.zeros(1, 1))
    assert float(middle[0]) == pytest.approx(grey, abs=0.01)


def test_jitter_changes_light_and_nothing_else() -> None:
    torch.manual_seed(0)
    image = torch.randint(0, 256, (3, 12, 12), dtype=torch.uint8)
    grey = image[:1].expand(3, -1, -1)
    drawn = [photometric_jitter(image) for _ in range(40)]
    assert len({one.numpy().tobytes() for one in drawn}) > 30
    assert all(one.shape == image.shape and one.dtype == torch.uint8 for one in drawn)
    assert any(torch.equal(one, image) for one in drawn)  # no operation at all: one draw in 16
    for _ in range(20):  # grey has neither hue nor saturation
        one = photometric_jitter(grey)
        assert int((one.int() - one[:1].int()).abs().max()) <= 1


def test_saturation_leaves_the_brightest_channel() -> None:
    image = torch.rand(3, 6, 6)
    for factor in (0.5, 1.0, 1.5, 50.0):
        found = saturate(image, factor)
        assert float(found.min()) >= -1e-6
        torch.testing.assert_close(found.amax(0), image.amax(0))
    torch.testing.assert_close(saturate(image, 1.0), image)
    torch.testing.assert_close(saturate(image, 0.0), image.amax(0).expand(3, -1, -1))


@pytest.mark.parametrize(
    ("size", "short", "expected"),
    [
        ((512, 683), 512, (512, 683)),
        ((1000, 500), 512, (1024, 512)),
        ((100, 1000), 512, (205, 2048)),
        ((3, 9), 1, (1, 3)),
    ],
)
def test_sizes_keep_proportions_and_bound_long_sides(
    size: tuple[int, int], short: int, expected: tuple[int, int]
) -> None:
    assert scaled_size(*size, short) == expected


@pytest.mark.parametrize("share", [-0.5, -0.1, 0.0, 0.07, 0.4])
def test_hue_is_turned_as_torchvision_does(share: float) -> None:
    image = torch.rand(3, 40, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    image[:, :5] = image[:1, :5]  # grey
    image[:, 5] = 0
    for row, order in enumerate([(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)]):
        image[:, 6 + row] = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)[list(order)].view(3, 1)
    torch.testing.assert_close(turn_hue(image, share), tvf.adjust_hue(image, share), atol=1e-6, rtol=0)
