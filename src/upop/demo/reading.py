"""Parses captions of generated images, to check whether a model's caption is true of its image.

The annotation files have no scenes, but one reference of every image mentions everything, which gives the scene.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from upop.demo.captions import ORDERS, ROWS, Caption, Group, Mention, Order
from upop.demo.counting import NUMBER_WORDS
from upop.demo.scenes import COLOURS, KINDS, SIZES, Noun, Scene, Shape
from upop.errors import DataError

_START = re.compile(r"(?:there (?:is|are)|only|exactly)\s+")
_TOTAL = re.compile(rf"({'|'.join(NUMBER_WORDS)}) shapes\s*,\s*")
_PART = re.compile(
    r"\s*(?:"
    rf"(?P<number>a|{'|'.join(NUMBER_WORDS)}) (?:(?P<size>{'|'.join(SIZES)}) )?(?P<colour>{'|'.join(COLOURS)}) "
    rf"(?P<kind>{'|'.join(KINDS)})(?P<plural>s?)\b"
    rf"|(?:at|in) the (?P<row>{'|'.join(ROWS)})(?: row)?\b"
    rf"|(?P<order>{'|'.join(word for words in ORDERS.values() for word in words)})\b"
    r"|(?P<join>,|and\b|with\b))"
)


def read_caption(text: str) -> Caption | None:
    """Parse a caption; None if it is not in the language of the generated captions, or contradicts itself."""
    text, total = text.strip(), None
    if found := _START.match(text):
        text = text[found.end() :]
    if found := _TOTAL.match(text):
        total, text = NUMBER_WORDS.index(found[1]), text[found.end() :]
    parts = _parts(text)
    if parts is None:
        return None
    groups: list[Group] = []
    mentions: list[Mention] = []
    orders: set[Order] = set()
    for name, found in parts:
        if name == "number":
            number = 1 if found["number"] == "a" else NUMBER_WORDS.index(found["number"])
            if number < 1 or (number > 1) != bool(found["plural"]):
                return None
            mentions.append(Mention(number, Noun(found["kind"], found["colour"], found["size"])))
        elif name != "join":
            if mentions:
                groups.append(Group(tuple(mentions), ROWS.index(found["row"]) if name == "row" else None))
                mentions = []
            if name == "order":
                orders.add("above" if found["order"] in ORDERS["above"] else "below")
    if mentions:
        groups.append(Group(tuple(mentions)))
    if len(orders) > 1:
        return None
    caption = Caption(tuple(groups), orders.pop() if orders else None)
    return caption if total in (None, caption.number) else None


def _parts(text: str) -> list[tuple[str, re.Match[str]]] | None:
    """Split a caption into named parts; None if their order is not valid."""
    parts: list[tuple[str, re.Match[str]]] = []
    place, before = 0, "join"
    while place < len(text):
        found = _PART.match(text, place)
        if found is None:
            return None
        name = next(name for name in ("number", "row", "order", "join") if found[name])
        # Shapes follow the start, a joining word or an order; everything else follows shapes or a row.
        if (name == "number") != (before in ("join", "order")) or (name == "row" and before == "row"):
            return None
        parts.append((name, found))
        place, before = found.end(), name
    return None if before in ("join", "order") else parts


def read_scene(captions: Sequence[str]) -> Scene:
    """Return the scene that one of the captions describes completely, with all shapes in the first column.

    Raises:
        DataError: none of them has size, colour, kind and row of every shape.
    """
    for caption in filter(None, map(read_caption, captions)):
        shapes = [
            Shape(str(mention.noun.kind), str(mention.noun.colour), mention.noun.size, group.row, 0)
            for group in caption.groups
            for mention in group.mentions
            for _ in range(mention.number)
            if group.row is not None and mention.noun.size is not None
        ]
        if len(shapes) == caption.number:
            return Scene(tuple(shapes))
    raise DataError(
        f"None of the captions has size, colour, kind and row of every shape: {list(captions)!r}. "
        "Only the generated captioning set (upop data shapes --task caption) is supported."
    )


def describes(text: str, captions: Sequence[str]) -> bool:
    """Whether a caption mentions every shape of the image, and nothing false.

    Args:
        text: the caption.
        captions: references of the image.

    Raises:
        DataError: the references do not describe the image completely.
    """
    scene, caption = read_scene(captions), read_caption(text)
    return caption is not None and caption.number == len(scene.shapes) and caption.fits(scene)


def exact_share(captions: Mapping[int, str], references: Mapping[int, Sequence[str]]) -> dict[str, float]:
    """Return "exact", the percentage of captions that mention every shape and nothing false.

    Args:
        captions: number of an image -> generated caption.
        references: number of an image -> references; {} is returned if they are not of the generated set.
    """
    try:
        exact = sum(describes(text, references[number]) for number, text in captions.items())
    except DataError:
        return {}
    return {"exact": 100 * exact / len(captions)}
