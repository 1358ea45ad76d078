"""Captions of single images. The meaning of each caption is an object that can be compared with a scene.

Every caption mentions all shapes of its image, with colour and kind. Sizes and rows, or the order of shapes, are
optional. Columns are never mentioned, because training flips images.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from random import Random
from typing import Literal

from upop.demo.counting import NUMBER_WORDS
from upop.demo.scenes import Noun, Scene, Shape

MAX_WORDS = 22
"""Words of the longest caption: three shapes with size, colour, kind and row each."""
ROWS = ("top", "middle", "bottom")
ORDERS = {"above": ("above", "over"), "below": ("below", "under")}
"""Order of groups -> words for it."""

Order = Literal["above", "below"]
Places = Literal["nothing", "rows", "order"]


@dataclass(frozen=True, slots=True)
class Mention:
    """A number of identical shapes."""

    number: int
    noun: Noun

    @property
    def words(self) -> str:
        """The mention in words: "a red circle", "two red circles"."""
        return f"a {self.noun.singular}" if self.number == 1 else f"{NUMBER_WORDS[self.number]} {self.noun.plural}"


@dataclass(frozen=True, slots=True)
class Group:
    """Shapes that are mentioned together, and their row (0 is the top), if mentioned."""

    mentions: tuple[Mention, ...]
    row: int | None = None


@dataclass(frozen=True, slots=True)
class Caption:
    """The meaning of a caption: groups of shapes; with an order, each group is above (or below) the next one."""

    groups: tuple[Group, ...]
    order: Order | None = None

    @property
    def mentions(self) -> tuple[Mention, ...]:
        """All mentions, in order."""
        return tuple(mention for group in self.groups for mention in group.mentions)

    @property
    def number(self) -> int:
        """The number of shapes mentioned."""
        return sum(mention.number for mention in self.mentions)

    def fits(self, scene: Scene) -> bool:
        """Whether the caption is true of the scene, which may show more."""
        wanted = [
            (mention.noun, group.row, rank)
            for rank, group in enumerate(self.groups)
            for mention in group.mentions
            for _ in range(mention.number)
        ]
        ranks = [rank for _, _, rank in wanted]
        return any(
            all(
                noun.fits(shape) and row in (None, shape.row)
                for (noun, row, _), shape in zip(wanted, shapes, strict=True)
            )
            and self._in_order(shapes, ranks)
            for shapes in permutations(scene.shapes, len(wanted))
        )

    def _in_order(self, shapes: Sequence[Shape], ranks: Sequence[int]) -> bool:
        if self.order is None:
            return True
        pairs = [
            (a, b) for a, i in zip(shapes, ranks, strict=True) for b, j in zip(shapes, ranks, strict=True) if i < j
        ]
        return all(a.is_above(b) if self.order == "above" else b.is_above(a) for a, b in pairs)

    def phrasings(self) -> tuple[str, ...]:
        """The phrasings of the caption; none if all of them are too long."""
        first = self.mentions[0]
        be = "there is" if first.number == 1 else "there are"
        texts = self._texts()
        ways = [way for plain in texts for way in (plain, f"{be} {plain}")]
        if len(self.groups) == 1 and self.groups[0].row is None:
            others = self.mentions[1:]
            if others:
                ways.append(f"{first.words} with {_listed([mention.words for mention in others])}")
                ways.append(f"{NUMBER_WORDS[self.number]} shapes, {texts[0]}")
            else:
                ways.append(f"only {texts[0]}")
                ways.append(f"one {first.noun.singular}" if first.number == 1 else f"exactly {texts[0]}")
        return tuple(way for way in ways if len(way.split()) <= MAX_WORDS)

    def _texts(self) -> list[str]:
        groups = [_listed([mention.words for mention in group.mentions]) for group in self.groups]
        if self.order is not None:
            return [f" {word} ".join(groups) for word in ORDERS[self.order]]
        if self.groups[0].row is None:
            return [_listed(groups)]
        rows = [ROWS[group.row] for group in self.groups if group.row is not None]
        at = ["in the middle" if row == "middle" else f"at the {row}" for row in rows]
        styles = (at, [f"in the {row} row" for row in rows])
        return [_listed([f"{text} {place}" for text, place in zip(groups, style, strict=True)]) for style in styles]


def _listed(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def describe(rng: Random, scene: Scene, *, sizes: bool, places: Places) -> Caption:
    """Describe all shapes of a scene in random order, with or without sizes and places.

    An order needs shapes in more than one row; otherwise no places are mentioned.
    """
    rows = sorted({shape.row for shape in scene.shapes})
    if places == "nothing" or (places == "order" and len(rows) == 1):
        return Caption((Group(_mentions(rng, scene.shapes, sizes)),))
    reverse = rng.random() < (0.5 if places == "order" else 0.3)
    groups = tuple(
        Group(
            _mentions(rng, [shape for shape in scene.shapes if shape.row == row], sizes),
            row if places == "rows" else None,
        )
        for row in (reversed(rows) if reverse else rows)
    )
    if places == "rows":
        return Caption(groups)
    return Caption(groups, "below" if reverse else "above")


def _mentions(rng: Random, shapes: Sequence[Shape], sizes: bool) -> tuple[Mention, ...]:
    nouns = Counter(Noun(shape.kind, shape.colour, shape.size if sizes else None) for shape in shapes)
    mentions = [Mention(number, noun) for noun, number in nouns.items()]
    rng.shuffle(mentions)
    return tuple(mentions)


@dataclass(frozen=True, slots=True)
class Style:
    """Shares of captions with sizes and with each sort of place, and whether one caption mentions everything."""

    sizes: float
    places: Mapping[Places, float]
    one_in_full: bool


CAPTIONS_PER_IMAGE = 5
_DRAWS = 60


def draw_captions(
    rng: Random, scene: Scene, style: Style, refused: Callable[[Caption], bool] | None = None
) -> list[tuple[str, Caption]]:
    """Draw five different captions of a scene, with their meanings; fewer if five are not found.

    Captions for which `refused` is true are left out.
    """
    found: dict[str, Caption] = {}
    kinds, weights = list(style.places), list(style.places.values())
    for draw in range(_DRAWS):
        if len(found) == CAPTIONS_PER_IMAGE:
            break
        in_full = style.one_in_full and draw == 0
        places: Places = "rows" if in_full else rng.choices(kinds, weights)[0]
        caption = describe(rng, scene, sizes=in_full or rng.random() < style.sizes, places=places)
        ways = caption.phrasings()
        if ways and not (refused is not None and refused(caption)):
            found.setdefault(rng.choice(ways), caption)
    captions = list(found.items())
    rng.shuffle(captions)
    return captions
