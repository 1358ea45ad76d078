"""The published clean-up of texts, and the exchange of left and right."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from upop.data.text import clean_caption, clean_question, swap_left_right


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A Dog.", "a dog"),
        ('He said: "No!" (twice) * # ; ~ end', "he said no twice end"),
        ("two  spaces\tand\n", "two spaces\tand"),
        ("it's a dog's, isn't it?", "it's a dog's, isn't it?"),
        ("a.b", "a b"),
        ("...", ""),
        ("", ""),
        ("  around  ", "around"),
    ],
)
def test_captions(text: str, expected: str):
    assert clean_caption(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("What is THIS?", "what is this?"),
        ("a.b: c; (d)!", "ab c d"),
        ("two  spaces ", "two  spaces"),
        ('"quoted" #1 * ~', "quoted 1"),
        ("", ""),
    ],
)
def test_questions(text: str, expected: str):
    assert clean_question(text) == expected


def test_texts_are_cut_to_the_number_of_words():
    text = " ".join(f"w{number}" for number in range(60))
    assert clean_caption(text).split() == text.split()[:30]
    assert clean_caption(text, 40).split() == text.split()[:40]
    assert clean_question(text).split() == text.split()[:50]


@given(st.text())
def test_cleaned_captions_hold_no_removed_mark_and_cleaning_again_changes_nothing(text: str):
    cleaned = clean_caption(text, 1000)
    assert not set('.!"()*#:;~') & set(cleaned)
    assert "  " not in cleaned
    if text.isascii():  # lower-casing some letters of other scripts has to be done twice
        assert clean_caption(cleaned, 1000) == cleaned


@pytest.mark.parametrize(
    ("sentence", "swapped"),
    [
        ("the left image has more than the right image", "the right image has more than the left image"),
        ("a bright leftover in the right image", "a bright leftover in the left image"),
        ("left, right; left-hand", "right, left; right-hand"),
        ("Left and RIGHT", "Right and LEFT"),
        ("both images", "both images"),
    ],
)
def test_left_and_right_change_places(sentence: str, swapped: str):
    assert swap_left_right(sentence) == swapped


@given(st.lists(st.sampled_from(["left", "right", "Left", "RIGHT", "bright", "image", ",", "-"])).map(" ".join))
def test_swapping_twice_gives_the_sentence_back(sentence: str):
    assert swap_left_right(swap_left_right(sentence)) == sentence
