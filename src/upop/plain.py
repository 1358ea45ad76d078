"""Text that comes from outside (names of files and classes, captions, messages of libraries), made harmless to show.

A name may hold what a terminal, a browser or a reader takes for more than letters: codes that move the cursor or colour
the screen, marks that turn the direction of writing, and halves of characters that no file takes.
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
    """Return a text with all that is no visible letter, space, tab or new line written out: `\\x1b`, `\\u202e`."""
    return _HIDDEN.sub(lambda found: found[0].encode("unicode-escape").decode(), str(text))


def one_line(text: object) -> str:
    """Return a plain text on one line, as a cell of a table or an entry of a list takes it."""
    return plain(" ".join(str(text).split()))


def as_text(text: object, style: str = "") -> Text:
    """Return a plain text for rich, to which nothing in it is markup, a link or a name of an emoji."""
    from rich.text import Text

    return Text(plain(text), style=style)
