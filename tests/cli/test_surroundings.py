"""Where a newcomer runs commands: no home, a terminal of few letters, a place without permission, pipes, and Ctrl-C."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import runs
from documents import ROOT
from upop.cli.app import main


def begin(*words: object, first: Path | None = None, cwd: Path | None = None) -> subprocess.Popen[str]:
    """Start Python without a home, writing ASCII alone; `first` is where it looks for modules first."""
    places = [str(place) for place in (first, ROOT / "src") if place is not None]
    return subprocess.Popen(
        [sys.executable, *map(str, words)],
        cwd=cwd,
        env={
            "PATH": os.environ["PATH"],
            "PYTHONPATH": os.pathsep.join(places),
            "PYTHONIOENCODING": "ascii",
            "LC_ALL": "C",
            "OMP_NUM_THREADS": "1",
            "COLUMNS": "60",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # What starts the tests in the background has them, and all that they start, ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler) and None,
    )


def test_letters_that_the_terminal_lacks_are_written_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["upop", "run", "nlvr2-2x", "--dry-run", "--output-dir", "caf\u00e9"])
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", terminal)
    with pytest.raises(SystemExit, match="0"):
        main()
    assert b"output_dir: " in terminal.buffer.getvalue()
    assert terminal.buffer.getvalue().isascii()


def test_a_pipe_that_ends_early_ends_the_command_without_a_word() -> None:
    with begin("-m", "upop", "--help", cwd=ROOT) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(timeout=120) == 1


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder in which nobody can write")
def test_a_place_that_takes_no_files_is_told(
    upop_command: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir("/proc")
    code, text = upop_command("data", "shapes", "--task", "nlvr", "--out", "shapes", "--size", 10)
    assert code == 1
    assert "shapes cannot be written" in text
    assert "Traceback" not in text


@pytest.mark.slow
def test_ctrl_c_saves_where_a_run_stands(upop_command: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    config, folder = runs.make_task("nlvr", tmp_path, max_epoch=5), tmp_path / "run"
    words = ("compress", "nlvr", "--config", config, "--output-dir", folder)
    process = begin("-m", "upop", *words)
    deadline = time.monotonic() + 120
    while not ((folder / "metrics.jsonl").exists() and '"loss"' in (folder / "metrics.jsonl").read_text()):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "interrupted (Ctrl-C)" in err
    assert "--resume auto" in err
    assert "Traceback" not in err
    reached = runs.rows(folder)[-1]["step"]
    code, _ = upop_command(*words, "--resume", "auto")
    assert code == 0
    assert (folder / "results.json").exists()
    steps = [row["step"] for row in runs.rows(folder) if "loss" in row]
    assert steps[-1] > reached
    assert steps == sorted(set(steps))


@pytest.fixture
def slow_torch(tmp_path: Path) -> Path:
    """A folder with a torch that says that it is being imported, and takes a minute."""
    (tmp_path / "torch.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)\n")
    return tmp_path


def interrupted(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Press Ctrl-C as soon as a process says something; return its exit code and what it said to standard error."""
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    return process.returncode, err


def test_ctrl_c_while_a_command_starts_is_a_sentence(slow_torch: Path) -> None:
    code, err = interrupted(begin("-m", "upop", "inspect", "deit_small_patch16_224", first=slow_torch))
    assert code == 130
    assert err == "Interrupted (Ctrl-C) while upop was starting; nothing was begun.\n"


def test_a_program_that_imports_the_package_keeps_its_own_interrupts(slow_torch: Path) -> None:
    program = "try:\n    import upop\n    upop.Pruner\nexcept KeyboardInterrupt:\n    raise SystemExit(7)"
    assert interrupted(begin("-c", program, first=slow_torch)) == (7, "")
