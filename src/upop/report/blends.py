"""Images with label maps laid over them: what a segmentation model saw, what it said, and what is true."""

from __future__ import annotations

import colorsys
from pathlib import Path

import torch
from PIL.PngImagePlugin import PngInfo
from torch import Tensor
from torchvision.transforms.v2 import functional as tvf
from torchvision.utils import draw_segmentation_masks

from upop.files import make_folder, replacing_file
from upop.ownership import SOFTWARE, wrote_image

OPACITY = 0.6
_GOLDEN = (5**0.5 - 1) / 2  # of the colour circle: neighbouring classes get colours far apart


def class_colour(label: int) -> tuple[int, int, int]:
    """Return the red, green and blue (0 to 255) that a class is shown with, from 0."""
    hue, ring = (label * _GOLDEN) % 1.0, label // 12
    channels = colorsys.hsv_to_rgb(hue, (0.85, 0.55)[ring % 2], (1.0, 0.75)[ring // 2 % 2])
    return tuple(round(255 * channel) for channel in channels)  # type: ignore[return-value]


def blended(image: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Return an image of bytes [3, H, W] with its label map [H, W] laid over it; other labels show the image."""
    present = [label for label in labels.unique().tolist() if 0 <= label < classes]
    if not present:
        return image
    masks = torch.stack([labels == label for label in present])
    mixed: Tensor = draw_segmentation_masks(image, masks, OPACITY, [class_colour(label) for label in present])
    return mixed


def write_blends(path: Path, image: Tensor, predicted: Tensor, labels: Tensor, classes: int) -> None:
    """Write a PNG: the image, beside it the prediction laid over it, beside that the truth.

    Args:
        path: of the file; its folder is made.
        image: bytes [3, H, W].
        predicted: classes [H, W].
        labels: true classes [H, W]; pixels without one show the image.
        classes: how many there are.

    Raises:
        RunFolderError: there is another file of that name, or it cannot be written.
    """
    panels = [image, blended(image, predicted, classes), blended(image, labels, classes)]
    row = tvf.to_pil_image(torch.cat(panels, dim=2).cpu())
    about = PngInfo()
    about.add_text("Software", SOFTWARE)
    make_folder(path.parent)
    with replacing_file(path, wrote_image) as part:
        row.save(part, format="png", pnginfo=about)
