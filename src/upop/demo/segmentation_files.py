"""Writes generated scenes with label maps, in ADE20K's layout.

Classes are the background, and each colour and kind ("red circle"). A thin frame has no class, like some pixels of
ADE20K.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import product
from pathlib import PurePosixPath
from random import Random

from PIL import Image, ImageDraw

from upop.data.segmentation import FOLDER, NAMES
from upop.demo.draw import SUPERSAMPLING, fill_shape
from upop.demo.layout import SetFormat, Sink, held_out
from upop.demo.scenes import COLOURS, KINDS, Scene, sample_palette, sample_scene
from upop.demo.singles import sample_scenes

SHARES = {"training": 0.8, "validation": 0.2}
"""Share of all possible scenes in each split."""
FEWEST_HELD_OUT = 50
CLASSES = ("background", *(f"{colour} {kind}" for colour, kind in product(COLOURS, KINDS)))
"""Names of the classes, with labels 1, 2, ...; label 0 is no class."""

_ROOT = str(PurePosixPath(FOLDER))
_FRAME = 1 / 32  # of the image's side
_NAMES = {"training": "ADE_train_{:08d}", "validation": "ADE_val_{:08d}"}


def draw_labels(scene: Scene, image_size: int) -> Image.Image:
    """Draw the label map of a scene: a greyscale image with one label per pixel."""
    side = image_size * SUPERSAMPLING
    labels = Image.new("L", (side, side), 1 + CLASSES.index("background"))
    canvas = ImageDraw.Draw(labels)
    for shape in scene.shapes:
        fill_shape(canvas, shape, side, 1 + CLASSES.index(f"{shape.colour} {shape.kind}"))
    # Nearest, because labels cannot be averaged.
    labels = labels.resize((image_size, image_size), Image.Resampling.NEAREST)
    frame = max(1, round(image_size * _FRAME))
    ImageDraw.Draw(labels).rectangle((0, 0, image_size - 1, image_size - 1), outline=0, width=frame)
    return labels


def _draw(rng: Random) -> Scene:
    """Draw large shapes only: most pixels of small ones are at an edge, which patches predict poorly."""
    return sample_scene(rng, replace(sample_palette(rng), sizes=("large",)))


def _records(size: int) -> dict[str, int]:
    return {"training": size, "validation": held_out(size, FEWEST_HELD_OUT)}


def _write(sink: Sink, seed: int, records: Mapping[str, int]) -> None:
    pixels = dict.fromkeys(range(1, 1 + len(CLASSES)), 0)
    seen = {split: dict.fromkeys(pixels, 0) for split in records}
    for split, wanted in records.items():
        scenes = sample_scenes(Random(f"{seed}/segmentation/{split}"), seed, split, SHARES, _draw)
        for number, scene in zip(range(1, wanted + 1), scenes, strict=False):
            name = _NAMES[split].format(number)
            sink.scene_image(f"{_ROOT}/images", f"{split}/{name}.{sink.suffix}", scene)
            labels = draw_labels(scene, sink.image_size)
            sink.image(f"{_ROOT}/annotations/{split}/{name}.png", labels, "png")
            counts = labels.histogram()
            for label in pixels:
                pixels[label] += counts[label]
                seen[split][label] += counts[label] > 0
    total = sum(pixels.values())
    rows = [
        (label, f"{pixels[label] / total:.4f}", *(seen[split][label] for split in records), CLASSES[label - 1])
        for label in pixels
    ]
    lines = ["\t".join(map(str, row)) for row in (("Idx", "Ratio", "Train", "Val", "Name"), *rows)]
    sink.text(f"{_ROOT}/{NAMES}", "\n".join(lines) + "\n")


SEGMENTATION = SetFormat(
    roots={"dataset_root": "."},
    records=_records,
    images=lambda records: sum(records.values()),
    write=_write,
    texts=False,
)
