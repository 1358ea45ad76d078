"""Looks at generated images without the code that drew them: which shapes are in which row."""

from __future__ import annotations

from typing import NamedTuple

import torch
from PIL import Image

from upop.demo.draw import COLOUR_VALUES


class Seen(NamedTuple):
    """A coloured area: what shape it looks like, and its third of the image, from the top."""

    kind: str
    colour: str
    size: str
    row: int


def components(image: torch.Tensor, colour: tuple[int, int, int]) -> list[list[tuple[int, int]]]:
    """The connected areas of about that colour, each as its (row, column) pixels."""
    close = (image.float() - torch.tensor(colour).float()).norm(dim=-1) < 45
    left = {(row, column) for row, column in close.nonzero().tolist()}
    found = []
    while left:
        stack, area = [left.pop()], []
        while stack:
            row, column = stack.pop()
            area.append((row, column))
            for near in ((row + 1, column), (row - 1, column), (row, column + 1), (row, column - 1)):
                if near in left:
                    left.remove(near)
                    stack.append(near)
        if len(area) > 4:  # mixed pixels on the edge of one colour can look like another one
            found.append(area)
    return found


def seen(image: Image.Image) -> list[Seen]:
    """Every area, read from the pixels alone; kinds and sizes are sure from 128 pixels on."""
    side = image.width
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(side, side, 3)
    areas = []
    for name, colour in COLOUR_VALUES.items():
        for area in components(pixels, colour):
            rows, columns = [row for row, _ in area], [column for _, column in area]
            height, width = max(rows) - min(rows) + 1, max(columns) - min(columns) + 1
            filled = len(area) / (height * width)
            kind = "square" if filled > 0.9 else "circle" if filled > 0.68 else "triangle"
            middle = (min(rows) + max(rows)) / 2
            areas.append(Seen(kind, name, "large" if width > 0.2 * side else "small", int(3 * middle / side)))
    return areas
