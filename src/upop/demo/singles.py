"""Single scenes for the splits of a set: what an image shows decides which split it may be in.

So no image comes up in two splits, neither as it is nor mirrored (training mirrors images), and what one split
holds does not depend on how many images the others have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from hashlib import blake2b
from random import Random

from upop.demo.scenes import GRID, Scene


def split_of(scene: Scene, seed: int, shares: Mapping[str, float]) -> str:
    """The split that a scene belongs to; `shares` holds the share of each split, 1 in all."""
    content = scene.content
    mirrored = tuple(
        sorted((kind, colour, size, row, GRID - 1 - column) for kind, colour, size, row, column in content)
    )
    digest = blake2b(f"{seed}/{min(content, mirrored)}".encode(), digest_size=8).digest()
    place = int.from_bytes(digest, "big") / 2**64
    for split, share in shares.items():
        place -= share
        if place < 0:
            return split
    return list(shares)[-1]


def sample_scenes(
    rng: Random, seed: int, split: str, shares: Mapping[str, float], draw: Callable[[Random], Scene]
) -> Iterator[Scene]:
    """Scenes of a split without end, from scenes that `draw` draws."""
    while True:
        scene = draw(rng)
        if split_of(scene, seed, shares) == split:
            yield scene
