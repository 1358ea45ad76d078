"""Texts about a pair of images in which some words are wrong and others hidden, with the answers to both.

Two kinds: lists, which name shapes with all that can be said of them ("left top large red circle"), and facts in
sentences ("the left image shows a circle above a red shape"). Lists put a question to nearly every word, which teaches
a model to tie words to one shape; facts lead on to whole sentences.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from upop.demo.scenes import COLOURS, KINDS, SIZES, Noun, Scene, Shape

SIDES = ("left", "right")
ROWS = ("top", "middle", "bottom")
NUMBERS = ("one", "two", "three", "four")
ENDS = {"top": 0, "bottom": 2}
PLURALS = tuple(f"{kind}s" for kind in KINDS)
PLACES = (*ENDS, "above", "below")
_GROUPS = (KINDS, COLOURS, SIZES, NUMBERS, tuple(ENDS), ("above", "below"), PLURALS)
OTHERS = {word: [other for other in group if other != word] for group in _GROUPS for word in group}
IGNORED = -100
LISTS = 0.6

Truth = Callable[[list[str]], bool]


@dataclass(frozen=True)
class Fact:
    """A few words about a scene, and a function that says whether words of the same form are true of it."""

    words: list[str]
    holds: Truth


def noun_words(shape: Shape, parts: str) -> list[str]:
    """Return the words of a shape with the attributes in `parts` (z, c, k)."""
    words = [word for part, word in (("z", shape.size), ("c", shape.colour), ("k", shape.kind)) if part in parts]
    return words if "k" in parts else [*words, "shape"]


def noun(words: list[str]) -> Noun:
    """Return the description that the words make."""
    return Noun(
        kind=next((kind for kind in KINDS if words[-1] in (kind, f"{kind}s")), None),
        colour=next((word for word in words if word in COLOURS), None),
        size=next((word for word in words if word in SIZES), None),
    )


def draw_fact(rng: Random, scene: Scene) -> Fact:
    """Return a true fact about the scene: something is there, at an end, above something, or so many."""
    shape = rng.choice(scene.shapes)
    parts = rng.choice(("k", "c", "ck", "ck", "zk", "zck"))
    form = rng.random()
    if form < 0.35:
        return Fact(["a", *noun_words(shape, parts)], lambda words: scene.has(noun(words[1:])))
    if form < 0.65 and shape.row != 1:
        return _at_end(rng, scene, shape, noun_words(shape, parts))
    others = [other for other in scene.shapes if other.row != shape.row]
    if form < 0.8 and others:
        return _relation(rng, scene, shape, rng.choice(others))
    counted = noun_words(shape, rng.choice(("k", "c", "")))
    number = scene.count(noun(counted))
    if number > 1:
        counted[-1] += "s"
    return Fact(
        [NUMBERS[number - 1], *counted], lambda words: scene.count(noun(words[1:])) == 1 + NUMBERS.index(words[0])
    )


def _at_end(rng: Random, scene: Scene, shape: Shape, words: list[str]) -> Fact:
    place, described = ["at", "the", "top" if shape.row == 0 else "bottom"], ["a", *words]
    if rng.random() < 0.5:
        return Fact([*place, *described], lambda said: scene.any_in_row(noun(said[4:]), ENDS[said[2]]))
    return Fact([*described, *place], lambda said: scene.any_in_row(noun(said[1:-3]), ENDS[said[-1]]))


def _relation(rng: Random, scene: Scene, shape: Shape, other: Shape) -> Fact:
    part = rng.choice("kc")
    first, second = noun_words(shape, part), noun_words(other, part)
    place = 1 + len(first)

    def holds(words: list[str]) -> bool:
        upper, lower = noun(words[1:place]), noun(words[place + 2 :])
        return scene.any_above(upper, lower) if words[place] == "above" else scene.any_above(lower, upper)

    return Fact(["a", *first, "above" if shape.is_above(other) else "below", "a", *second], holds)


def spoilt(rng: Random, fact: Fact) -> tuple[list[str], int | None]:
    """Return the fact's words with one of them changed so that they are false, and its place; None if none does."""
    places = [place for place, word in enumerate(fact.words) if word in OTHERS]
    rng.shuffle(places)
    for place in places:
        words = list(fact.words)
        words[place] = rng.choice(OTHERS[words[place]])
        if not fact.holds(words):
            return words, place
    return fact.words, None


@dataclass(frozen=True)
class Description:
    """A text about two images: token ids; per token whether it is wrong, and what was masked; whether all is true."""

    ids: list[int]
    wrong: list[int]
    hidden: list[int]
    true: int


class _Text:
    """Collects the words of a description."""

    def __init__(self) -> None:
        self.words, self.wrong, self.hidden = ["[CLS]"], [IGNORED], [""]

    def add(self, word: str, wrong: int = IGNORED) -> None:
        self.words.append(word)
        self.wrong.append(wrong)
        self.hidden.append("")

    def hide(self, place: int) -> None:
        self.hidden[place], self.words[place], self.wrong[place] = self.words[place], "[MASK]", IGNORED

    def done(self, vocabulary: dict[str, int], *, true: bool) -> Description:
        self.add("[SEP]")
        hidden = [vocabulary[word] if word else IGNORED for word in self.hidden]
        return Description([vocabulary[word] for word in self.words], self.wrong, hidden, int(true))


def describe(rng: Random, pair: tuple[Scene, Scene], vocabulary: dict[str, int]) -> Description:
    """Return a list of shapes or one to three facts, some with a wrong word, some words hidden."""
    return (_list if rng.random() < LISTS else _facts)(rng, pair, vocabulary)


def _list(rng: Random, pair: tuple[Scene, Scene], vocabulary: dict[str, int]) -> Description:
    places = [(side, shape) for side in (0, 1) for shape in pair[side].shapes]
    rng.shuffle(places)
    text, true = _Text(), True
    for side, shape in places[: rng.choice((2, 3, 4))]:
        right = [SIDES[side], ROWS[shape.row], shape.size, shape.colour, shape.kind]
        said = list(right)
        spoil, at = rng.random() < 0.4, rng.randrange(5)
        if spoil:
            group = (SIDES, ROWS, SIZES, COLOURS, KINDS)[at]
            said[at] = rng.choice([word for word in group if word != right[at]])
            if _is_there(pair[SIDES.index(said[0])], said):
                said, spoil = right, False
        true &= not spoil
        for word, meant in zip(said, right, strict=True):
            text.add(word, int(word != meant))
            if not spoil and rng.random() < 0.3:
                text.hide(-1)
    return text.done(vocabulary, true=true)


def _is_there(scene: Scene, said: list[str]) -> bool:
    _, row, size, colour, kind = said
    return scene.any_in_row(Noun(kind, colour, size), ROWS.index(row))


def _facts(rng: Random, pair: tuple[Scene, Scene], vocabulary: dict[str, int]) -> Description:
    facts = rng.choice((1, 1, 2, 2, 3))
    spoil = rng.randrange(facts) if rng.random() < 0.5 else None
    text, true = _Text(), True
    for number in range(facts):
        side = rng.randrange(2)
        fact = draw_fact(rng, pair[side])
        said, place = spoilt(rng, fact) if number == spoil else (fact.words, None)
        true &= place is None
        for word in ("the", SIDES[side], "image", "shows"):
            text.add(word)
        for at, word in enumerate(said):
            text.add(word, int(at == place) if word in OTHERS else IGNORED)
    for at, word in enumerate(text.words):
        if text.wrong[at] == 0 and rng.random() < (0.5 if word in PLACES else 0.25):
            text.hide(at)
    return text.done(vocabulary, true=true)
