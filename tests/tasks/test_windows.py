"""The sliding window: every pixel is met, overlaps are averaged, and mirrored images are mirrored back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from models.test_segmenter import tiny
from upop.tasks.windows import SCALES, Window, segment, slide


class _Pixelwise(nn.Module):
    """Says of each pixel alone, from its colour, what it is; counts the windows that it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[tuple[int, ...]] = []

    def forward(self, images: Tensor) -> Tensor:
        self.sizes.append(tuple(images.shape))
        return torch.stack([images[:, 0], images[:, 1] * 2, -images[:, 2], images.sum(1)], dim=1)


def random_image(height: int, width: int) -> Tensor:
    return torch.randn(3, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(height * width))


@settings(max_examples=60, deadline=None)
@given(st.integers(4, 40), st.integers(1, 40), st.integers(0, 60), st.integers(0, 60))
def test_windows_meet_every_pixel_and_stay_inside(size: int, stride: int, more_rows: int, more_columns: int) -> None:
    height, width, stride = size + more_rows, size + more_columns, min(stride, size)
    met = torch.zeros(height, width, dtype=torch.long)
    places = list(Window(size, stride).places(height, width))
    assert len(set(places)) == len(places)
    for top, left in places:
        assert 0 <= top <= height - size
        assert 0 <= left <= width - size
        met[top : top + size, left : left + size] += 1
    assert int(met.min()) >= 1


def test_one_window_is_the_plain_forward_pass() -> None:
    model, image = tiny(), random_image(32, 32)
    with torch.no_grad():
        found = slide(model, image, Window(32, 32), (32, 32))
        assert torch.allclose(found, model(image[None])[0].softmax(0), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("size", "stride"), [(8, 8), (8, 5), (16, 3), (20, 20)])
def test_where_pixels_are_judged_alone_windows_do_not_matter(size: int, stride: int) -> None:
    image = random_image(31, 45)
    found = slide(_Pixelwise(), image, Window(size, stride), (31, 45))
    assert torch.allclose(found, _Pixelwise()(image[None])[0].softmax(0), rtol=0, atol=1e-12)


def test_logits_are_averaged_before_they_become_probabilities() -> None:
    class Numbered(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            first = images[:, :1, :1, :1]  # the window's first pixel
            return torch.cat([first, 0 * first], dim=1).expand(-1, -1, *images.shape[2:])

    image = torch.zeros(3, 4, 6)
    image[0, :, 0], image[0, :, 2] = 3.0, -5.0  # where the two windows begin
    found = slide(Numbered(), image, Window(4, 4), (4, 6))
    expected = torch.tensor([3.0, 3.0, -1.0, -1.0, -5.0, -5.0]).sigmoid().expand(4, 6)
    assert torch.allclose(found[0], expected)


@pytest.mark.parametrize("batch", [1, 2, 5, 100])
def test_the_batch_bounds_a_forward_pass_and_changes_nothing(batch: int) -> None:
    image, counting = random_image(30, 40), _Pixelwise()
    found = slide(counting, image, Window(12, 9, batch), (30, 40))
    assert max(shape[0] for shape in counting.sizes) == min(batch, 15)  # 3 rows of 5
    assert sum(shape[0] for shape in counting.sizes) == 15
    assert torch.allclose(found, slide(_Pixelwise(), image, Window(12, 9, 3), (30, 40)))


def test_mirroring_twice_changes_nothing() -> None:
    image = random_image(20, 30)
    plain = slide(_Pixelwise(), image, Window(10, 7), (26, 39))
    mirrored = slide(_Pixelwise(), image.flip(2), Window(10, 7), (26, 39), flipped=True)
    assert torch.allclose(mirrored, plain)
    assert not torch.allclose(slide(_Pixelwise(), image.flip(2), Window(10, 7), (26, 39)), plain)


def test_a_image_below_the_window_is_enlarged() -> None:
    seen = _Pixelwise()
    found = slide(seen, random_image(10, 14), Window(20, 20), (10, 14))
    assert found.shape == (4, 10, 14)
    assert [shape[2:] for shape in seen.sizes] == [(20, 20)]
    assert seen.sizes[0][0] == 2  # 20 x 28 pixels
    assert torch.allclose(found.sum(0), torch.ones(10, 14, dtype=torch.float64))


def test_short_sides_are_brought_to_the_asked_for_size() -> None:
    seen = _Pixelwise()
    found = segment(seen, [random_image(40, 60), random_image(25, 20)], Window(16, 16, 100), short=16)
    assert [one.shape[1:] for one in found] == [(40, 60), (25, 20)]
    assert [shape[0] for shape in seen.sizes] == [2, 2]  # 16 x 24 and 20 x 16 pixels


def test_scales_and_mirror_images_are_averaged() -> None:
    model, image = _Pixelwise(), random_image(24, 24)
    window = Window(12, 12)
    plain = [segment(model, [image], window, 24, (scale,))[0] for scale in SCALES]
    # What is said of a pixel alone is the same in the mirror.
    both = segment(model, [image], window, 24, SCALES, flips=True)[0]
    assert torch.allclose(both, torch.stack(plain).mean(0))
    assert torch.allclose(both.sum(0), torch.ones(24, 24, dtype=torch.float64))
    uneven = tiny()
    with torch.no_grad():
        one, two = (segment(uneven, [image], Window(16, 16), 24, flips=flips)[0] for flips in (False, True))
        mirrored = segment(uneven, [image.flip(2)], Window(16, 16), 24)[0].flip(2)
    assert torch.allclose(two, (one + mirrored) / 2)


def test_half_precision_is_averaged_in_single() -> None:
    class Half(_Pixelwise):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images).bfloat16()

    found = slide(Half(), random_image(20, 20).float(), Window(16, 4), (20, 20))
    assert found.dtype == torch.float32
