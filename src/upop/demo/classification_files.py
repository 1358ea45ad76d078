"""Writes generated images in ImageNet's layout: one folder per class.

An image has five to nine shapes, and its class is their most frequent colour and kind. A model has to attend to all of
them, and to count.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import product
from random import Random

from upop.demo.layout import SetFormat, Sink, held_out
from upop.demo.scenes import COLOURS, GRID, JITTER, KINDS, SIZES, Scene, Shape, sample_background
from upop.demo.singles import sample_scenes
from upop.errors import SettingError

SHARES = {"train": 0.8, "val": 0.1, "test": 0.1}
"""Share of all possible scenes in each split."""
CLASSES = tuple(sorted(product(COLOURS, KINDS)))
"""Most frequent colour and kind, in the order of the folders' names."""
_SHAPES = (5, GRID * GRID)
FEWEST_HELD_OUT = 10 * len(CLASSES)


def draw_scene_of(colour: str, kind: str, rng: Random) -> Scene:
    """Draw a scene whose most frequent colour and kind are the given ones."""
    cells = rng.sample(range(GRID * GRID), rng.randint(*_SHAPES))
    colours = _mostly(colour, COLOURS, len(cells), rng)
    kinds = _mostly(kind, KINDS, len(cells), rng)
    shapes = tuple(
        Shape(
            shape_kind,
            shape_colour,
            rng.choice(SIZES),
            cell // GRID,
            cell % GRID,
            rng.uniform(-JITTER, JITTER),
            rng.uniform(-JITTER, JITTER),
        )
        for cell, shape_colour, shape_kind in zip(cells, colours, kinds, strict=True)
    )
    return Scene(shapes, sample_background(rng))


def _mostly(wanted: str, choices: Sequence[str], count: int, rng: Random) -> list[str]:
    """Draw `count` of the choices such that the wanted one is the most frequent."""
    while True:
        drawn = rng.choices(choices, k=count)
        first, second = [*Counter(drawn).most_common(2), ("", 0)][:2]
        if first[1] > second[1] and first[0] == wanted:
            return drawn


def _records(size: int) -> dict[str, int]:
    if size < len(CLASSES):
        raise SettingError(f"size must be at least {len(CLASSES)}, one image per class, not {size}.")
    others = held_out(size, FEWEST_HELD_OUT)
    return {"train": size, "val": others, "test": others}


def _write(sink: Sink, seed: int, records: Mapping[str, int]) -> None:
    for split, wanted in records.items():
        scenes = [
            sample_scenes(
                Random(f"{seed}/classification/{split}/{colour}/{kind}"),
                seed,
                split,
                SHARES,
                partial(draw_scene_of, colour, kind),
            )
            for colour, kind in CLASSES
        ]
        for number in range(wanted):
            label = number % len(CLASSES)
            name = f"{'-'.join(CLASSES[label])}/{number:06d}.{sink.suffix}"
            sink.scene_image(split, name, next(scenes[label]))


CLASSIFICATION = SetFormat(
    roots={"data_path": "."},
    records=_records,
    images=lambda records: sum(records.values()),
    write=_write,
    texts=False,
)
