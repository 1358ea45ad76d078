"""Shared by the writers of all generated sets: the layout of a set, and writing its images and samples."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from upop.demo.draw import ImageFormat, draw_scene, encode_image
from upop.demo.scenes import Scene

ANNOTATION = "annotation"
TOKENIZER = "tokenizer"

MOST_HELD_OUT = 1000
"""Maximum samples of a held-out split."""


def held_out(size: int, fewest: int) -> int:
    """Return the samples of a held-out split: a tenth of the training samples, at least `fewest`, at most 1000."""
    return min(max(size // 10, fewest), MOST_HELD_OUT)


class Sink:
    """Writes a set to a folder.

    Args:
        folder: an existing folder.
        image_size: side of the images in pixels.
        image_format: their file format.
        drawn: called after every image.
    """

    def __init__(self, folder: Path, image_size: int, image_format: ImageFormat, drawn: Callable[[], None]) -> None:
        self._folder = folder
        self.image_size = image_size
        self._image_format: ImageFormat = image_format
        self._drawn = drawn
        self.suffix = "jpg" if image_format == "jpeg" else "png"

    def scene_image(self, root: str, name: str, scene: Scene) -> None:
        """Draw a scene to the file `name` in the folder `root` of the set."""
        self.image(f"{root}/{name}", draw_scene(scene, self.image_size), self._image_format)
        self._drawn()

    def image(self, name: str, image: Image.Image, image_format: ImageFormat) -> None:
        """Write an image without counting it as one of the set's."""
        path = self._folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode_image(image, image_format))

    def records(self, name: str, records: Iterable[Any]) -> None:
        """Write an annotation file: a JSON list with one sample per line."""
        lines = ",\n".join(json.dumps(record) for record in records)
        self.text(f"{ANNOTATION}/{name}", f"[\n{lines}\n]\n")

    def text(self, name: str, text: str) -> None:
        """Write a text file; the same text gives the same bytes on every system."""
        path = self._folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8", newline="\n")


@dataclass(frozen=True)
class SetFormat:
    """The format of a task's set.

    Attributes:
        roots: setting -> folder, relative to the set's.
        records: number of training samples -> number of samples of every split.
        images: number of samples of every split -> number of all images.
        write: writes images and annotation files, from the seed and the number of samples of every split.
        texts: whether the set has texts, and with them an annotation folder and a tokenizer.
    """

    roots: Mapping[str, str]
    records: Callable[[int], dict[str, int]]
    images: Callable[[Mapping[str, int]], int]
    write: Callable[[Sink, int, Mapping[str, int]], None]
    texts: bool = True
