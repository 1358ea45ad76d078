"""Normalises human answers for visual question answering, and determines their types.

The rules are those of https://visualqa.org/evaluation.html. The official script skips normalisation if all ten people
gave the same answer, so that "two" for "2" can count as wrong; here answers are always normalised.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from functools import lru_cache

ANNOTATORS = 10
ANSWER_TYPES = ("yes/no", "number", "other")

_NUMBERS = {
    word: str(number)
    for number, word in enumerate(
        ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    )
} | {"none": "0"}
_ARTICLES = frozenset(("a", "an", "the"))

_CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
    he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't
    needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've
    somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll
    that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've
    weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll
    why're why's won't would've wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're you've
"""
# Restores one missing apostrophe ("dont", "couldn'tve"). The list leaves out contractions that become another word
# without it, such as "ill", "well", "shed" and "lets".
_CONTRACTIONS = {
    word[:place] + word[place + 1 :]: word
    for word in _CONTRACTED.split()
    for place, letter in enumerate(word)
    if letter == "'"
}

_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_DIGITS_AROUND_COMMA = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
_NUMBER = re.compile(r"[+-]?\d[\d.,:/]*%?")


@lru_cache(maxsize=100_000)
def normalise_answer(answer: str) -> str:
    """Normalise an answer: lower case, no articles, punctuation or number words, corrected apostrophes."""
    text = re.sub(r"[\n\t]", " ", answer).strip()
    joined = bool(_DIGITS_AROUND_COMMA.search(text))
    cleaned = text
    for mark in _MARKS:
        # A mark next to a space is removed; one between two letters becomes a space.
        removed = joined or f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if removed else " ")
    words = (_NUMBERS.get(word, word) for word in _PERIOD.sub("", cleaned).lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def answer_type(people: Iterable[str]) -> str:
    """Return the type of a question (one of `ANSWER_TYPES`) by its most frequent answer."""
    common = Counter(map(normalise_answer, people)).most_common(1)[0][0]
    if common in ("yes", "no"):
        return "yes/no"
    return "number" if _NUMBER.fullmatch(common) else "other"
