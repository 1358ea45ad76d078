"""What a newcomer reads first: help, errors of the command line, version and completion, whole in 80 columns."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from typer.main import get_command

from upop import __version__
from upop.cli import published_crossget, published_deit, published_segmenter
from upop.cli.app import app, main
from upop.cli.published import blip_command
from upop.tasks import TASKS

Ended = Callable[..., tuple[int, str]]
PUBLISHED = {
    "compress_nlvr.py": blip_command("nlvr", "./configs/nlvr.yaml"),
    "compress_deit.py": published_deit.app,
    "compress_segmenter.py": published_segmenter.app,
    "train_retrieval_clip.py": published_crossget.app,
}


def leaves(node: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """All commands and groups, and how they are called."""
    yield path, node
    for name, inner in getattr(node, "commands", {}).items():
        yield from leaves(inner, (*path, name))


HELPS = [(path, app, node) for path, node in leaves(get_command(app))]
HELPS += [((), kind, get_command(kind)) for kind in PUBLISHED.values()]


@pytest.mark.parametrize(("path", "kind", "node"), HELPS)
@pytest.mark.parametrize("columns", ["80", "200"])
def test_help_shows_flags_and_defaults_whole(
    path: tuple[str, ...], kind: Any, node: Any, columns: str, ended: Ended, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    code, text = ended(lambda: main(kind), "upop", *path, "--help")
    assert code == 0
    assert max(map(len, text.splitlines())) <= 80
    words = re.split(r"[\s,]+", text)
    described = " ".join(text.split())
    for parameter in node.params:
        if getattr(parameter, "hidden", False):
            continue
        assert all(flag in words for flag in parameter.opts if flag.startswith("-"))
        default = parameter.default
        if isinstance(default, str | int) and not isinstance(default, bool):
            assert f"default: {default}" in described
        for shown in re.findall(r"\[.*?\]", parameter.help or ""):
            assert " ".join(shown.split()) in described


def test_the_published_output_dir_can_be_read(ended: Ended, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    _, text = ended(lambda: main(PUBLISHED["compress_nlvr.py"]), "compress_nlvr.py", "--help")
    assert "--output_dir <path>" in text
    assert "--p, --ratio <float>" in text


def test_version(ended: Ended) -> None:
    assert ended(main, "upop", "--version") == (0, f"upop {__version__}\n")


def test_upop_alone_is_help(ended: Ended) -> None:
    code, text = ended(main, "upop")
    assert code == 0
    assert all(f"\n  {name} " in text for name in get_command(app).commands)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("compress nlvr --ratoi 0.5", "No such option: --ratoi (did you mean '--ratio'?)."),
        ("train nlvr --epoch-s 3", "did you mean '--epochs'?"),
        ("compres nlvr", "Did you mean 'compress'?"),
        ("data shape", "Did you mean 'shapes'?"),
        ("compress nlvr --seed x", "Invalid value for '--seed': Input should be a valid integer"),
        ("compress nlvr --seed=x", "found 'x'."),
        ("compress nlvr --device gpu", "'gpu' is not one of 'auto', 'cuda', 'mps', 'cpu'."),
        ("compress nlvr --ratio 50%", "write 0.5 for 50 %"),
        ("inspect deit_tiny_patch16_224 --ratio 50%", "write 0.5 for 50 %"),
        ("compress nlvr --ratio 2x", "write 0.5 for 2x smaller"),
        ("compress", f"Missing argument 'TASK'. Task: {', '.join(TASKS)}."),
        ("compress nlvr --ratio", "requires an argument"),
    ],
)
def test_a_command_line_that_is_not_understood(
    words: str, said: str, ended: Ended, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    code, text = ended(main, "upop", *words.split())
    assert code == 2
    assert text.startswith("Error: ")
    assert said in text
    assert re.search(r"^Try 'upop.* --help'\.$", text, flags=re.MULTILINE)
    assert not re.search("[^ -~\n]", text)  # no box that cuts it


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("upop train retr", ["retrieval", "retrieval-clip", "retrieval-crossget"]),
        ("upop compress classi", ["classification"]),
        ("upop run ade20k-p0.1", ["ade20k-p0.1", "ade20k-p0.15"]),
        ("upop compress nlvr --method ref", ["reference"]),
        ("upop comp", ["compress"]),
        ("upop compress nlvr --rat", ["--ratio"]),
    ],
)
def test_completion(typed: str, expected: list[str], ended: Ended, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_UPOP_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", typed)
    monkeypatch.setenv("COMP_CWORD", str(len(typed.split()) - 1))
    code, text = ended(main, "upop")
    assert code == 0
    assert text.split() == expected


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_completion_script(shell: str, ended: Ended, monkeypatch: pytest.MonkeyPatch) -> None:
    # Which shell the tests were started from, if any, is not for them to know.
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    code, text = ended(main, "upop", "--show-completion", shell)
    assert code == 0
    assert "_UPOP_COMPLETE" in text
