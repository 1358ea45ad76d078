"""Draws scenes with Pillow; `fill_shape` also draws label maps."""

from __future__ import annotations

import io
from functools import cache
from typing import Literal

from PIL import Image, ImageDraw

from upop.demo.scenes import Scene, Shape

ImageFormat = Literal["png", "jpeg"]

COLOUR_VALUES = {
    "red": (214, 39, 40),
    "green": (44, 160, 44),
    "blue": (31, 90, 214),
    "yellow": (240, 200, 20),
}
"""Red, green and blue (0 to 255) of each colour word."""

SUPERSAMPLING = 4
"""Images are drawn this many times larger and averaged, which gives smooth edges."""

_ENCODER: dict[str, dict[str, int]] = {
    # Fixed, so that the same scene gives the same bytes.
    "png": {"compress_level": 1},
    "jpeg": {"quality": 95, "subsampling": 0},
}


@cache
def _unit_polygon(kind: str) -> tuple[tuple[float, float], ...]:
    """Return the corners of a kind, centred at (0, 0), within [-1, 1]."""
    if kind == "square":
        side = 0.86  # a full-width square would look larger than a circle of the same size
        return ((-side, -side), (side, -side), (side, side), (-side, side))
    if kind == "triangle":
        return ((0.0, -0.95), (1.0, 0.85), (-1.0, 0.85))
    raise KeyError(kind)


def fill_shape(canvas: ImageDraw.ImageDraw, shape: Shape, side: int, value: int | tuple[int, int, int]) -> None:
    """Fill a shape's area on a square canvas of `side` pixels with a colour, or a label."""
    x, y = (part * side for part in shape.centre)
    radius = shape.radius * side
    if shape.kind == "circle":
        canvas.ellipse((x - radius, y - radius, x + radius, y + radius), fill=value)
    else:
        canvas.polygon([(x + radius * u, y + radius * v) for u, v in _unit_polygon(shape.kind)], fill=value)


def draw_scene(scene: Scene, image_size: int = 64) -> Image.Image:
    """Draw the scene as an RGB image of image_size x image_size pixels."""
    side = image_size * SUPERSAMPLING
    image = Image.new("RGB", (side, side), scene.background)
    canvas = ImageDraw.Draw(image)
    for shape in scene.shapes:
        fill_shape(canvas, shape, side, COLOUR_VALUES[shape.colour])
    return image.reduce(SUPERSAMPLING)


def encode_image(image: Image.Image, image_format: ImageFormat = "png") -> bytes:
    """Return the image as the bytes of a file; the same image gives the same bytes."""
    buffer = io.BytesIO()
    image.save(buffer, format=image_format, **_ENCODER[image_format])
    return buffer.getvalue()
