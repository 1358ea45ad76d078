"""The official accuracy of visual question answering: agreement with the answers of ten people."""

from __future__ import annotations

from collections.abc import Sequence

from upop.data.answers import ANSWER_TYPES, normalise_answer


def answer_accuracy(answer: str, people: Sequence[str]) -> float:
    """Return the accuracy of an answer, 0 to 1.

    It is min(matches / 3, 1), averaged over all subsets of people that leave out one.

    Args:
        answer: of the model.
        people: the answer of each person, at least two.
    """
    agreeing = sum(normalise_answer(person) == normalise_answer(answer) for person in people)
    others = len(people) - agreeing
    return (agreeing * min(1.0, (agreeing - 1) / 3) + others * min(1.0, agreeing / 3)) / len(people)


def vqa_accuracy(answers: Sequence[str], people: Sequence[Sequence[str]], types: Sequence[str]) -> dict[str, float]:
    """Return the mean accuracy in percent, overall ("accuracy") and for each answer type that occurs.

    Args:
        answers: one per question.
        people: ten answers per question.
        types: of `ANSWER_TYPES`, one per question.
    """
    found = [answer_accuracy(answer, wanted) for answer, wanted in zip(answers, people, strict=True)]
    scores = {"accuracy": mean_percent(found)}
    for kind in ANSWER_TYPES:
        if kind in types:
            name = f"accuracy_{kind.replace('/', '_')}"
            scores[name] = mean_percent([value for value, its in zip(found, types, strict=True) if its == kind])
    return scores


def mean_percent(values: Sequence[float]) -> float:
    """Return the mean of values from 0 to 1, in percent."""
    return 100 * sum(values) / len(values)
