"""The WordPiece vocabulary of the generated sentences, in the layout of BERT's vocab.txt."""

from __future__ import annotations

import string

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")

# fmt: off
WORDS = (
    "a", "above", "all", "also", "and", "any", "are", "at", "background", "below", "beside", "between",
    "blue", "both", "bottom", "by", "can", "center", "circle", "circles", "color", "column", "contain",
    "contained", "contains", "corner", "describe", "does", "each", "eight", "either", "empty", "every",
    "exactly", "fewer", "find", "five", "four", "green", "grey", "has", "have", "how", "image", "images",
    "in", "is", "it", "its", "kind", "large", "least", "left", "many", "middle", "more", "near", "neither",
    "next", "nine", "no", "none", "not", "nothing", "number", "object", "objects", "of", "on", "one", "only",
    "or", "other", "over", "picture", "pictures", "red", "right", "row", "same", "see", "seen", "seven",
    "shape", "shapes", "show", "shows", "side", "sides", "six", "size", "small", "some", "something",
    "square", "squares", "ten", "than", "the", "there", "three", "to", "top", "total", "triangle",
    "triangles", "two", "under", "visible", "what", "where", "which", "with", "yellow", "yes", "you", "zero",
)
# fmt: on
"""All words of generated sentences, captions, questions and answers."""


def vocabulary() -> list[str]:
    """Return the vocabulary in the order of ids.

    After the words come single characters, alone and as `##` continuations, so that ASCII text is tokenized without
    [UNK].
    """
    characters = string.ascii_lowercase + string.digits
    single = [character for character in characters if character not in WORDS]
    pieces = [f"##{character}" for character in characters]
    return [*SPECIAL, *WORDS, *single, *string.punctuation, *pieces]
