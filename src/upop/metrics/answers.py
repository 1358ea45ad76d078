"""Metrics of generated answers against reference answers: exact match, VQA accuracy, ANLS."""

from __future__ import annotations

from collections.abc import Sequence

from upop.data.answers import normalise_answer
from upop.metrics.vqa import answer_accuracy, mean_percent

_SIMILAR = 0.5
"""Lower similarities count as 0 in ANLS, as published (Biten et al., 2019)."""


def answer_scores(answers: Sequence[str], people: Sequence[Sequence[str]]) -> dict[str, float]:
    """Return exact_match and anls, and vqa_acc if every question has several references, in percent.

    Args:
        answers: one per question.
        people: reference answers, one or more per question.
    """
    pairs = list(zip(answers, people, strict=True))
    exact = [any(normalise_answer(answer) == normalise_answer(each) for each in wanted) for answer, wanted in pairs]
    similar = [anls(answer, wanted) for answer, wanted in pairs]
    scores = {"exact_match": mean_percent(exact), "anls": mean_percent(similar)}
    if all(len(wanted) > 1 for wanted in people):
        scores["vqa_acc"] = mean_percent([answer_accuracy(answer, wanted) for answer, wanted in pairs])
    return scores


def anls(answer: str, people: Sequence[str]) -> float:
    """Return the normalised Levenshtein similarity of an answer to its nearest reference, 0 to 1; ANLS averages it.

    Args:
        answer: generated text.
        people: reference answers.
    """
    found = max(_similarity(_plain(answer), _plain(each)) for each in people)
    return found if found >= _SIMILAR else 0.0


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def _similarity(one: str, other: str) -> float:
    longest = max(len(one), len(other))
    return 1 - _distance(one, other) / longest if longest else 1.0


def _distance(one: str, other: str) -> int:
    """Return the Levenshtein distance of two texts."""
    row = list(range(len(other) + 1))
    for number, letter in enumerate(one, 1):
        before, row[0] = row[0], number
        for place, wanted in enumerate(other, 1):
            before, row[place] = row[place], min(row[place] + 1, row[place - 1] + 1, before + (letter != wanted))
    return row[-1]
