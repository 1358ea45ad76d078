"""The published cleaning of captions, sentences and questions, swapping of left and right, and padded token ids."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch import Tensor

CAPTION_WORDS = 30
NLVR_WORDS = 40
QUESTION_WORDS = 50

_REMOVED = re.compile(r'[.!"()*#:;~]')
_SPACES = re.compile(r"\s{2,}")
_SIDES = re.compile(r"\b(left|right)\b", re.IGNORECASE)


def clean_caption(text: str, max_words: int = CAPTION_WORDS) -> str:
    """Clean a caption or NLVR sentence: lower case, `. ! " ( ) * # : ; ~` become spaces, at most max_words words.

    Runs of spaces become one, and spaces and line ends around the text are removed.
    """
    text = _SPACES.sub(" ", _REMOVED.sub(" ", text.lower()))
    return _first_words(text.rstrip("\n").strip(" "), max_words)


def clean_question(text: str, max_words: int = QUESTION_WORDS) -> str:
    """Clean a question: lower case, `. ! " ( ) * # : ; ~` are removed, at most max_words words.

    Unlike in captions, only spaces at the end are removed.
    """
    return _first_words(_REMOVED.sub("", text.lower()).rstrip(" "), max_words)


def _first_words(text: str, max_words: int) -> str:
    return " ".join(text.split(" ")[:max_words])


def swap_left_right(sentence: str) -> str:
    """Swap the words left and right ("leftover" and "bright" stay); twice restores the sentence."""
    return _SIDES.sub(lambda found: _opposite(found.group()), sentence)


def _opposite(side: str) -> str:
    opposite = "right" if side.lower() == "left" else "left"
    if side.isupper():
        return opposite.upper()
    return opposite.capitalize() if side[0].isupper() else opposite


def tokenize(tokenizer: Any, texts: Sequence[str], max_length: int | None = None) -> tuple[Tensor, Tensor]:
    """Return token ids and attention mask of texts, [texts, tokens] each, padded to the longest.

    Texts are truncated to `max_length` tokens; None keeps them whole.
    """
    text = tokenizer(
        list(texts),
        padding="longest",
        truncation=max_length is not None,
        max_length=max_length,
        return_tensors="pt",
    )
    return text["input_ids"], text["attention_mask"]
