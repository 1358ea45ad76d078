"""Images with overlays of label maps: the input, the prediction and the ground truth of a segmentation model."""

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
_GOLDEN = (5**0.5 - 1) / 2  # step on the colour circle, which gives neighbouring classes distinct hues


def class_colour(label: int) -> tuple[int, int, int]:
    """Return the colour of a class as red, green and blue, 0 to 255."""
    hue, ring = (label * _GOLDEN) % 1.0, label // 12
    channels = colorsys.hsv_to_rgb(hue, (0.85, 0.55)[ring % 2], (1.0, 0.75)[ring // 2 % 2])
    return tuple(round(255 * channel) for channel in channels)  # type: ignore[return-value]


def blended(image: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Return an image, uint8 [3, height, width], with an overlay of its label map, [height, width].

    Pixels with other labels than 0 to classes - 1 show the image.
    """
    present = [label for label in labels.unique().tolist() if 0 <= label < classes]
    if not present:
        return image
    masks = torch.stack([labels == label for label in present])
    mixed: Tensor = draw_segmentation_masks(image, masks, OPACITY, [class_colour(label) for label in present])
    return mixed


def write_blends(path: Path, image: Tensor, predicted: Tensor, labels: Tensor, classes: int) -> None:
    """Write a PNG with three panels: the image, and overlays of prediction and ground truth.

    Args:
        path: of the file; its folder is made.
        image: uint8 [3, height, width].
        predicted: classes, [height, width].
        labels: true classes, [height, width]; pixels without one show the image.
        classes: number of classes.

    Raises:
        RunFolderError: upop did not write the file that is there, or it cannot be written.
    """
    panels = [image, blended(image, predicted, classes), blended(image, labels, classes)]
    row = tvf.to_pil_image(torch.cat(panels, dim=2).cpu())
    about = PngInfo()
    about.add_text("Software", SOFTWARE)
    make_folder(path.parent)
    with replacing_file(path, wrote_image) as part:
        row.save(part, format="png", pnginfo=about)
