"""Writes generated pictures as ImageNet's lie: one folder per class.

The class is the colour and the kind of the one large shape; one to three small ones of any kind lie beside it, so that
a model has to look at all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from itertools import product
from random import Random

from upop.data.shapes.layout import SetFormat, Sink, held_out
from upop.data.shapes.scenes import COLOURS, GRID, JITTER, KINDS, MAX_SHAPES, Scene, Shape, sample_background
from upop.data.shapes.singles import sample_scenes
from upop.errors import SettingError

SHARES = {"train": 0.8, "val": 0.1, "test": 0.1}
"""Share of all scenes that each split draws from."""
CLASSES = tuple(sorted(product(COLOURS, KINDS)))
"""Colour and kind of the large shape, in the order of the folders' names."""
FEWEST_HELD_OUT = 10 * len(CLASSES)


def draw_scene_of(colour: str, kind: str, rng: Random) -> Scene:
    """Draw a scene whose large shape has that colour and kind."""
    cells = rng.sample(range(GRID * GRID), rng.randint(2, MAX_SHAPES))
    looks = [(kind, colour, "large"), *((rng.choice(KINDS), rng.choice(COLOURS), "small") for _ in cells[1:])]
    shapes = tuple(
        Shape(*look, cell // GRID, cell % GRID, rng.uniform(-JITTER, JITTER), rng.uniform(-JITTER, JITTER))
        for look, cell in zip(looks, cells, strict=True)
    )
    return Scene(shapes, sample_background(rng))


def _records(size: int) -> dict[str, int]:
    if size < len(CLASSES):
        raise SettingError(f"size must be at least {len(CLASSES)}, a picture for every class, not {size}.")
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
            sink.picture(split, name, next(scenes[label]))


CLASSIFICATION = SetFormat(
    roots={"data_path": "."},
    records=_records,
    pictures=lambda records: sum(records.values()),
    write=_write,
    texts=False,
)
