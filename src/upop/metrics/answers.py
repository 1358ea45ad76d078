"""How good written answers are, beside what people answered: exact match, VQA accuracy, ANLS."""

from __future__ import annotations

from collections.abc import Sequence

from upop.data.answers import normalise_answer
from upop.metrics.vqa import answer_accuracy

_SIMILAR = 0.5
"""Below this similarity ANLS counts an answer as wrong, as published (Biten et al., 2019)."""


def answer_scores(answers: Sequence[str], people: Sequence[Sequence[str]]) -> dict[str, float]:
    """Return the metrics of answers, in percent: exact_match, anls, and where several people answered vqa_acc.

    Args:
        answers: one per question.
        people: what is right, one or more per question.
    """
    pairs = list(zip(answers, people, strict=True))
    exact = [any(normalise_answer(answer) == normalise_answer(each) for each in wanted) for answer, wanted in pairs]
    scores = {"exact_match": _percent(exact), "anls": _percent([anls(answer, wanted) for answer, wanted in pairs])}
    if all(len(wanted) > 1 for wanted in people):
        scores["vqa_acc"] = _percent([answer_accuracy(answer, wanted) for answer, wanted in pairs])
    return scores


def anls(answer: str, people: Sequence[str]) -> float:
    """Return the average normalised Levenshtein similarity of an answer to the nearest of those that are right, 0 to 1.

    Args:
        answer: as written.
        people: what is right.
    """
    found = max(_similarity(_plain(answer), _plain(each)) for each in people)
    return found if found >= _SIMILAR else 0.0


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def _similarity(one: str, other: str) -> float:
    longest = max(len(one), len(other))
    return 1 - _distance(one, other) / longest if longest else 1.0


def _distance(one: str, other: str) -> int:
    """The fewest letters to put in, take out or change that make one text the other."""
    row = list(range(len(other) + 1))
    for number, letter in enumerate(one, 1):
        before, row[0] = row[0], number
        for place, wanted in enumerate(other, 1):
            before, row[place] = row[place], min(row[place] + 1, row[place - 1] + 1, before + (letter != wanted))
    return row[-1]


def _percent(values: Sequence[float]) -> float:
    return 100 * sum(values) / len(values)
