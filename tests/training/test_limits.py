"""Disks that fill, become read-only or take no larger files, and too few descriptors, in the middle of a run.

It ends with an error of ours, which says what is kept, and goes on with --resume when it can.
"""

from __future__ import annotations

import errno
import itertools
import multiprocessing
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import runs
from tiers import mostly_slow
from together import FORKS
from training.test_resume import no_leftovers
from upop.cli.app import main
from upop.runs.limits import explained_limit

MIB = 2**20


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Settings of a run of some seconds that writes a checkpoint after every step."""
    folder = tmp_path_factory.mktemp("limits")
    return runs.make_task("nlvr", folder, max_epoch=12, checkpoint_minutes=0, examples=1)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small file system of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"file systems cannot be mounted here: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def _command(verb: str, config: Path, folder: Path, described: Path, limits: dict[int, int], *words: str) -> None:
    """The command, in a process of its own whose output goes to a file."""
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # as in a process of one's own
    stream = described.open("w")
    for descriptor in (1, 2):
        os.dup2(stream.fileno(), descriptor)
    sys.stdout = sys.stderr = stream
    sys.argv = ["upop", verb, "nlvr", "--config", str(config), "--output-dir", str(folder), *words]
    for limit, value in limits.items():
        resource.setrlimit(limit, (value, resource.getrlimit(limit)[1]))
    try:
        main()
    finally:
        stream.flush()


def start(
    verb: str, config: Path, folder: Path, described: Path, *words: str, limits: dict[int, int] | None = None
) -> Any:
    process = FORKS.Process(target=_command, args=(verb, config, folder, described, limits or {}, *words))
    process.start()
    return process


def wait_for(process: Any, folder: Path, steps: int) -> None:
    """Wait until a run has written a checkpoint of some step."""
    until = time.monotonic() + 120
    while time.monotonic() < until and process.is_alive():
        if any(int(path.stem[5:]) >= steps for path in (folder / "checkpoints").glob("step-*.pt")):
            return
        time.sleep(0.01)
    pytest.fail("the run ended, or did not begin")


def check_end(process: Any, described: Path, reason: str) -> str:
    """The process ends with our error, and says what is kept."""
    process.join(120)
    with described.open() as file:
        text = " ".join(file.read(100_000).split())  # a process that runs wild may have said much more
    assert process.exitcode == 1, text
    assert "Traceback" not in text
    assert "Error: RunFolderError:" in text, text
    assert reason in text, text
    return text


def fill(disk: Path) -> Path:
    """Take all that is left of a file system."""
    filler = disk / "filler"
    space = os.statvfs(disk)
    with filler.open("wb") as file:
        size = space.f_bavail * space.f_frsize
        while size >= 4096:
            try:
                os.posix_fallocate(file.fileno(), file.seek(0, os.SEEK_END), size)
            except OSError:
                size //= 2
    return filler


def remount(disk: Path, how: str) -> None:
    # A file of the run may be open for writing at any moment.
    for _ in range(500):
        if not subprocess.run(["mount", "-o", f"remount,{how}", disk], capture_output=True).returncode:
            return
        time.sleep(0.005)
    pytest.fail("the file system stays busy")


def finish(verb: str, config: Path, folder: Path, described: Path) -> None:
    process = start(verb, config, folder, described, "--resume")
    process.join(300)
    assert process.exitcode == 0, described.read_text()
    assert "resumed after step" in described.read_text()
    no_leftovers(folder)


@pytest.mark.parametrize(
    ("kind", "verb"),
    mostly_slow(itertools.product(["full", "read-only"], ["train", "compress"]), ("read-only", "train")),
)
def test_a_disk_that_takes_no_more(config: Path, disk: Path, tmp_path: Path, verb: str, kind: str) -> None:
    run, described = disk / "run", tmp_path / "told"
    process = start(verb, config, run, described)
    wait_for(process, run, 2)
    allow: Callable[[], object]
    if kind == "full":
        allow = fill(disk).unlink
    else:
        remount(disk, "ro")
        allow = lambda: remount(disk, "rw")  # noqa: E731
    text = check_end(process, described, "No space left" if kind == "full" else "Read-only file system")
    assert "with --resume goes on from step" in text
    allow()
    finish(verb, config, run, described)


def test_a_limit_of_file_sizes_from_the_start(config: Path, tmp_path: Path) -> None:
    described = tmp_path / "told"
    limited = start("train", config, tmp_path / "run", described, limits={resource.RLIMIT_FSIZE: 20_000})
    text = check_end(limited, described, "too large")
    assert "ulimit -f" in text and "No checkpoint" in text


@pytest.mark.slow
def test_a_limit_of_file_sizes_in_the_middle(config: Path, tmp_path: Path) -> None:
    run, described = tmp_path / "run", tmp_path / "told"
    process = start("compress", config, run, described)
    wait_for(process, run, 3)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    assert "goes on from step" in check_end(process, described, "too large")
    finish("compress", config, run, described)


def test_a_limit_of_descriptors(config: Path, tmp_path: Path) -> None:
    run, described = tmp_path / "run", tmp_path / "told"
    process = start("train", config, run, described, "--set", "num_workers=0")
    wait_for(process, run, 2)
    taken = max(int(path.name) for path in Path(f"/proc/{process.pid}/fd").iterdir())
    resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (taken - 2, 1024))  # those above it stay open
    text = check_end(process, described, "Too many open files")
    assert "ulimit -n" in text and "goes on from step" in text
    finish("train", config, run, described)


def test_a_worker_without_descriptors_ends_and_says_why() -> None:
    code = (
        "import errno, sys\n"
        "from upop.runs.limits import end_without_descriptors\n"
        "end_without_descriptors()\n"
        "try:\n    raise OSError(errno.EMFILE, 'none left')\n"
        "except OSError:\n    sys.excepthook(*sys.exc_info())  # as Python's thread does that hands descriptors over\n"
        "print('still here')\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stdout) == (errno.EMFILE, "")
    said = RuntimeError(f"DataLoader worker (pid 3) exited unexpectedly with exit code {ended.returncode}.")
    assert "ulimit -n" in str(explained_limit(said, lambda: "Step 3 is kept."))
