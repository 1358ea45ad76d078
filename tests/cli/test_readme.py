"""Every command that README.md, the pages of docs/ and the help texts show is one that would be understood."""

from __future__ import annotations

import re
from typing import Any

import pytest
import typer.main

from documents import CONTRIBUTING, PAGES, README, ROOT, commands, words
from shown import check, check_published, parse
from upop.cli.app import app

ROOT_COMMAND: Any = typer.main.get_command(app)
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


@pytest.mark.parametrize("file", ["published_deit.py", "published_segmenter.py", "published_crossget.py"])
def test_help_of_published_commands_ends_with_a_true_example(file: str) -> None:
    (line,) = re.findall(r'Example: ([^"]*)"', (ROOT / "src/upop/cli" / file).read_text())
    script = next(word for word in words(line) if word.startswith(("compress_", "train_")))
    check_published(script, words(line)[words(line).index(script) + 1 :])


def examples() -> list[str]:
    """Return the calls that help ends with: of the root and of groups, and of commands that are imported later."""
    written = re.findall(r'Example: (upop [^"]*)"', (ROOT / "src/upop/cli/app.py").read_text())
    return [*written, *(each.example for each in ROOT_COMMAND.later.values())]


def test_every_command_has_an_example() -> None:
    assert len(examples()) >= 12
    assert {words(line)[1] for line in examples()} == set(ROOT_COMMAND.list_commands(None))


@pytest.mark.parametrize("line", examples())
def test_help_ends_with_a_true_example(line: str) -> None:
    parse(app, words(line)[1:])
