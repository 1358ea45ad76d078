"""Every command that README.md, the pages of docs/ and the help texts show is one that would be understood."""

from __future__ import annotations

import re

import pytest

from documents import CONTRIBUTING, PAGES, README, ROOT, commands, words
from shown import check, check_published, parse
from upop.cli.app import app

SHOWN = [
    pytest.param(line, id=f"{page.stem}-{number}")
    for page in (README, CONTRIBUTING, *PAGES)
    for number, line in enumerate(commands(page))
]


def test_readme_shows_commands() -> None:
    assert len(commands(README)) >= 9


@pytest.mark.parametrize("line", SHOWN)
def test_shown_commands(line: str) -> None:
    check(line)


@pytest.mark.parametrize("file", ["published_deit.py", "published_segmenter.py"])
def test_help_of_published_commands_ends_with_a_true_example(file: str) -> None:
    (line,) = re.findall(r'Example: ([^"]*)"', (ROOT / "src/upop/cli" / file).read_text())
    script = next(word for word in words(line) if word.startswith("compress_"))
    check_published(script, words(line)[words(line).index(script) + 1 :])


def examples() -> list[str]:
    files = ("app.py", "published.py")
    return [
        line
        for name in files
        for line in re.findall(r'Example: (upop [^"]*)"', (ROOT / "src/upop/cli" / name).read_text())
    ]


@pytest.mark.parametrize("line", examples())
def test_help_ends_with_a_true_example(line: str) -> None:
    parse(app, words(line)[1:])
