"""Claims about a pair of images: each is a predicate over two scenes, with its phrasings.

A claim has no label: `truth` derives it from the scenes. It is None if the claim does not apply ("the circle in the
left image" with three circles). Within an image only vertical relations are used: training may swap the two images and
the words left and right together, so these words must refer to the images only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from upop.demo.scenes import COLOURS, GRID, KINDS, SIZES, Noun, Scene

Side = Literal["left", "right"]


@dataclass(frozen=True, slots=True)
class Pair:
    """The two scenes of a sample."""

    left: Scene
    right: Scene

    def side(self, side: Side) -> Scene:
        """Return the scene on a side."""
        return self.left if side == "left" else self.right

    def swapped(self) -> Pair:
        """Return the pair with its scenes swapped."""
        return Pair(self.right, self.left)

    @property
    def content(self) -> frozenset[tuple[tuple[str, str, str, int, int], ...]]:
        """The content of the pair in any order: equal for pairs that look the same."""
        return frozenset((self.left.content, self.right.content))


def other(side: Side) -> Side:
    """Return the opposite side."""
    return "right" if side == "left" else "left"


class Claim(Protocol):
    """The interface of claims."""

    def truth(self, pair: Pair) -> bool | None:
        """Whether the claim is true; None if it does not apply to this pair."""

    def phrasings(self) -> tuple[str, ...]:
        """Return sentences with the meaning of the claim."""


@dataclass(frozen=True, slots=True)
class Shows(Claim):
    """One image shows such a shape."""

    noun: Noun
    side: Side

    def truth(self, pair: Pair) -> bool | None:
        """Whether the image of that side has a shape that fits."""
        return pair.side(self.side).has(self.noun)

    def phrasings(self) -> tuple[str, ...]:
        """Return sentences with the meaning of the claim."""
        noun, side = self.noun.singular, self.side
        return (
            f"the {side} image shows a {noun}",
            f"the {side} image contains a {noun}",
            f"there is a {noun} in the {side} image",
            f"a {noun} is in the {side} image",
        )


@dataclass(frozen=True, slots=True)
class Lacks(Claim):
    """One image shows no such shape."""

    noun: Noun
    side: Side

    def truth(self, pair: Pair) -> bool | None:
        """Whether the image of that side has no shape that fits."""
        return not pair.side(self.side).has(self.noun)

    def phrasings(self) -> tuple[str, ...]:
        """Return sentences with the meaning of the claim."""
        noun, side = self.noun.singular, self.side
        return (
            f"there is no {noun} in the {side} image",
            f"the {side} image does not show a {noun}",
            f"the {side} image does not contain a {noun}",
            f"the {side} image shows no {noun}",
        )


@dataclass(frozen=True, slots=True)
class InHowMany(Claim):
    """Both images show such a shape, or neither does."""

    noun: Noun
    which: Literal["both", "neither"]

    def truth(self, pair: Pair) -> bool | None:
        """Whether that many of the images have a shape that fits."""
        images = pair.left.has(self.noun) + pair.right.has(self.noun)
        return images == {"both": 2, "neither": 0}[self.which]

    def phrasings(self) -> tuple[str, ...]:
        """Return sentences with the meaning of the claim."""
        noun = self.noun.singular
        if self.which == "both":
            return (
                f"both images contain a {noun}",
                f"both images show a {noun}",
                f"each image shows a {noun}",
                f"there is a {noun} in both images",
            )
        return (
            f"neither image shows a {noun}",
            f"neither image contains a {noun}",
            f"there is no {noun} in either image",
        )


@dataclass(frozen=True, slots=True)
class OnlyIn(Claim):
    """One image shows such a shape, and the other does not."""

    noun: Noun
    side: Side

    def truth(self, pair: Pair) -> bool | None:
        """Whether that side has a shape that fits and the other side has none."""
        return pair.side(self.side).has(self.noun) and not pair.side(other(self.side)).has(self.noun)

    def phrasings(self) -> tuple[str, ...]:
        """Return sentences with the meaning of the claim."""
        noun, side = self.noun.singular, self.side
        return (
            f"only the {side} image shows a {noun}",
            f"only the {side} image contains a {noun}",
            f"there is a {noun} only in the {side} image",
        )


@dataclass(frozen=True, slots=True)
class Every(Claim):
    """All shapes of one image have an attribute."""

    value: str
    side: Side

    def truth(self, pair: Pair) -> bool | None:
        """Whether all of them have it. None when there is only one."""
        shapes = pair.side(self.side).shapes
        wanted = having(Noun(), self.value)
        return all(wanted.fits(shape) for shape in shapes) if len(shapes) > 1 else None

    def phrasings(self) -> tuple[str, ...]:
        """Return sentences with the meaning of the claim."""
        place = f"the {self.side} image"
        is_kind = self.value in KINDS
        only = having(Noun(), self.value).plural
        return (
            f"all shapes in {place} are {Noun(kind=self.value).plural if is_kind else self.value}",
            f"every shape in {place} is {'a ' if is_kind else ''}{self.value}",
            f"{place} shows only {only}",
            f"{place} contains only {only}",
        )


@dataclass(frozen=True, slots=True)
class The(Claim):
    """The one shape of its sort in an image has an attribute."""

    noun: Noun
    value: str
    side: Side

    def truth(self, pair: Pair) -> bool | None:
        """Whether that shape has it. None unless exactly one shape fits."""
        shapes = pair.side(self.side).matching(self.noun)
        return having(Noun(), self.value).fits(shapes[0]) if len(shapes) == 1 else None

    def phrasings(self) -> tuple[str, ...]:
        """Return sentences with the meaning of the claim."""
        value = f"a {self.value}" if self.value in KINDS else self.value
        return (
            f"the {self.noun.singular} in the {self.side} image is {value}",
            f"in the {self.side} image the {self.noun.singular} is {value}",
        )


@dataclass(frozen=True, slots=True)
class Above(Claim):
    """In one image, a shape lies in a higher (or lower) row than another one."""

    first: Noun
    second: Noun
    side: Side
    below: bool = False

    def truth(self, pair: Pair) -> bool | None:
        """Whether some such two shapes lie so. None when one of the sorts is missing, or both are equal."""
        scene = pair.side(self.side)
        if self.first == self.second or not (scene.has(self.first) and scene.has(self.second)):
            return None
        return scene.any_above(self.second, self.first) if self.below else scene.any_above(self.first, self.second)

    def phrasings(self) -> tuple[str, ...]:
        """Return sentences with the meaning of the claim."""
        relation = f"{'below' if self.below else 'above'} a {self.second.singular}"
        first, side = self.first.singular, self.side
        return (
            f"the {side} image shows a {first} {relation}",
            f"in the {side} image a {first} is {relation}",
            f"there is a {first} {relation} in the {side} image",
        )


@dataclass(frozen=True, slots=True)
class AtEnd(Claim):
    """In one image, such a shape lies in the top or the bottom row."""

    noun: Noun
    end: Literal["top", "bottom"]
    side: Side

    def truth(self, pair: Pair) -> bool | None:
        """Whether that row has a shape that fits. None when the image shows none at all."""
        scene = pair.side(self.side)
        if not scene.has(self.noun):
            return None
        return scene.any_in_row(self.noun, 0 if self.end == "top" else GRID - 1)

    def phrasings(self) -> tuple[str, ...]:
        """Return sentences with the meaning of the claim."""
        return (
            f"there is a {self.noun.singular} at the {self.end} of the {self.side} image",
            f"the {self.side} image shows a {self.noun.singular} at the {self.end}",
            f"a {self.noun.singular} is at the {self.end} of the {self.side} image",
        )


def having(noun: Noun, value: str) -> Noun:
    """Return the description with one more attribute: a kind, a colour or a size."""
    if value in KINDS:
        return Noun(value, noun.colour, noun.size)
    if value in COLOURS:
        return Noun(noun.kind, value, noun.size)
    if value in SIZES:
        return Noun(noun.kind, noun.colour, value)
    raise KeyError(value)
