"""What README.md and the pages of docs/ show: commands, blocks of code, links, and tables that a script wrote."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
CONTRIBUTING = ROOT / "CONTRIBUTING.md"
PAGES = sorted((ROOT / "docs").glob("*.md"))
"""The pages of docs/."""
COMMANDS = (
    "upop ",
    "python ",
    "torchrun ",
    "srun ",
    "DATASET=",
    "PYTHONPATH=",
    "make ",
    "tensorboard ",
    "sbatch ",
    "pip ",
)
"""What a line of a block without a language begins with, if it is a command."""


def blocks(page: Path, language: str) -> list[str]:
    """Return the contents of a page's fenced blocks of a language; "" for those without one."""
    found = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    return [block for name, block in found if name == language]


def commands(page: Path) -> list[str]:
    """Return the command lines that a page shows, continued lines joined.

    They stand in blocks without a language or of `bash`; scripts that `python` runs also between the words.
    """
    text = "\n".join([*blocks(page, ""), *blocks(page, "bash")]).replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines()]
    prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    inline = [" ".join(code.split()) for code in re.findall(r"`(python [^`]+)`", prose)]
    return [line for line in lines if line.startswith(COMMANDS)] + inline


def words(line: str) -> list[str]:
    """Return the words of a command line, without its comment."""
    return shlex.split(line, comments=True)


def links(page: Path) -> list[str]:
    """Return the targets of a page's links and images that lie in this repository, anchors kept."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    return [target for target in targets if not re.match(r"[a-z]+:", target)]


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def file_examples(page: Path, language: str) -> dict[str, str]:
    """Return the examples of whole files that a page shows: a line that ends with "`NAME`:", then a block."""
    found = re.findall(rf"`([^`\n]+)`:\n\n```{language}\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    return dict(found)


def section(page: Path, heading: str) -> str:
    """Return the text of a page under a heading of the second level."""
    _, _, rest = page.read_text().partition(f"\n## {heading}\n")
    assert rest, f"{page.name} has no heading {heading!r}"
    return re.split(r"^## ", rest, flags=re.MULTILINE)[0]
