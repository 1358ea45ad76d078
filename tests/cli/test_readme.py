"""Every command that README.md and the help texts show is one that the commands really take."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer
from typer.main import get_command

from upop.cli import published_deit, published_segmenter
from upop.cli.app import app
from upop.cli.published import blip_command

ROOT = Path(__file__).parents[2]
OTHER_FLAGS = {"compress_deit.py": published_deit.app, "compress_segmenter.py": published_segmenter.app}
"""The published scripts whose flags are not BLIP's."""
STARTS = ("upop ", "python ", "DATASET=", "make ")


def shown() -> list[str]:
    """Return the command lines in README.md's blocks, continued lines joined."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", (ROOT / "README.md").read_text(), flags=re.DOTALL | re.MULTILINE)
    text = "\n".join(block for language, block in blocks if not language).replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines()]
    return [line for line in lines if line.startswith(STARTS)]


def parse(command: typer.Typer, words: list[str]) -> None:
    node, name = get_command(command), "command"
    while hasattr(node, "commands") and node.commands:
        name, *words = words
        node = node.commands[name]
    node.make_context(name, words)


def test_readme_shows_commands() -> None:
    assert len(shown()) >= 9


@pytest.mark.parametrize("line", [line for line in shown() if line.startswith("upop ")])
def test_upop_commands(line: str) -> None:
    parse(app, shlex.split(line, comments=True)[1:])


def parse_published(line: str) -> None:
    words = shlex.split(line)
    script = next(word for word in words if word.startswith("compress_"))
    assert (ROOT / script).is_file()
    task = script.removeprefix("compress_").removesuffix(".py")
    command = OTHER_FLAGS.get(script) or blip_command(task, f"./configs/{task}.yaml")
    parse(command, words[words.index(script) + 1 :])


@pytest.mark.parametrize("line", [line for line in shown() if "compress_" in line and not line.startswith("upop")])
def test_published_commands(line: str) -> None:
    parse_published(line)


@pytest.mark.parametrize("line", [line for line in shown() if line.startswith("make ")])
def test_make_targets(line: str) -> None:
    assert re.search(rf"^{line.split()[1]}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)


@pytest.mark.parametrize("file", ["published_deit.py", "published_segmenter.py"])
def test_help_of_published_commands_ends_with_a_true_example(file: str) -> None:
    (line,) = re.findall(r'Example: ([^"]*)"', (ROOT / "src/upop/cli" / file).read_text())
    parse_published(line)


def examples() -> list[str]:
    files = ("app.py", "published.py")
    return [
        line
        for name in files
        for line in re.findall(r'Example: (upop [^"]*)"', (ROOT / "src/upop/cli" / name).read_text())
    ]


@pytest.mark.parametrize("line", examples())
def test_help_ends_with_a_true_example(line: str) -> None:
    parse(app, shlex.split(line)[1:])
