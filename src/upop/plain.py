"""Makes untrusted text (names of files and classes, captions, messages of libraries) safe to display.

It may contain terminal codes that move the cursor or change colours, marks that change the direction of writing, and
lone surrogates, which no file can store.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.text import Text

_HIDDEN = re.compile(
    "["
    "\x00-\x08\x0b-\x1f\x7f-\x9f"  # control characters, but for tabs and new lines
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # turn the direction of writing
    "\u2028\u2029\ufeff\ufff9-\ufffb\U000e0000-\U000e007f"  # end lines, or are not seen
    "\ud800-\udfff"  # halves of characters; Python reads bytes of names that are none so
    "]"
)


def plain(text: object) -> str:
    """Escape everything but visible characters, spaces, tabs and newlines: `\\x1b`, `\\u202e`."""
    return _HIDDEN.sub(lambda found: found[0].encode("unicode-escape").decode(), str(text))


def one_line(text: object) -> str:
    """Return a safe text on one line, for cells of tables and items of lists."""
    return plain(" ".join(str(text).split()))


def as_text(text: object, style: str = "") -> Text:
    """Return a safe text for rich, without markup, links and emoji codes."""
    from rich.text import Text

    return Text(plain(text), style=style)
