"""Draws samples like those of VQA: an image with four questions, each answered by ten annotators.

A question alone does not reveal its answer. A *frame* fixes the sort of question and all words that are not drawn
symmetrically. Within a frame all answers are equally frequent: a frame uses each of its answers once before it repeats
one, and waits for an image with an answer that is due. Other words (colour, kind, size) are drawn by a process that is
symmetric in them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import Literal

from upop.demo import questions as q
from upop.demo.captions import ROWS
from upop.demo.counting import NUMBER_WORDS
from upop.demo.questions import Question
from upop.demo.scenes import COLOURS, KINDS, MAX_SHAPES, SIZES, Noun, Scene, sample_scene
from upop.demo.singles import sample_scenes

QUESTIONS_PER_IMAGE = 4
ANNOTATORS = 10
SHARES = {"train": 0.7, "vg": 0.1, "val": 0.1, "test": 0.1}
"""Share of all possible images in each split."""

AnswerType = Literal["yes/no", "number", "other"]

_YES_NO = ("yes", "no")
_COLOURED = tuple(f"{colour} {kind}" for colour in COLOURS for kind in KINDS)
_FRESH_WORD = 0.5
"""Probability of replacing one attribute of a shape by a random one, which gives near misses."""
_PROPOSALS = 12
_DISSENTERS = {0: 0.6, 1: 0.15, 2: 0.15, 3: 0.1}
"""Number of annotators who give another answer -> probability."""
_OTHER_WORDS = 0.5
"""Probability that such an annotator gives the same answer in other words; otherwise it is wrong."""


@dataclass(frozen=True, slots=True)
class Frame:
    """A question without its symmetric words, and its possible answers. An image has at most one of a `family`."""

    family: str
    weight: float
    answer_type: AnswerType
    answers: tuple[str, ...]
    propose: Callable[[Random, Scene], Question]


@dataclass(frozen=True, slots=True)
class AnnotatedQuestion:
    """A question about an image: its meaning, its text, the correct answer, and the answers of ten annotators."""

    question: Question
    frame: Frame
    text: str
    answer: str
    answers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Example:
    """A scene with its questions."""

    scene: Scene
    questions: tuple[AnnotatedQuestion, ...]


_ATTRIBUTES = {"k": ("kind", KINDS), "c": ("colour", COLOURS), "z": ("size", SIZES)}


def _noun(rng: Random, scene: Scene, parts: str, fresh: float = _FRESH_WORD) -> Noun:
    """Return a description with these attributes (k, c, z) of a shape in the scene, or one word away from it."""
    shape = rng.choice(scene.shapes)
    words = {_ATTRIBUTES[part][0]: getattr(shape, _ATTRIBUTES[part][0]) for part in parts}
    if parts and rng.random() < fresh:
        name, values = _ATTRIBUTES[rng.choice(parts)]
        words[name] = rng.choice(values)
    return Noun(**words)


def _is_there(rng: Random, scene: Scene, *, parts: str, row: int | None = None) -> Question:
    return q.IsThere(_noun(rng, scene, parts), row)


def _is_above(rng: Random, scene: Scene, *, parts: str, below: bool) -> Question:
    return q.IsAbove(_noun(rng, scene, parts, 0), _noun(rng, scene, parts, 0), below)


def _more(rng: Random, scene: Scene, *, parts: str, fewer: bool) -> Question:
    return q.AreThereMore(_noun(rng, scene, parts), _noun(rng, scene, parts), fewer)


def _are_all(rng: Random, scene: Scene, *, value: str) -> Question:
    return q.AreAll(getattr(rng.choice(scene.shapes), _ATTRIBUTES[value][0]))


def _is_the(rng: Random, scene: Scene, *, parts: str, value: str) -> Question:
    return q.IsThe(_noun(rng, scene, parts, 0), rng.choice(_ATTRIBUTES[value][1]))


def _how_many(rng: Random, scene: Scene, *, parts: str, row: int | None = None) -> Question:
    return q.HowMany(_noun(rng, scene, parts), row)


def _what_is(rng: Random, scene: Scene, *, parts: str, asked: Literal["colour", "kind", "size", "row"]) -> Question:
    return q.WhatIs(_noun(rng, scene, parts, 0), asked)


def _what_is_at(_rng: Random, _scene: Scene, *, row: int) -> Question:
    return q.WhatIsAt(row)


def _digits(first: int, last: int) -> tuple[str, ...]:
    return tuple(str(number) for number in range(first, last + 1))


def _frames() -> Iterator[Frame]:
    """Yield all frames. The weights of a family add up to roughly its share of the questions."""
    for parts in ("k", "c", "ck", "zk"):
        yield Frame("is there", 0.5, "yes/no", _YES_NO, partial(_is_there, parts=parts))
    for parts in ("k", "c"):
        for row in range(len(ROWS)):
            yield Frame("is there at", 0.2, "yes/no", _YES_NO, partial(_is_there, parts=parts, row=row))
        for flag in (False, True):
            yield Frame("is above", 0.5, "yes/no", _YES_NO, partial(_is_above, parts=parts, below=flag))
            yield Frame("are there more", 0.25, "yes/no", _YES_NO, partial(_more, parts=parts, fewer=flag))
    for value in ("c", "k", "z"):
        yield Frame("are all", 0.3, "yes/no", _YES_NO, partial(_are_all, value=value))
    for parts, value in (("k", "c"), ("k", "z"), ("c", "k")):
        yield Frame("is the", 0.4, "yes/no", _YES_NO, partial(_is_the, parts=parts, value=value))
    counted = {"": _digits(1, MAX_SHAPES), "k": _digits(0, 3), "c": _digits(0, 3), "ck": _digits(0, 2)}
    for parts, answers in counted.items():
        yield Frame("how many", 1.0, "number", answers, partial(_how_many, parts=parts))
    for row in range(len(ROWS)):
        yield Frame("how many at", 0.5, "number", _digits(0, 2), partial(_how_many, parts="", row=row))
    for parts in ("k", "zk"):
        yield Frame("what color", 1.4, "other", COLOURS, partial(_what_is, parts=parts, asked="colour"))
    for parts in ("c", "zc"):
        yield Frame("what kind", 1.0, "other", KINDS, partial(_what_is, parts=parts, asked="kind"))
    for parts in ("k", "ck"):
        yield Frame("what size", 0.6, "other", SIZES, partial(_what_is, parts=parts, asked="size"))
        yield Frame("where", 0.8, "other", ROWS, partial(_what_is, parts=parts, asked="row"))
    for row in range(len(ROWS)):
        yield Frame("what is at", 0.9, "other", _COLOURED, partial(_what_is_at, row=row))


FRAMES = tuple(_frames())

_SAME = {
    **{str(number): (word,) for number, word in enumerate(NUMBER_WORDS[: MAX_SHAPES + 1])},
    "0": ("zero", "none"),
    **{kind: (f"a {kind}",) for kind in KINDS},
    **{row: (f"at the {row}" if row != "middle" else "in the middle",) for row in ROWS},
    **{thing: (f"a {thing}",) for thing in _COLOURED},
}
"""Answer -> the same answer in other words."""


def answer_list() -> list[str]:
    """Return all possible answers, in all wordings."""
    usual = dict.fromkeys(answer for frame in FRAMES for answer in frame.answers)
    return [*usual, *(wording for answer in usual for wording in _SAME.get(answer, ()))]


def annotate(rng: Random, frame: Frame, answer: str) -> tuple[str, ...]:
    """Return the answers of ten annotators: most are correct, some are in other words, or wrong."""
    dissenters = rng.choices(list(_DISSENTERS), list(_DISSENTERS.values()))[0]
    written = [answer] * ANNOTATORS
    for place in rng.sample(range(ANNOTATORS), dissenters):
        if answer in _SAME and rng.random() < _OTHER_WORDS:
            written[place] = rng.choice(_SAME[answer])
        else:
            written[place] = rng.choice([other for other in frame.answers if other != answer])
    return tuple(written)


class _Decks:
    """The answers that are due in every frame: each once, before all are due again."""

    def __init__(self) -> None:
        self._left: dict[Frame, list[str]] = {frame: list(frame.answers) for frame in FRAMES}

    def is_due(self, frame: Frame, answer: str | None) -> bool:
        return answer in self._left[frame]

    def met(self, frame: Frame, answer: str) -> None:
        self._left[frame].remove(answer)
        if not self._left[frame]:
            self._left[frame] = list(frame.answers)


def _ask(rng: Random, scene: Scene, decks: _Decks) -> list[tuple[Frame, Question, str]]:
    """Return up to four questions of different families, with answers that are due."""
    # Weighted order without replacement: the frame with the largest random() ** (1 / weight) comes first.
    order = sorted(FRAMES, key=lambda frame: rng.random() ** (1 / frame.weight), reverse=True)
    found: dict[str, tuple[Frame, Question, str]] = {}
    for frame in order:
        if len(found) == QUESTIONS_PER_IMAGE:
            break
        if frame.family in found:
            continue
        for _ in range(_PROPOSALS):
            question = frame.propose(rng, scene)
            answer = question.answer(scene)
            if answer is not None and decks.is_due(frame, answer):
                found[frame.family] = frame, question, answer
                break
    return list(found.values())


def sample_examples(seed: int, split: str) -> Iterator[Example]:
    """Yield examples of a split with four questions each, without end."""
    rng = Random(f"{seed}/vqa/{split}")
    decks = _Decks()
    for scene in sample_scenes(rng, seed, split, SHARES, sample_scene):
        chosen = _ask(rng, scene, decks)
        if len(chosen) < QUESTIONS_PER_IMAGE:
            continue
        questions = []
        for frame, question, answer in chosen:
            decks.met(frame, answer)
            text = rng.choice(question.phrasings())
            questions.append(AnnotatedQuestion(question, frame, text, answer, annotate(rng, frame, answer)))
        yield Example(scene, tuple(questions))
