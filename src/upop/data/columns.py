"""Assigns roles (image, question, answer, ...) to the columns of a table, as given or by common names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from upop.data.tables import Table
from upop.errors import DataError, SettingError, nearest
from upop.pruning.errors import some_of

ROLES: Mapping[str, tuple[str, ...]] = {
    "messages": ("messages", "conversations", "conversation", "chat"),
    "image": (
        *("image", "images", "img", "picture", "photo", "image_path", "image_file", "file_name", "filename"),
        *("filepath", "jpg", "jpeg", "png", "webp"),
    ),
    "question": ("question", "query", "prompt", "instruction", "problem"),
    "answer": ("answer", "answers", "response", "output", "completion", "solution"),
    "caption": ("caption", "captions", "text", "txt", "sentences", "sentence", "description", "alt_text"),
    "label": ("label", "labels", "class", "category", "cls", "target"),
    "text": ("text", "content", "document"),
}
"""Role of a column -> common names, likeliest first."""

KINDS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "messages": (("messages",), ("image",)),
    "question": (("question", "answer"), ("image",)),
    "caption": (("image", "caption"), ()),
    "label": (("image", "label"), ()),
    "text": (("text",), ()),
}
"""Kind of sample -> required and optional roles."""


@dataclass(frozen=True)
class Columns:
    """The kind of the samples of a table, and role -> column."""

    kind: str
    named: Mapping[str, str]


def find_columns(table: Table, kinds: Sequence[str], stated: Mapping[str, str]) -> Columns:
    """Return the first kind whose columns a table has.

    Args:
        table: the rows.
        kinds: accepted kinds of `KINDS`, in order of preference.
        stated: role -> column, as given by the user.

    Raises:
        SettingError: a role is unknown, or none of the kinds has it.
        DataError: a given column does not exist, or every kind lacks a required one; the message lists the columns and
            the nearest names.
    """
    roles = {role for kind in kinds for part in KINDS[kind] for role in part}
    for role, column in stated.items():
        if role not in roles:
            near = nearest(role, sorted(roles))
            raise SettingError(
                f"--column {role}={column}: {role!r} is not a role of a column here{near}; known are "
                f"{', '.join(sorted(roles))}."
            )
        if column not in table.columns:
            raise DataError(
                f"{table.source} has no column {column!r} (--column {role}={column})"
                f"{nearest(column, table.columns)}; it has {some_of(table.columns, 20)}."
            )
    for kind in kinds:
        needed, allowed = KINDS[kind]
        if not set(stated) <= {*needed, *allowed}:
            continue
        named = {role: stated.get(role) or _usual(table, role) for role in (*needed, *allowed)}
        found = {role: column for role, column in named.items() if column is not None}
        if all(role in found for role in needed):
            return Columns(kind, found)
    raise DataError(_missing(table, kinds, stated))


def _usual(table: Table, role: str) -> str | None:
    lower = {column.lower(): column for column in reversed(table.columns)}
    # Shards of WebDataset hold what else is said of an image in an object called json.
    names = (*ROLES[role], *(f"json.{name}" for name in ROLES[role]))
    return next((lower[name] for name in names if name in lower), None)


def _missing(table: Table, kinds: Sequence[str], stated: Mapping[str, str]) -> str:
    """Describe the missing roles, with the nearest columns."""
    ways = []
    for kind in kinds:
        needed, allowed = KINDS[kind]
        if not set(stated) <= {*needed, *allowed}:
            continue
        lacking = [role for role in needed if role not in stated and _usual(table, role) is None]
        near = {role: found for role in lacking if (found := nearest(role, table.columns))}
        hint = "".join(f"; {role}{found}" for role, found in near.items())
        ways.append(f"{' + '.join(needed)} (lacks {', '.join(lacking)}{hint})")
    wanted = "\n  ".join(ways) or f"none of these kinds has all of {', '.join(stated)}: {', '.join(kinds)}"
    return (
        f"{table.source} has the columns {some_of(table.columns, 20)}, which fit no kind of sample:\n"
        f"  {wanted}\nAssign roles to columns, as in --column answer=NAME."
    )
