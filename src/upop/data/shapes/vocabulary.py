"""The WordPiece vocabulary of the generated sentences, in the layout of BERT's vocab.txt."""

from __future__ import annotations

import string

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")

# fmt: off
WORDS = (
    "a", "above", "all", "are", "at", "below", "blue", "both", "bottom", "circle", "circles",
    "contain", "contains", "does", "each", "either", "every", "exactly", "fewer", "five", "four", "green",
    "has", "have", "image", "images", "in", "is", "large", "least", "left", "more", "neither",
    "no", "not", "number", "of", "one", "only", "red", "right", "same", "shape", "shapes",
    "show", "shows", "six", "small", "square", "squares", "than", "the", "there", "three", "top",
    "total", "triangle", "triangles", "two", "yellow",
)
# fmt: on
"""Every word that a generated sentence can hold, and no other one."""


def vocabulary() -> list[str]:
    """All entries; an entry's number is its place.

    After the words come single characters, alone and as `##` continuations, so that any ASCII text is
    tokenized without [UNK].
    """
    characters = string.ascii_lowercase + string.digits
    single = [character for character in characters if character not in WORDS]
    pieces = [f"##{character}" for character in characters]
    return [*SPECIAL, *WORDS, *single, *string.punctuation, *pieces]
