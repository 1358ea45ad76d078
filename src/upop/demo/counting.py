"""Claims that count: numbers of shapes, and comparisons of numbers between the two images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from upop.demo.claims import Claim, Pair, Side, other
from upop.demo.scenes import Noun

Relation = Literal["exactly", "at least"]

NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight")


@dataclass(frozen=True, slots=True)
class Count(Claim):
    """The number of such shapes in one image, or (side None) in both together."""

    noun: Noun
    side: Side | None
    relation: Relation
    number: int

    def truth(self, pair: Pair) -> bool | None:
        """Whether the number of shapes that fit stands in that relation to the claimed number."""
        if self.side is None:
            found = pair.left.count(self.noun) + pair.right.count(self.noun)
        else:
            found = pair.side(self.side).count(self.noun)
        return {
            "exactly": found == self.number,
            "at least": found >= self.number,
        }[self.relation]

    def phrasings(self) -> tuple[str, ...]:
        """Return sentences with the meaning of the claim."""
        noun = self.noun.singular if self.number == 1 else self.noun.plural
        things = f"{NUMBER_WORDS[self.number]} {noun}"
        be = "is" if self.number == 1 else "are"
        place = "in total" if self.side is None else f"in the {self.side} image"
        subject, show, contain, have = (
            ("the two images", "show", "contain", "have")
            if self.side is None
            else (f"the {self.side} image", "shows", "contains", "has")
        )
        tail = " in total" if self.side is None else ""
        if self.relation != "exactly":
            return (
                f"there {be} {self.relation} {things} {place}",
                f"{subject} {contain} {self.relation} {things}{tail}",
                f"{subject} {have} {self.relation} {things}{tail}",
            )
        return (
            f"there {be} {things} {place}",
            f"there {be} exactly {things} {place}",
            f"{subject} {contain} exactly {things}{tail}",
            f"{subject} {show} {things}{tail}",
        )


@dataclass(frozen=True, slots=True)
class MoreIn(Claim):
    """One image shows more (or fewer) such shapes than the other."""

    noun: Noun
    side: Side
    fewer: bool = False

    def truth(self, pair: Pair) -> bool | None:
        """Whether the statement holds; None if neither image shows any."""
        here, there = pair.side(self.side).count(self.noun), pair.side(other(self.side)).count(self.noun)
        if not here + there:
            return None
        return here < there if self.fewer else here > there

    def phrasings(self) -> tuple[str, ...]:
        """Return sentences with the meaning of the claim."""
        things = f"{'fewer' if self.fewer else 'more'} {self.noun.plural}"
        here, there = self.side, other(self.side)
        return (
            f"the {here} image has {things} than the {there} image",
            f"the {here} image shows {things} than the {there} image",
            f"there are {things} in the {here} image than in the {there} image",
        )


@dataclass(frozen=True, slots=True)
class SameNumber(Claim):
    """Both images show equally many such shapes."""

    noun: Noun

    def truth(self, pair: Pair) -> bool | None:
        """Whether they do. None when neither image shows any."""
        left, right = pair.left.count(self.noun), pair.right.count(self.noun)
        return left == right if left + right else None

    def phrasings(self) -> tuple[str, ...]:
        """Return sentences with the meaning of the claim."""
        return (
            f"both images show the same number of {self.noun.plural}",
            f"both images have the same number of {self.noun.plural}",
            f"there is the same number of {self.noun.plural} in both images",
        )
