"""Single scenes for the splits of a set: the content of an image decides its split.

So no image appears in two splits, also not mirrored (training flips images), and a split does not depend on the size of
the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from hashlib import blake2b
from random import Random

from upop.demo.scenes import GRID, Scene


def split_of(scene: Scene, seed: int, shares: Mapping[str, float]) -> str:
    """Return the split of a scene; `shares` has the share of each split; they sum to 1."""
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
    """Yield scenes of a split from `draw`, without end."""
    while True:
        scene = draw(rng)
        if split_of(scene, seed, shares) == split:
            yield scene
