"""The image transforms: values, sizes, and chance from torch's generator only."""

import pickle

import pytest
import torch
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tvf

from upop.data.transforms import _OPERATIONS, MEAN, STD, RandAugment, eval_transform, resized_crop, train_transform


@pytest.fixture
def image() -> Image.Image:
    noise = torch.randint(0, 256, (12, 10, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return Image.frombytes("RGB", (10, 12), bytes(noise.flatten().tolist())).resize(
        (100, 120), Image.Resampling.BICUBIC
    )


@pytest.mark.parametrize("size", [64, 100, 150])
def test_evaluation_resizes_and_normalises_as_the_library_does(image: Image.Image, size: int):
    expected = v2.Compose(
        [
            v2.Resize((size, size), interpolation=v2.InterpolationMode.BICUBIC, antialias=True),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )
    found = eval_transform(size)(image)
    assert found.shape == (3, size, size) and found.dtype == torch.float32
    torch.testing.assert_close(found, expected(image))


def test_a_image_of_the_right_size_keeps_its_pixels():
    flat = Image.new("RGB", (8, 8), (255, 0, 51))
    expected = (torch.tensor([1.0, 0.0, 0.2]) - torch.tensor(MEAN)) / torch.tensor(STD)
    torch.testing.assert_close(eval_transform(8)(flat), expected.view(3, 1, 1).expand(3, 8, 8))


def test_training_draws_from_torchs_generator(image: Image.Image):
    transform = train_transform(32)
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(torch.stack([transform(image) for _ in range(8)]))
    assert draws[0].shape == (8, 3, 32, 32)
    assert draws[0].isfinite().all()
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert not torch.equal(draws[0][0], draws[0][1])


def test_without_augmentation_training_sees_what_evaluation_sees(image: Image.Image):
    assert torch.equal(train_transform(64, augment=False)(image), eval_transform(64)(image))


def test_randaugment_leaves_the_size_and_often_the_image(image: Image.Image):
    torch.manual_seed(0)
    augmented = [RandAugment()(image) for _ in range(300)]
    assert {each.size for each in augmented} == {image.size}
    assert {each.mode for each in augmented} == {"RGB"}
    # Each of two operations is done half of the time, and 3 of the 10 change nothing at level 5.
    unchanged = sum(each.tobytes() == image.tobytes() for each in augmented) / 300
    assert 0.65**2 - 0.12 < unchanged < 0.65**2 + 0.12
    assert len({each.tobytes() for each in augmented}) > 20


def test_transforms_can_be_sent_to_worker_processes(image: Image.Image):
    for transform in (eval_transform(32), train_transform(32)):
        again = pickle.loads(pickle.dumps(transform))
        torch.manual_seed(3)
        first = transform(image)
        torch.manual_seed(3)
        assert torch.equal(again(image), first)


@pytest.mark.parametrize("crop", [(0, 0, 120, 100), (10, 20, 61, 47), (3, 0, 9, 100)], ids=str)
@pytest.mark.parametrize("size", [(48, 48), (110, 90), (200, 150)], ids=str)
def test_crops_are_resized_as_pillow_does_up_to_rounding(
    image: Image.Image, crop: tuple[int, int, int, int], size: tuple[int, int]
):
    bicubic = v2.InterpolationMode.BICUBIC
    expected = tvf.resized_crop(image, *crop, list(size), interpolation=bicubic)
    found = resized_crop(image, crop, size, bicubic)
    assert found.size == expected.size == size[::-1]
    one, other = (tvf.pil_to_tensor(each).int() for each in (found, expected))
    assert int((one - other).abs().max()) <= 2


def test_randaugments_short_cuts_give_what_the_library_gives(image: Image.Image):
    """Level 5 leaves brightness and sharpness as they are, and moves by whole pixels."""
    same = [tvf.adjust_brightness(image, 1.0), tvf.adjust_sharpness(image, 1.0)]
    assert [_OPERATIONS[number](image, 0.5).tobytes() for number in (3, 4)] == [each.tobytes() for each in same]
    assert _OPERATIONS[4](image, 0.9).tobytes() == tvf.adjust_sharpness(image, 1.72).tobytes()
    for number, direction in ((7, [1, 0]), (8, [0, 1])):
        shifted = {
            tvf.affine(
                image,
                angle=0.0,
                translate=[sign * 5 * step for step in direction],
                scale=1.0,
                shear=[0.0, 0.0],
                interpolation=v2.InterpolationMode.BILINEAR,
                fill=[128, 128, 128],
            ).tobytes()
            for sign in (-1, 1)
        }
        assert {_OPERATIONS[number](image, 0.5).tobytes() for _ in range(20)} == shifted
