"""Names of tensors in two libraries: whole names, and names within the blocks of a tower, as pairs of strings."""

from __future__ import annotations

from collections.abc import Iterable

Pairs = tuple[tuple[str, str], ...]
"""(name there, name here), or the beginnings of names."""


def replaced(name: str, pairs: Iterable[tuple[str, str]]) -> str:
    """Return the name with its beginning replaced, by the first pair that has it."""
    for old, new in pairs:
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def in_block(name: str, blocks: Iterable[tuple[str, str]], parts: Iterable[tuple[str, str]]) -> str:
    """Return the name with the beginning replaced that leads to a numbered block, and what follows the number."""
    for old, new in blocks:
        if name.startswith(old):
            number, _, part = name.removeprefix(old).partition(".")
            return f"{new}{number}.{replaced(part, parts)}"
    return name


def turned(pairs: Iterable[tuple[str, str]]) -> Pairs:
    """Return the pairs for the other direction."""
    return tuple((new, old) for old, new in pairs)
