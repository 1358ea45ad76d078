"""Questions about single images: each is a function from a scene to its answer, with its phrasings.

`answer` derives the answer from the scene; it is None if the question does not apply ("what color is the circle?" with
two circles, or none).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from upop.demo.captions import ROWS
from upop.demo.claims import having
from upop.demo.scenes import KINDS, Noun, Scene, Shape


class Question(Protocol):
    """The interface of questions."""

    def answer(self, scene: Scene) -> str | None:
        """Return the answer in one or two words (numbers as digits); None if the question does not apply."""

    def phrasings(self) -> tuple[str, ...]:
        """Return questions with this meaning."""


def _yes(truth: bool) -> str:
    return "yes" if truth else "no"


@dataclass(frozen=True, slots=True)
class IsThere(Question):
    """Is there such a shape, anywhere or in one row?"""

    noun: Noun
    row: int | None = None

    def answer(self, scene: Scene) -> str | None:
        """Yes or no. None when a row is asked about and the scene shows no such shape at all."""
        if self.row is None:
            return _yes(scene.has(self.noun))
        return _yes(scene.any_in_row(self.noun, self.row)) if scene.has(self.noun) else None

    def phrasings(self) -> tuple[str, ...]:
        """Return questions with this meaning."""
        noun = self.noun.singular
        if self.row is None:
            return (
                f"is there a {noun}?",
                f"is there a {noun} in the picture?",
                f"can you see a {noun}?",
                f"does the picture show a {noun}?",
            )
        return (
            f"is there a {noun} {at_row(self.row)}?",
            f"does the {ROWS[self.row]} row contain a {noun}?",
            f"can you see a {noun} {at_row(self.row)}?",
        )


@dataclass(frozen=True, slots=True)
class IsAbove(Question):
    """Is such a shape in a higher (or lower) row than another one?"""

    first: Noun
    second: Noun
    below: bool = False

    def answer(self, scene: Scene) -> str | None:
        """Yes or no. None unless the scene shows one shape of each sort, and the sorts differ."""
        if self.first == self.second or scene.count(self.first) != 1 or scene.count(self.second) != 1:
            return None
        upper, lower = (self.second, self.first) if self.below else (self.first, self.second)
        return _yes(scene.any_above(upper, lower))

    def phrasings(self) -> tuple[str, ...]:
        """Return questions with this meaning."""
        first, second = self.first.singular, self.second.singular
        words = ("below", "under") if self.below else ("above", "over")
        return tuple(f"is the {first} {word} the {second}?" for word in words)


@dataclass(frozen=True, slots=True)
class AreThereMore(Question):
    """Are there more (or fewer) of one sort than of the other?"""

    first: Noun
    second: Noun
    fewer: bool = False

    def answer(self, scene: Scene) -> str | None:
        """Yes or no. None when the scene shows neither sort, or both are equal."""
        here, there = scene.count(self.first), scene.count(self.second)
        if self.first == self.second or not here + there:
            return None
        return _yes(here < there if self.fewer else here > there)

    def phrasings(self) -> tuple[str, ...]:
        """Return questions with this meaning."""
        things = f"{'fewer' if self.fewer else 'more'} {self.first.plural} than {self.second.plural}"
        return (
            f"are there {things}?",
            f"are there {things} in the picture?",
            f"does the picture show {things}?",
        )


@dataclass(frozen=True, slots=True)
class AreAll(Question):
    """Do all shapes have an attribute?"""

    value: str

    def answer(self, scene: Scene) -> str | None:
        """Yes or no. None when there is only one shape, or when none has it: too easy."""
        number = scene.count(having(Noun(), self.value))
        return _yes(number == len(scene.shapes)) if number and len(scene.shapes) > 1 else None

    def phrasings(self) -> tuple[str, ...]:
        """Return questions with this meaning."""
        is_kind = self.value in KINDS
        return (
            f"are all shapes {Noun(kind=self.value).plural if is_kind else self.value}?",
            f"is every shape {'a ' if is_kind else ''}{self.value}?",
            f"does the picture show only {having(Noun(), self.value).plural}?",
        )


@dataclass(frozen=True, slots=True)
class IsThe(Question):
    """Has the one shape of its sort an attribute?"""

    noun: Noun
    value: str

    def answer(self, scene: Scene) -> str | None:
        """Yes or no. None unless exactly one shape fits."""
        shape = _only(scene.matching(self.noun))
        return None if shape is None else _yes(having(Noun(), self.value).fits(shape))

    def phrasings(self) -> tuple[str, ...]:
        """Return questions with this meaning."""
        value = f"a {self.value}" if self.value in KINDS else self.value
        return (f"is the {self.noun.singular} {value}?",)


@dataclass(frozen=True, slots=True)
class HowMany(Question):
    """How many such shapes are there, anywhere or in one row?"""

    noun: Noun
    row: int | None = None

    def answer(self, scene: Scene) -> str | None:
        """The number, as a digit."""
        return str(sum(self.row in (None, shape.row) for shape in scene.matching(self.noun)))

    def phrasings(self) -> tuple[str, ...]:
        """Return questions with this meaning."""
        nouns = self.noun.plural
        if self.row is None:
            return (
                f"how many {nouns} are there?",
                f"how many {nouns} are in the picture?",
                f"how many {nouns} can you see?",
                f"how many {nouns} does the picture show?",
                f"what is the number of {nouns}?",
            )
        return (
            f"how many {nouns} are {at_row(self.row)}?",
            f"how many {nouns} does the {ROWS[self.row]} row contain?",
        )


@dataclass(frozen=True, slots=True)
class WhatIs(Question):
    """Which colour, kind, size or row has the one shape of its sort?"""

    noun: Noun
    asked: Literal["colour", "kind", "size", "row"]

    def answer(self, scene: Scene) -> str | None:
        """The attribute. None unless exactly one shape fits."""
        shape = _only(scene.matching(self.noun))
        if shape is None:
            return None
        return {"colour": shape.colour, "kind": shape.kind, "size": shape.size, "row": ROWS[shape.row]}[self.asked]

    def phrasings(self) -> tuple[str, ...]:
        """Return questions with this meaning."""
        noun = self.noun.singular
        return {
            "colour": (f"what color is the {noun}?", f"what is the color of the {noun}?"),
            "kind": (f"what is the {noun}?", f"what kind of shape is the {noun}?"),
            "size": (f"what size is the {noun}?", f"what is the size of the {noun}?"),
            "row": (f"where is the {noun}?", f"in which row is the {noun}?", f"which row contains the {noun}?"),
        }[self.asked]


@dataclass(frozen=True, slots=True)
class WhatIsAt(Question):
    """Which shape is in a row, with colour and kind?"""

    row: int

    def answer(self, scene: Scene) -> str | None:
        """Colour and kind. None unless that row holds exactly one shape."""
        shape = _only(tuple(shape for shape in scene.shapes if shape.row == self.row))
        return None if shape is None else f"{shape.colour} {shape.kind}"

    def phrasings(self) -> tuple[str, ...]:
        """Return questions with this meaning."""
        return (
            f"what is {at_row(self.row)}?",
            f"what can you see {at_row(self.row)}?",
            f"what does the {ROWS[self.row]} row contain?",
        )


def at_row(row: int) -> str:
    """Return the words for a row."""
    return "in the middle" if ROWS[row] == "middle" else f"at the {ROWS[row]}"


def _only(shapes: tuple[Shape, ...]) -> Shape | None:
    return shapes[0] if len(shapes) == 1 else None
