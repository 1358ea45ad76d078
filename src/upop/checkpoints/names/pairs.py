"""Renames tensors between two libraries by pairs of prefixes, for whole names and for names within numbered blocks."""

from __future__ import annotations

from collections.abc import Iterable

Pairs = tuple[tuple[str, str], ...]
"""(old, new) names or prefixes."""


def replaced(name: str, pairs: Iterable[tuple[str, str]]) -> str:
    """Replace the prefix of a name by the first pair that matches."""
    for old, new in pairs:
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def in_block(name: str, blocks: Iterable[tuple[str, str]], parts: Iterable[tuple[str, str]]) -> str:
    """Replace the prefix of a name up to a numbered block, and the part after the number."""
    for old, new in blocks:
        if name.startswith(old):
            number, _, part = name.removeprefix(old).partition(".")
            return f"{new}{number}.{replaced(part, parts)}"
    return name


def turned(pairs: Iterable[tuple[str, str]]) -> Pairs:
    """Return the pairs of the opposite direction."""
    return tuple((new, old) for old, new in pairs)
