"""Every wrong command line ends with one of our errors or with how the command is used, never with a traceback."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import typer

import runs
from malformed import commands as table
from tiers import mostly_slow
from together import FORKS
from upop.cli import published, published_deit, published_segmenter
from upop.cli.app import app, main

ROOT = Path(__file__).parents[2]
Places = dict[str, str]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Places:
    """Files and folders that rows name."""
    folder = tmp_path_factory.mktemp("commands")
    config = runs.make_data(folder)
    (folder / "text.txt").write_text("this is no image, no model and no settings\n")
    (folder / "run").mkdir()
    (folder / "run" / "metrics.jsonl").write_text('{"loss": 1.0}\n{"lo')
    return {
        "config": str(config),
        "data": str(folder / "data"),
        "model": str(folder / "dense"),
        "text": str(folder / "text.txt"),
        "run": str(folder / "run"),
    }


@pytest.fixture
def places(made: Places, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Places:
    monkeypatch.setenv("DATASET", str(tmp_path))
    monkeypatch.chdir(ROOT)  # where the recipes and the published config files are
    return {**made, "folder": str(tmp_path)}


@pytest.fixture
def command(ended: Callable[..., tuple[int, str]]) -> Callable[..., tuple[int, str]]:
    """Run a command in this process; return its exit code and all that it printed."""

    def run(words: list[str], kind: typer.Typer = app) -> tuple[int, str]:
        return ended(lambda: main(kind), "upop", *words)

    return run


def one_of_ours(code: int, text: str, name: str) -> None:
    assert code == 1
    assert "Traceback" not in text
    assert "Error: " in text
    described = " ".join(text[text.index("Error: ") :].split())
    assert name.lower() in described.lower()


@pytest.mark.parametrize("what", table.REFUSED)
def test_refused(command: Callable[..., tuple[int, str]], places: Places, what: str) -> None:
    words, name = table.REFUSED[what]
    given = [word.format(**places) if "{" in word and "=" not in word else word for word in shlex.split(words)]
    one_of_ours(*command(given), name.format(**places))


@pytest.mark.parametrize("what", table.MISUSED)
def test_misused(
    command: Callable[..., tuple[int, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    monkeypatch.chdir(tmp_path)
    code, text = command(shlex.split(table.MISUSED[what]))
    assert code == 2
    assert "Traceback" not in text
    assert "Error" in text or "Usage: " in text
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("what", table.PUBLISHED)
def test_published(command: Callable[..., tuple[int, str]], places: Places, what: str) -> None:
    script, words, name = table.PUBLISHED[what]
    kinds = {
        "compress_nlvr.py": lambda: published.blip_command("nlvr", "configs/nlvr.yaml"),
        "compress_deit.py": lambda: published_deit.app,
        "compress_segmenter.py": lambda: published_segmenter.app,
    }
    given = [word.format(**places) for word in shlex.split(words)]
    one_of_ours(*command(given, kinds[script]()), name)


def test_a_name_in_bytes_that_are_no_characters(command: Callable[..., tuple[int, str]], places: Places) -> None:
    one_of_ours(*command(["inspect", os.fsdecode(b"no\xff.pth")]), "no\\udcff.pth")


def test_a_run_folder_that_vanishes(command: Callable[..., tuple[int, str]], places: Places) -> None:
    """A model's folder, whose description is a link to nowhere."""
    folder = Path(shutil.copytree(places["model"], f"{places['folder']}/model"))
    (folder / "upop.json").unlink()
    (folder / "upop.json").symlink_to("nowhere")
    words = ["--config", places["config"], "--pretrained", str(folder), "--output-dir", f"{places['folder']}/run"]
    one_of_ours(*command(["evaluate", "nlvr", *words]), str(folder))


def in_a_terminal(words: list[str], output: Path) -> None:
    """Run a command as a shell does, its output in a file."""
    os.setsid()  # a terminal's Ctrl-C reaches all processes of a command
    # A shell has what it starts in the background ignore Ctrl-C, and the tests may run there.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    file = os.open(output, os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.argv = words
    main()


@pytest.mark.parametrize(
    ("sent", "workers", "code"),
    mostly_slow([(signal.SIGINT, 0, 130), (signal.SIGINT, 2, 130), (signal.SIGTERM, 2, 75)], (signal.SIGINT, 0, 130)),
)
def test_signals_end_a_run_without_a_traceback(places: Places, sent: int, workers: int, code: int) -> None:
    """Ctrl-C, and SIGTERM that a cluster sends to all processes of a run, workers too."""
    run = Path(places["folder"]) / f"run-{sent}-{workers}"
    words = ["train", "nlvr", "--config", places["config"], "--output-dir", str(run), "--epoch", "1000"]
    output = Path(places["folder"]) / "output.txt"
    started = FORKS.Process(target=in_a_terminal, args=(["upop", *words, "--set", f"num_workers={workers}"], output))
    started.start()
    try:
        while started.is_alive() and not (
            # All workers have started: those that decode for training, and for evaluation.
            (run / "metrics.jsonl").is_file() and any("split" in row for row in runs.rows(run))
        ):
            time.sleep(0.1)
        if started.is_alive():  # one that has ended by itself says below why
            os.killpg(started.pid, sent)
        started.join(60)
    finally:
        started.kill()
    described = output.read_text()
    assert started.exitcode == code, described
    assert "Traceback" not in described
