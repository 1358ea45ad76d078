"""Draws samples like those of NLVR2: pairs of scenes, each with two true and two false sentences.

By construction, no word reveals the label. A *frame* fixes every choice that makes a sentence more or less likely to be
true: the template, the number of attributes of its nouns, and its number word. Frames, phrasings and labels are drawn
before any scene. Each set of four frames is used for two pairs with opposite labels, so every frame is true exactly as
often as false. Other words (colour, kind, size, side, end) are drawn by a process that is symmetric in them. So label
and text are independent, in expectation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import Literal

from upop.demo import claims as c
from upop.demo import counting as n
from upop.demo.claims import Claim, Pair, Side
from upop.demo.counting import Relation
from upop.demo.scenes import COLOURS, KINDS, SIZES, Noun, sample_palette, sample_scene

SENTENCES_PER_PAIR = 4
PAIRS_PER_BLOCK = 2
BLOCK = SENTENCES_PER_PAIR * PAIRS_PER_BLOCK
"""Sentences that are drawn together: two pairs with the same four frames and opposite labels."""

_FRESH_WORD = 0.5
"""Probability of replacing one attribute of a shape by a random one, which gives near misses."""
_PROPOSALS = 25
_SCENES = 400


@dataclass(frozen=True, slots=True)
class Frame:
    """A sentence without its symmetric words. A pair has at most one frame of a `family`."""

    family: str
    weight: float
    propose: Callable[[Random, Pair], Claim]


@dataclass(frozen=True, slots=True)
class Statement:
    """A sentence about a pair, its claim, and its label."""

    sentence: str
    claim: Claim
    label: bool


@dataclass(frozen=True, slots=True)
class Example:
    """A pair of scenes with four statements."""

    pair: Pair
    statements: tuple[Statement, ...]


_ATTRIBUTES = {"k": ("kind", KINDS), "c": ("colour", COLOURS), "z": ("size", SIZES)}


def _noun(rng: Random, pair: Pair, parts: str) -> Noun:
    """Return a description with these attributes (k, c, z) of a shape in the pair, or one word away from it."""
    shape = rng.choice(pair.left.shapes + pair.right.shapes)
    words = {_ATTRIBUTES[part][0]: getattr(shape, _ATTRIBUTES[part][0]) for part in parts}
    if parts and rng.random() < _FRESH_WORD:
        name, values = _ATTRIBUTES[rng.choice(parts)]
        words[name] = rng.choice(values)
    return Noun(**words)


def _side(rng: Random) -> Side:
    return rng.choice(("left", "right"))


def _word(rng: Random, part: str) -> str:
    return rng.choice(_ATTRIBUTES[part][1])


def _shows(rng: Random, pair: Pair, *, parts: str) -> Claim:
    return c.Shows(_noun(rng, pair, parts), _side(rng))


def _lacks(rng: Random, pair: Pair, *, parts: str) -> Claim:
    return c.Lacks(_noun(rng, pair, parts), _side(rng))


def _in_how_many(rng: Random, pair: Pair, *, parts: str, which: Literal["both", "neither"]) -> Claim:
    return c.InHowMany(_noun(rng, pair, parts), which)


def _only_in(rng: Random, pair: Pair, *, parts: str) -> Claim:
    return c.OnlyIn(_noun(rng, pair, parts), _side(rng))


def _count(rng: Random, pair: Pair, *, parts: str, total: bool, relation: Relation, number: int) -> Claim:
    return n.Count(_noun(rng, pair, parts), None if total else _side(rng), relation, number)


def _every(rng: Random, _pair: Pair, *, value: str) -> Claim:
    return c.Every(_word(rng, value), _side(rng))


def _the(rng: Random, pair: Pair, *, parts: str, value: str) -> Claim:
    return c.The(_noun(rng, pair, parts), _word(rng, value), _side(rng))


def _above(rng: Random, pair: Pair, *, parts: tuple[str, str], below: bool) -> Claim:
    first, second = _noun(rng, pair, parts[0]), _noun(rng, pair, parts[1])
    return c.Above(first, second, _side(rng), below)


def _at_end(rng: Random, pair: Pair, *, parts: str) -> Claim:
    return c.AtEnd(_noun(rng, pair, parts), rng.choice(("top", "bottom")), _side(rng))


def _more_in(rng: Random, pair: Pair, *, parts: str, fewer: bool) -> Claim:
    return n.MoreIn(_noun(rng, pair, parts), _side(rng), fewer)


def _same_number(rng: Random, pair: Pair, *, parts: str) -> Claim:
    return n.SameNumber(_noun(rng, pair, parts))


def _frames() -> Iterator[Frame]:
    """Yield all frames. The weights of a family add up to roughly its share of the sentences."""
    for parts in ("k", "c", "ck", "zk"):
        yield Frame("shows", 2.0, partial(_shows, parts=parts))
        yield Frame("lacks", 1.2, partial(_lacks, parts=parts))
    for parts in ("k", "c", "ck"):
        for which in ("both", "neither"):
            yield Frame("in how many", 1.0, partial(_in_how_many, parts=parts, which=which))
        yield Frame("only in", 0.8, partial(_only_in, parts=parts))
    counts: list[tuple[str, Relation, tuple[int, ...]]] = [
        ("", "exactly", (1, 2, 3, 4)),
        ("k", "exactly", (1, 2)),
        ("c", "exactly", (1, 2)),
        ("", "at least", (2, 3)),
        ("k", "at least", (2,)),
        ("c", "at least", (2,)),
    ]
    for parts, relation, numbers in counts:
        for number in numbers:
            yield Frame("count", 0.7, partial(_count, parts=parts, total=False, relation=relation, number=number))
    for number in (3, 4, 5, 6):
        yield Frame("total", 0.4, partial(_count, parts="", total=True, relation="exactly", number=number))
    for value in ("c", "k", "z"):
        yield Frame("every", 0.8, partial(_every, value=value))
    for parts, value in (("k", "c"), ("k", "z"), ("c", "k")):
        yield Frame("the", 1.0, partial(_the, parts=parts, value=value))
    for below in (False, True):
        for pattern in (("k", "k"), ("c", "c")):
            yield Frame("above", 0.9, partial(_above, parts=pattern, below=below))
    for parts in ("k", "c", "ck"):
        yield Frame("at end", 1.2, partial(_at_end, parts=parts))
    for parts in ("", "k", "c"):
        for fewer in (False, True):
            yield Frame("more in", 0.7, partial(_more_in, parts=parts, fewer=fewer))
        yield Frame("same number", 0.6, partial(_same_number, parts=parts))


FRAMES = tuple(_frames())
_WEIGHTS = tuple(frame.weight for frame in FRAMES)


@dataclass(frozen=True, slots=True)
class _Slot:
    """A frame, and its phrasing as a fraction (0 to below 1) of the number of phrasings."""

    frame: Frame
    phrasing: float


def _draw_slots(rng: Random) -> tuple[_Slot, ...]:
    chosen: dict[str, _Slot] = {}
    while len(chosen) < SENTENCES_PER_PAIR:
        frame = rng.choices(FRAMES, _WEIGHTS)[0]
        chosen.setdefault(frame.family, _Slot(frame, rng.random()))
    return tuple(chosen.values())


def _draw_pair(rng: Random) -> Pair:
    palette = sample_palette(rng)
    # Images with the same few attributes are harder to compare.
    second = palette if rng.random() < 0.5 else sample_palette(rng)
    return Pair(sample_scene(rng, palette), sample_scene(rng, second))


def _state(rng: Random, pair: Pair, slot: _Slot, label: bool) -> Statement | None:
    for _ in range(_PROPOSALS):
        claim = slot.frame.propose(rng, pair)
        if claim.truth(pair) is label:
            phrasings = claim.phrasings()
            return Statement(phrasings[int(slot.phrasing * len(phrasings))], claim, label)
    return None


def _draw_example(
    rng: Random,
    slots: tuple[_Slot, ...],
    labels: tuple[bool, ...],
    taken: Set[object],
    besides: Pair | None = None,
) -> Example | None:
    """Return a pair of scenes with a statement for each frame and label; None if a limited search finds none."""
    for _ in range(_SCENES):
        pair = _draw_pair(rng)
        content = pair.content
        if content in taken or len(content) == 1 or (besides is not None and content == besides.content):
            continue
        statements = []
        for slot, label in zip(slots, labels, strict=True):
            statement = _state(rng, pair, slot, label)
            if statement is None:
                break
            statements.append(statement)
        else:
            return Example(pair, tuple(statements))
    return None


def sample_block(rng: Random, taken: Set[object] = frozenset()) -> tuple[Example, Example]:
    """Draw two examples with the same four frames and opposite labels, two true and two false in each.

    `taken` holds contents (`Pair.content`) that must not be repeated. If one example cannot be made, both are redrawn:
    dropping only labels that are hard to meet would bias hard frames towards false.
    """
    while True:
        slots = _draw_slots(rng)
        labels = tuple(rng.sample((True, True, False, False), SENTENCES_PER_PAIR))
        first = _draw_example(rng, slots, labels, taken)
        if first is None:
            continue
        opposite = tuple(not label for label in labels)
        second = _draw_example(rng, slots, opposite, taken, besides=first.pair)
        if second is not None:
            return first, second


def sample_split(seed: int, split: str, records: int, taken: Set[object] = frozenset()) -> Iterator[Example]:
    """Yield examples of a split with at least `records` sentences (whole blocks), without repeating a pair.

    Block i depends on the seed, the split and i, and otherwise only on repeats, so a shorter split is the beginning of
    a longer one.
    """
    seen = set(taken)
    for index in range(-(-records // BLOCK)):
        for example in sample_block(Random(f"{seed}/{split}/{index}"), seen):
            seen.add(example.pair.content)
            yield example
