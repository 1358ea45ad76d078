"""Scenes: the content of generated images.

Images, sentences, answers, labels and label maps are all derived from the same scene, so they cannot disagree.
Positions are shares of the image (0 to 1, origin at the top left), so a scene has no pixel size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

KINDS = ("circle", "square", "triangle")
COLOURS = ("red", "green", "blue", "yellow")
SIZES = ("small", "large")

GRID = 3
"""Rows and columns of cells; a shape sits in a cell of its own."""
MAX_SHAPES = 4
DIAMETER = {"small": 0.160, "large": 0.285}
"""Size of a shape, as a share of the image: below a cell minus twice the jitter, so that shapes do not overlap."""
JITTER = 0.022
"""Maximum shift from the cell's centre, as a share of the image: small enough to keep rows distinct."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A coloured shape: its attributes, its cell (row 0 is the top), and its shift from the cell's centre."""

    kind: str
    colour: str
    size: str
    row: int
    column: int
    dx: float = 0.0
    dy: float = 0.0

    @property
    def centre(self) -> tuple[float, float]:
        """The centre, (x, y), as shares of the image."""
        return (self.column + 0.5) / GRID + self.dx, (self.row + 0.5) / GRID + self.dy

    @property
    def radius(self) -> float:
        """Half of the size, as a share of the image."""
        return DIAMETER[self.size] / 2

    def is_above(self, other: Shape) -> bool:
        """Whether this shape is in a higher row than the other one."""
        return self.row < other.row


@dataclass(frozen=True, slots=True)
class Noun:
    """A description such as "large red circle"; an attribute that is None fits anything ("shape")."""

    kind: str | None = None
    colour: str | None = None
    size: str | None = None

    def fits(self, shape: Shape) -> bool:
        """Whether the shape has all given attributes."""
        return (
            (self.kind is None or self.kind == shape.kind)
            and (self.colour is None or self.colour == shape.colour)
            and (self.size is None or self.size == shape.size)
        )

    @property
    def singular(self) -> str:
        """The description in the singular, without an article; it always takes "a"."""
        return " ".join(word for word in (self.size, self.colour, self.kind or "shape") if word)

    @property
    def plural(self) -> str:
        """The description in the plural."""
        return f"{self.singular}s"


@dataclass(frozen=True, slots=True)
class Scene:
    """The content of an image: shapes on a light background (red, green, blue; 0 to 255)."""

    shapes: tuple[Shape, ...]
    background: tuple[int, int, int] = (245, 245, 245)

    def matching(self, noun: Noun) -> tuple[Shape, ...]:
        """The shapes that fit the description, in the scene's order."""
        return tuple(shape for shape in self.shapes if noun.fits(shape))

    def count(self, noun: Noun) -> int:
        """Return the number of shapes that fit the description."""
        return sum(noun.fits(shape) for shape in self.shapes)

    def has(self, noun: Noun) -> bool:
        """Whether any shape fits the description."""
        return any(noun.fits(shape) for shape in self.shapes)

    def any_above(self, upper: Noun, lower: Noun) -> bool:
        """Whether a shape that fits `upper` is in a higher row than one that fits `lower`."""
        below = self.matching(lower)
        return any(shape.is_above(other) for shape in self.matching(upper) for other in below)

    def any_in_row(self, noun: Noun, row: int) -> bool:
        """Whether a shape in a row fits the description."""
        return any(shape.row == row and noun.fits(shape) for shape in self.shapes)

    @property
    def content(self) -> tuple[tuple[str, str, str, int, int], ...]:
        """The shapes without jitter and background, sorted: equal for images that look the same."""
        return tuple(sorted((s.kind, s.colour, s.size, s.row, s.column) for s in self.shapes))


@dataclass(frozen=True, slots=True)
class Palette:
    """The attributes of a scene: few of each, so that they repeat and can be counted."""

    kinds: Sequence[str]
    colours: Sequence[str]
    sizes: Sequence[str]


def sample_palette(rng: Random) -> Palette:
    """Draw one to three kinds, one to three colours and one or both sizes, all equally likely."""
    return Palette(
        kinds=rng.sample(KINDS, rng.choice((1, 2, 2, 3))),
        colours=rng.sample(COLOURS, rng.choice((1, 2, 2, 3))),
        sizes=rng.choice((SIZES, SIZES, SIZES[:1], SIZES[1:])),
    )


def sample_scene(rng: Random, palette: Palette | None = None) -> Scene:
    """Draw a scene of one to four shapes in different cells, from the palette or from a fresh one."""
    palette = palette or sample_palette(rng)
    cells = rng.sample(range(GRID * GRID), rng.randint(1, MAX_SHAPES))
    shapes = tuple(
        Shape(
            kind=rng.choice(palette.kinds),
            colour=rng.choice(palette.colours),
            size=rng.choice(palette.sizes),
            row=cell // GRID,
            column=cell % GRID,
            dx=rng.uniform(-JITTER, JITTER),
            dy=rng.uniform(-JITTER, JITTER),
        )
        for cell in cells
    )
    return Scene(shapes, sample_background(rng))


def sample_background(rng: Random) -> tuple[int, int, int]:
    """Draw a light, nearly grey background."""
    tone = rng.randint(232, 250)
    return tone + rng.randint(-5, 5), tone + rng.randint(-5, 5), tone + rng.randint(-5, 5)
