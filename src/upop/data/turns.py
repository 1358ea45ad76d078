"""Reads conversations from LLaVA's `conversations` and OpenAI's `messages`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from upop.errors import nearest


class ImageMark:
    """The position of the next image in a turn."""

    def __repr__(self) -> str:
        """Return LLaVA's mark."""
        return "<image>"

    def __reduce__(self) -> str:
        """Unpickle as the singleton `IMAGE`."""
        return "IMAGE"


IMAGE: Final = ImageMark()
Part = str | ImageMark
ROLES: Mapping[str, str] = {
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "system": "system",
    "developer": "system",
    "tool": "tool",
}
"""Role in files -> role in chat templates."""
_MARK = re.compile(r"\s*<image>\s*")
_IMAGES = ("image", "image_url", "input_image")
_TEXTS = ("text", "input_text", "output_text")


@dataclass(frozen=True)
class Turn:
    """One turn: texts and positions of images."""

    role: str
    parts: tuple[Part, ...]

    @property
    def text(self) -> str:
        """The texts of the turn, one per line."""
        return "\n".join(part for part in self.parts if isinstance(part, str))

    @property
    def images(self) -> int:
        """The number of images."""
        return sum(part is IMAGE for part in self.parts)


def read_turns(value: Any, images: Sequence[Any]) -> tuple[tuple[Turn, ...], tuple[Any, ...]]:
    """Return the turns of a conversation, and its images in order of appearance.

    Images without a mark go in front of the first user turn.

    Args:
        value: a list of {"role", "content"}, with text or a list of parts as content, or of {"from", "value"}.
        images: of the row; marks <image>, and parts of type "image" without their own image, stand for them.

    Raises:
        ValueError: it is something else, an answer is missing, or the numbers of marks and images differ.
    """
    if not isinstance(value, list | tuple) or not value:
        raise ValueError("must be a list of turns, [{'role': 'user', 'content': ...}, ...]")
    turns: list[Turn] = []
    placed: list[Any] = []  # None stands for the next image of the row
    for number, each in enumerate(value):
        if not isinstance(each, Mapping):
            raise ValueError(f"must hold objects with role and content; turn {number} is {type(each).__name__}")
        turns.append(_turn(each, number, placed))
    _check_answers(turns)
    own = iter(images)
    marks = sum(each is None for each in placed)
    if not marks and images:
        first = next((number for number, turn in enumerate(turns) if turn.role == "user"), None)
        if first is None:
            raise ValueError("has images, but no user turn to put them in")
        before = sum(turn.images for turn in turns[:first])
        turns[first] = Turn("user", (*[IMAGE] * len(images), *turns[first].parts))
        placed[before:before] = [None] * len(images)
        marks = len(images)
    if marks != len(images):
        raise ValueError(f"has {marks} <image> marks, but the row has {len(images)} images")
    return tuple(turns), tuple(next(own) if each is None else each for each in placed)


def _turn(each: Mapping[str, Any], number: int, placed: list[Any]) -> Turn:
    role = each.get("role") or each.get("from")
    if role is None:
        raise ValueError(f"has no role in turn {number}: there is neither role nor from")
    known = ROLES.get(str(role).lower())
    if known is None:
        near = nearest(str(role), list(ROLES))
        raise ValueError(f"has the role {role!r} in turn {number}{near}; known are {', '.join(ROLES)}")
    content = each.get("content") if each.get("content") is not None else each.get("value")
    if content is None:
        raise ValueError(f"has no text in turn {number} ({role}): there is neither content nor value")
    parts: list[Part] = []
    for part in [content] if isinstance(content, str | Mapping) else content:
        parts += _parts(part, number, placed)
    return Turn(known, tuple(parts))


def _parts(part: Any, number: int, placed: list[Any]) -> list[Part]:
    if isinstance(part, str):
        return _marked(part, placed)
    if not isinstance(part, Mapping):
        raise ValueError(f"holds a part of type {type(part).__name__} in turn {number}; it must be a text or an object")
    kind = part.get("type") or ("text" if part.get("text") is not None else "image")
    if kind in _TEXTS:
        if not isinstance(part.get("text"), str):
            raise ValueError(f"holds a part of type text without a text in turn {number}")
        return _marked(part["text"], placed)
    if kind in _IMAGES:
        source = next((part[name] for name in (kind, *_IMAGES, "url", "path") if part.get(name) is not None), None)
        if isinstance(source, Mapping) and source.get("url") is not None:
            source = source["url"]
        placed.append(source)
        return [IMAGE]
    raise ValueError(f"holds a part of type {kind!r} in turn {number}; only texts and images are supported")


def split_marks(text: str) -> list[Part]:
    """Split a text at the marks <image>, with image marks in between."""
    pieces = _MARK.split(text)
    parts: list[Part] = []
    for number, piece in enumerate(pieces):
        if number:
            parts.append(IMAGE)
        if piece or len(pieces) == 1:
            parts.append(piece)
    return parts


def _marked(text: str, placed: list[Any]) -> list[Part]:
    parts = split_marks(text)
    placed += [None for part in parts if part is IMAGE]
    return parts


def _check_answers(turns: Sequence[Turn]) -> None:
    answers = [(number, turn) for number, turn in enumerate(turns) if turn.role == "assistant"]
    if not answers:
        raise ValueError("has no answer: no turn has the role assistant (or gpt)")
    for number, turn in answers:
        if not turn.text.strip():
            raise ValueError(f"has an empty answer in turn {number}")
        if turn.images:
            raise ValueError(f"has an image in the answer of turn {number}; answers must be text")


__all__ = ["IMAGE", "ROLES", "ImageMark", "Part", "Turn", "read_turns", "split_marks"]
