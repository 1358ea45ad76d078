"""The official accuracy of VQA: cases worked out by hand, and what must hold of any."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from upop.data.answers import ANSWER_TYPES, answer_type, normalise_answer
from upop.metrics.vqa import answer_accuracy, vqa_accuracy


@pytest.mark.parametrize(
    ("agreeing", "accuracy"),
    # Among nine of ten people: where one of three agreeing is left out, two are left.
    [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (9, 1.0), (10, 1.0)],
)
def test_accuracy_by_the_number_who_agree(agreeing: int, accuracy: float) -> None:
    people = ["red"] * agreeing + [f"other {number}" for number in range(10 - agreeing)]
    assert answer_accuracy("red", people) == pytest.approx(accuracy)


def test_accuracy_is_the_mean_over_all_groups_of_nine() -> None:
    people = ["yes", "yes", "no", "no", "no", "maybe", "a maybe", "Yes.", "2", "two"]
    for answer in ("yes", "no", "maybe", "2", "none of it"):
        clean = [normalise_answer(person) for person in people]
        groups = itertools.combinations(clean, 9)
        expected = [min(1, group.count(normalise_answer(answer)) / 3) for group in groups]
        assert answer_accuracy(answer, people) == pytest.approx(sum(expected) / 10)


@pytest.mark.parametrize(
    ("answer", "normal"),
    [
        # Case, spaces and line ends.
        ("Red  Car ", "red car"),
        ("red\tcar\n", "red car"),
        ("", ""),
        # Articles, as words of their own.
        ("the dog", "dog"),
        ("a cat and an owl", "cat and owl"),
        ("theatre", "theatre"),
        ("A", ""),
        # Number words.
        ("two", "2"),
        ("Ten people", "10 people"),
        ("none", "0"),
        ("zero", "0"),
        ("eleven", "eleven"),
        ("someone", "someone"),
        # Full stops go, but for those before a digit.
        ("yes.", "yes"),
        ("u.s.a.", "usa"),
        ("2.5", "2.5"),
        ("1. place", "1 place"),
        # Marks: a space takes their place between letters, nothing beside a space.
        ("t-shirt", "t shirt"),
        ("black/white", "black white"),
        ("red, white", "red white"),
        ("red,white", "red white"),
        ("what?", "what"),
        ("yes!", "yes"),
        ('"stop"', "stop"),
        ("salt (and pepper)", "salt and pepper"),
        # A comma between digits joins them, and so does every mark of such an answer.
        ("1,000", "1000"),
        ("1,000-2", "10002"),
        # Apostrophes that are missing.
        ("dont know", "don't know"),
        ("isnt", "isn't"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("oclock", "o'clock"),
        ("Thats", "that's"),
        ("don't", "don't"),
        ("well", "well"),
        ("lets", "lets"),
        # All at once.
        ("The two dogs arent there.", "2 dogs aren't there"),
    ],
)
def test_normalised_answers(answer: str, normal: str) -> None:
    assert normalise_answer(answer) == normal


def test_answers_are_compared_in_their_normal_form() -> None:
    people = ["2", "two", "Two.", "the two", "3", "3", "3", "3", "3", "4"]
    assert answer_accuracy("two", people) == 1
    assert answer_accuracy("Three", people) == 1
    assert answer_accuracy("four", people) == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("people", "kind"),
    [
        (["Yes"] * 6 + ["2"] * 4, "yes/no"),
        (["no."] * 9 + ["maybe"], "yes/no"),
        (["two"] * 4 + ["2"] * 2 + ["many"] * 4, "number"),
        (["2:30"] * 10, "number"),
        (["1,000"] * 10, "number"),
        (["50%"] * 10, "number"),
        (["blue"] * 10, "other"),
        (["7up"] * 10, "other"),
        (["yes it is"] * 10, "other"),
    ],
)
def test_type_of_answers(people: list[str], kind: str) -> None:
    assert answer_type(people) == kind


def test_means_of_all_and_by_type() -> None:
    people = [["yes"] * 10, ["2"] * 3 + ["3"] * 7, ["no"] * 10]
    found = vqa_accuracy(["yes", "two", "yes"], people, ["yes/no", "number", "yes/no"])
    assert found == pytest.approx({"accuracy": 190 / 3, "accuracy_yes_no": 50, "accuracy_number": 90})


def test_answers_for_other_questions_are_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        vqa_accuracy(["yes"], [["yes"] * 10] * 2, ["yes/no"] * 2)


ANSWERS = st.sampled_from(["yes", "Yes.", "no", "two", "2", "the dog", "dog", "dont", "don't", ""]) | st.text(
    max_size=6
)


@given(answer=ANSWERS, people=st.lists(ANSWERS, min_size=10, max_size=10), place=st.integers(0, 9))
def test_accuracy_is_a_share_and_grows_with_those_who_agree(answer: str, people: list[str], place: int) -> None:
    before = answer_accuracy(answer, people)
    assert 0 <= before <= 1
    assert answer_accuracy(answer, people[::-1]) == before
    people[place] = answer
    assert before <= answer_accuracy(answer, people) <= 1
    assert answer_type(people) in ANSWER_TYPES


@given(answer=st.text())
def test_a_normal_form_has_single_spaces_and_no_capitals(answer: str) -> None:
    found = normalise_answer(answer)
    assert found == " ".join(found.split())
    assert found == found.lower()
