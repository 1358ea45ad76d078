"""ImageNet's folders as they are read: labels, what is wrong with them, repeated samples, and mixed batches."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from upop.data.classification import ImageCollator, ImageFolderDataset, RepeatedSampler, class_names
from upop.data.classification_transforms import Augmentation, Mixing, eval_transform, train_transform
from upop.errors import DataError, SettingError
from upop.runs.loaders import SeededDataset

CLASSES = ("ape", "bee", "cat")
SIZE = 16


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three classes of 5 images to train on and 2 to evaluate, with endings as ImageNet has them."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 5), ("val", 2)):
        for name in CLASSES:
            for number in range(count):
                path = tmp_path / split / name / f"{name}_{number}.JPEG"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(generator.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(path)
    return tmp_path


def read(root: Path, split: str = "val", **more: Any) -> ImageFolderDataset:
    return ImageFolderDataset(root, split, eval_transform(SIZE), training=split == "train", **more)


def test_labels_are_the_places_of_folders_by_name(root: Path) -> None:
    (root / "val" / "notes.txt").write_text("no class")
    (root / "train" / ".cache").mkdir()
    (root / "train" / "bee" / "list.txt").write_text("no image")
    (root / "train" / "cat" / "more").mkdir()
    (root / "train" / "cat" / "cat_0.JPEG").rename(root / "train" / "cat" / "more" / "cat_0.JPEG")
    assert class_names(root) == list(CLASSES)
    samples = read(root, "train")
    assert Counter(samples[number]["label"] for number in range(len(samples))) == {0: 5, 1: 5, 2: 5}
    item = read(root)[5]
    assert item["label"] == 2
    assert item["image"].shape == (3, SIZE, SIZE)
    assert "draw" not in item


def test_evaluation_sees_the_middle_of_an_image(tmp_path: Path) -> None:
    image = Image.new("RGB", (64, 32), (255, 255, 255))
    image.paste((0, 0, 0), (30, 14, 34, 18))
    seen = eval_transform(28)(image)
    assert seen.shape == (3, 28, 28)
    dark = (seen < 0).all(0).nonzero()
    assert dark.min(0).values.tolist() == [12, 12]
    assert dark.max(0).values.tolist() == [15, 15]
    white = (1 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(seen[:, 0, 0], white)


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda root: (root / "val" / "cat" / "cat_0.JPEG").unlink(), None),
        (lambda root: [path.unlink() for path in (root / "val" / "cat").iterdir()], r"val/cat holds no image"),
        (lambda root: (root / "val" / "bee").rename(root / "val" / "bea"), r"lacks bee .* adds bea"),
        (lambda root: (root / "val" / "dog").mkdir(), r"val are not those of .*train: it adds dog \(1 in all\)"),
        (lambda root: (root / "val").rename(root / "valid"), r"val cannot be read \(did you mean 'valid'\?\)"),
        (
            lambda root: [path.rename(root / path.name) for path in (root / "val").iterdir()],
            "but no class folders",
        ),
    ],
    ids=["one less", "empty class", "renamed", "one more", "no split", "no classes"],
)
def test_folders_that_are_wrong_are_named(root: Path, harm: Any, said: str | None) -> None:
    harm(root)
    if said is None:
        assert len(read(root)) == 5
        return
    with pytest.raises(DataError, match=said):
        read(root)


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    (tmp_path / "imagenet").mkdir()
    with pytest.raises(DataError, match=r"imagnet/train cannot be read \(did you mean 'imagenet'\?\)"):
        class_names(tmp_path / "imagnet")


def test_a_label_above_the_class_count_is_named(root: Path) -> None:
    assert len(read(root, classes=3)) == 6
    with pytest.raises(DataError, match=r"val/cat has label 2, .* classes=2 is set. There are 3 folders"):
        read(root, classes=2)


def test_a_image_that_cannot_be_read_is_named(root: Path) -> None:
    path = root / "val" / "bee" / "bee_1.JPEG"
    path.write_bytes(path.read_bytes()[:100])
    samples = read(root)
    assert samples[2]["label"] == 1
    with pytest.raises(DataError, match=r"sample 3: the image .*bee_1\.JPEG cannot be read"):
        samples[3]


def test_augmentation_follows_torchs_seed_alone_and_leaves_other_chance_alone(root: Path) -> None:
    samples = ImageFolderDataset(root, "train", train_transform(SIZE, Augmentation()), training=True)
    seeded = SeededDataset(samples, seed=3)
    random.seed(1)
    np.random.seed(1)
    expected = random.getstate(), np.random.get_state()[1].tolist()
    first = seeded[4]
    assert (random.getstate(), np.random.get_state()[1].tolist()) == expected
    random.seed(2)
    np.random.seed(2)
    again, copy = seeded[4], seeded[4 + len(samples)]
    assert torch.equal(first["image"], again["image"])
    assert first["draw"] == again["draw"] != copy["draw"]
    assert first["label"] == copy["label"]
    assert not torch.equal(first["image"], copy["image"])
    seeded.set_epoch(1)
    assert not torch.equal(seeded[4]["image"], first["image"])


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(SettingError, match="auto_augment='randy-m9' is not a policy of timm"):
        train_transform(SIZE, Augmentation(policy="randy-m9"))
    assert train_transform(SIZE, Augmentation(policy=None))(Image.new("RGB", (30, 20))).shape == (3, SIZE, SIZE)


@pytest.mark.parametrize("policy", ["rand-m10-inc1", "rand-m10-mstd0.5-inc1", "original", "v0", "augmix-m10"])
def test_policies_run_at_their_highest_level(policy: str) -> None:
    """Posterizing to no bits at all is among what they do, and gives black."""
    transform = train_transform(SIZE, Augmentation(policy=policy, erasing=0.0))
    random.seed(0)
    np.random.seed(0)
    image = Image.effect_noise((30, 20), 60).convert("RGB")
    assert all(transform(image).isfinite().all() for _ in range(120))


def test_a_image_without_bits_is_black() -> None:
    transform = train_transform(SIZE, Augmentation(policy="rand-m10-inc1", erasing=0.0))
    (policy,) = (step for step in transform.transforms if hasattr(step, "ops"))  # type: ignore[attr-defined]
    (operation,) = (each for each in policy.ops if each.name.startswith("Posterize"))
    operation.prob = 1.0
    assert not np.asarray(operation(Image.new("RGB", (4, 4), (200, 100, 50)))).any()


def test_repeated_augmentation_sees_copies_of_a_third_of_the_samples(root: Path) -> None:
    samples = read(root, "train")
    sampler = RepeatedSampler(samples, 3, seed=0)
    drawn = list(sampler)
    assert len(drawn) == len(sampler) == len(samples) == 15
    assert len(set(drawn)) == 15  # copies are numbers of their own
    assert sorted(Counter(number % 15 for number in drawn).values()) == [3] * 5
    assert {number // 15 for number in drawn} == {0, 1, 2}
    assert list(sampler) == drawn
    sampler.set_epoch(1)
    assert list(sampler) != drawn
    assert list(RepeatedSampler(samples, 3, seed=1)) != drawn


def batch(count: int) -> list[Any]:
    return [
        {"image": torch.full((3, 8, 8), float(number)), "label": number % 3, "draw": 5 + number}
        for number in range(count)
    ]


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
@pytest.mark.parametrize("kind", [{"cutmix": 0.0}, {"mixup": 0.0}, {}, {"mixup": 0.0, "cutmix_minmax": (0.3, 0.6)}])
def test_targets_say_how_much_of_each_class_a_mixed_image_shows(mode: Any, kind: dict[str, Any]) -> None:
    """Every pixel here tells which image it comes from."""
    collate = ImageCollator(Mixing(3, mode=mode, smoothing=0.0, **kind))
    mixed = collate(batch(6))
    assert mixed["labels"].tolist() == [0, 1, 2, 0, 1, 2]
    for number in range(6):
        other = 5 - number
        share = (mixed["images"][number].mean() - other) / (number - other)
        expected = torch.zeros(3)
        expected[number % 3] += share
        expected[other % 3] += 1 - share
        torch.testing.assert_close(mixed["targets"][number], expected, rtol=1e-4, atol=1e-5)
    again = collate(batch(6))
    assert torch.equal(mixed["images"], again["images"])
    assert not torch.equal(mixed["images"], ImageCollator(Mixing(3, mode=mode, **kind))(batch(8))["images"][:6])


def test_evaluation_is_not_mixed() -> None:
    items = [{"image": item["image"], "label": item["label"]} for item in batch(3)]
    for collate in (ImageCollator(Mixing(3)), ImageCollator(None)):
        found = collate(items)
        assert set(found) == {"images", "labels"}
        assert torch.equal(found["images"], torch.stack([item["image"] for item in items]))


def test_smoothing_spreads_a_share_of_the_targets() -> None:
    found = ImageCollator(Mixing(4, smoothing=0.2, probability=0.0))(batch(2))
    torch.testing.assert_close(found["targets"][0], torch.tensor([0.85, 0.05, 0.05, 0.05]))
    assert not Mixing(4, mixup=0.0, cutmix=0.0).active
