"""Shared by all tests: where recorded behaviour lies, and what they do without."""

from __future__ import annotations

import gc
import importlib
import os
import runpy
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

gc.disable()  # until everything is imported: what is imported stays, and looking through it is a fifth of the time

ROOT = Path(__file__).parents[1]

PARITY = Path(os.environ.get("UPOP_PARITY", Path(__file__).parent / "parity" / "data"))


def parity_sets(task: str) -> list[Path]:
    """Return every recorded set of a task: folders that hold a config.json."""
    return sorted(path.parent for path in PARITY.glob(f"{task}/*/config.json"))


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Call a function that ends as a process does; return its exit code and all that it printed."""

    def run(function: Callable[[], object], *words: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", [*map(str, words)])
        with pytest.raises(SystemExit) as stopped:
            function()
        printed = capsys.readouterr()
        code = stopped.value.code
        return (code if isinstance(code, int) else int(code is not None)), printed.out + printed.err

    return run


@pytest.fixture
def root_script(ended: Callable[..., tuple[int, str]]) -> Callable[..., tuple[int, str]]:
    """Run a script of the repository's root in this process; return its exit code and all that it printed."""

    def run(name: str, *words: object) -> tuple[int, str]:
        return ended(lambda: runpy.run_path(str(ROOT / name), run_name="__main__"), name, *words)

    return run


# Files of long tests, which begin first, so that none is still running when all the others are done.
_LONGEST = (
    *("checkpoints/test_export.py", "training/test_runs.py", "parity/test_recorded.py", "pruning/test_training.py"),
    *("training/test_resume.py", "training/test_distributed.py"),
    *("checkpoints/test_transformers.py", "checkpoints/test_strict.py", "tasks/test_classification.py"),
    *("tasks/test_retrieval.py", "malformed/test_checkpoints.py", "pruning/test_families.py"),
    *("checkpoints/test_older.py", "models/test_retrieval.py", "tasks/test_inputs.py", "pruning/test_axes.py"),
    *("cli/test_convert_inspect.py", "tasks/test_chat.py", "training/test_sharding.py"),
    *("training/test_limits.py", "pruning/test_coverage.py", "pruning/test_width.py"),
    *("pruning/test_stages.py", "pruning/test_costs.py", "pruning/test_budget.py", "tasks/test_vqa.py"),
    *("checkpoints/test_plain.py", "tasks/test_segmentation.py", "fuzz/test_fuzz.py", "checkpoints/test_official.py"),
    *("checkpoints/test_open_clip.py", "pruning/test_sharded.py", "tasks/test_all_tasks.py", "test_installed.py"),
)


def pytest_configure(config: pytest.Config) -> None:
    """Give all processes of this run a folder for what one of them has read (see `shared_kinds`)."""
    name = "UPOP_TEST_KINDS"
    if name not in os.environ:
        folder = tempfile.TemporaryDirectory(prefix="upop-kinds-")
        os.environ[name] = folder.name
        config.add_cleanup(folder.cleanup)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first."""
    places = {ROOT / "tests" / name: place for place, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


def pytest_collection_finish() -> None:
    """Everything is imported now."""
    importlib.import_module("unburdened")


@pytest.hookimpl(trylast=True)  # pytest looks through what the tests left
def pytest_unconfigure() -> None:
    """Libraries report objects that nobody collected when the process ends."""
    gc.unfreeze()
