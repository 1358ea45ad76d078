"""The official accuracy of visual question answering: how far an answer agrees with those of ten people."""

from __future__ import annotations

from collections.abc import Sequence

from upop.data.answers import ANSWER_TYPES, normalise_answer


def answer_accuracy(answer: str, people: Sequence[str]) -> float:
    """Return how right an answer is, 0 to 1.

    The answer is compared with every group of all people but one: it is right as far as three of them gave it too.

    Args:
        answer: as found.
        people: what each person answered, at least two of them.
    """
    agreeing = sum(normalise_answer(person) == normalise_answer(answer) for person in people)
    others = len(people) - agreeing
    return (agreeing * min(1.0, (agreeing - 1) / 3) + others * min(1.0, agreeing / 3)) / len(people)


def vqa_accuracy(answers: Sequence[str], people: Sequence[Sequence[str]], types: Sequence[str]) -> dict[str, float]:
    """Return the mean accuracy in percent, of all ("accuracy") and of each type of answer that occurs.

    Args:
        answers: one per question.
        people: ten answers per question.
        types: of `ANSWER_TYPES`, one per question.
    """
    found = [answer_accuracy(answer, wanted) for answer, wanted in zip(answers, people, strict=True)]
    scores = {"accuracy": _percent(found)}
    for kind in ANSWER_TYPES:
        if kind in types:
            name = f"accuracy_{kind.replace('/', '_')}"
            scores[name] = _percent([value for value, its in zip(found, types, strict=True) if its == kind])
    return scores


def _percent(values: Sequence[float]) -> float:
    return 100 * sum(values) / len(values)
