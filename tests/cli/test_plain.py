"""What a command prints of texts from outside is what they say, and nothing that a terminal would do."""

from __future__ import annotations

import io
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from upop.cli.app import main
from upop.errors import DataError
from upop.plain import as_text, one_line, plain
from upop.runs.progress import RunProgress

ODD = "[/] [bold red]a[/bold red] [link=http://b]c[/link] :smile: \x1b]8;;http://d\x07e\x1b[2J\r\u202ef\u2066\x9b"
WRITTEN = (
    r"[/] [bold red]a[/bold red] [link=http://b]c[/link] :smile: "
    r"\x1b]8;;http://d\x07e\x1b[2J\x0d\u202ef\u2066\x9b".replace(r"\x0d", r"\r")
)


def test_letters_stay_and_the_rest_is_written_out() -> None:
    assert plain("\u00e9\u4e2d \U0001f600\t\n\u05d0\u0627") == "\u00e9\u4e2d \U0001f600\t\n\u05d0\u0627"
    assert plain(ODD) == WRITTEN
    assert plain(plain(ODD)) == WRITTEN
    assert plain(Path(os.fsdecode(b"a\xff"))) == r"a\udcff"
    assert one_line("a\n  b\x1b") == r"a b\x1b"
    plain("".join(map(chr, range(0x11000)))).encode()


def on_a_terminal(show: Callable[[Console], None]) -> str:
    console = Console(file=io.StringIO(), width=400, force_terminal=True, color_system="truecolor")
    show(console)
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def test_a_console_shows_what_is_written() -> None:
    assert on_a_terminal(lambda console: console.print(as_text(ODD))).strip() == WRITTEN
    assert on_a_terminal(lambda console: console.print(as_text(ODD, "yellow"))).strip() == f"\x1b[33m{WRITTEN}\x1b[0m"


def test_a_run_says_what_is_written(capsys: pytest.CaptureFixture[str]) -> None:
    RunProgress(0, main=True).notify(ODD, "yellow")
    assert " ".join(capsys.readouterr().out.split()) == WRITTEN


@pytest.mark.parametrize(
    "words",
    [
        ["report", ODD],
        ["train", ODD],
        ["train", "nlvr", "--config", ODD],
        ["train", "nlvr", "--set", f"{ODD}=1"],
        ["train", "nlvr", "--set", f"init_lr={ODD}"],
        ["run", ODD],
        ["recipes", "--recipes", ODD],
        ["inspect", ODD],
    ],
)
def test_errors_are_shown_as_they_are_written(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["upop", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    described = capsys.readouterr().err
    assert "[/] [bold red]a[/bold red] [link=http:/" in described and "c[/link] :smile:" in described
    assert not set("\x1b\x07\r\u202e\u2066\x9b") & set(described)


@pytest.mark.parametrize("words", [[ODD], ["train", "nlvr", f"--{ODD}"], ["train", "nlvr", os.fsdecode(b"\xff")]])
def test_command_lines_that_are_none_are_shown_as_they_are_written(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["upop", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    described = capsys.readouterr().err
    assert described.startswith("Error: ")
    assert not set("\x1b\x07\r\u202e\u2066\x9b\udcff") & set(described)


def test_warnings_and_messages_are_whole_and_plain(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def command(**_options: object) -> None:
        print(warnings.formatwarning(f"of {ODD}", UserWarning, "a.py", 1), file=sys.stderr)  # noqa: T201
        raise DataError("a file called DataError: nothing is wrong")

    monkeypatch.setattr("sys.argv", ["upop"])
    with pytest.raises(SystemExit):
        main(command)  # type: ignore[arg-type]
    assert capsys.readouterr().err == (
        f"UserWarning: of {WRITTEN}\n\nError: DataError: a file called DataError: nothing is wrong\n"
    )
    assert "a.py" in warnings.formatwarning("x", UserWarning, "a.py", 1)


def test_recipes_of_others_are_listed_as_they_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {
        "name": ODD,
        "task": "nlvr",
        "script": "compress_nlvr.py",
        "config": "c.yaml",
        "pretrained": "p.pth",
        "p": 0.5,
        "epoch": 1,
        "output_dir": "o",
        "compressed": "c.pth",
        "paper": "[/] x",
    }
    (tmp_path / "recipes.yaml").write_text(yaml.safe_dump([row]))
    monkeypatch.setattr("sys.argv", ["upop", "recipes", "--recipes", str(tmp_path / "recipes.yaml")])
    monkeypatch.setenv("COLUMNS", "300")
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    described = capsys.readouterr().out
    assert WRITTEN in described and "[/] x" in described
