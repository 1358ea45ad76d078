"""Command lines, before they are parsed."""

from __future__ import annotations

from collections.abc import Sequence


def with_resume_value(arguments: Sequence[str]) -> list[str]:
    """Return command-line arguments with `must` after a `--resume` without a value."""
    completed = []
    for place, argument in enumerate(arguments):
        completed.append(argument)
        if argument == "--resume" and (place + 1 == len(arguments) or arguments[place + 1].startswith("-")):
            completed.append("must")
    return completed
