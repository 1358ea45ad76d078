"""What the tests of unreadable images run in several processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from upop.errors import DataError
from upop.runs.verbs import compress, evaluate_checkpoint
from upop.settings import read_settings
from upop.tasks import find_task


def tolerant(task: str, config: Path, overrides: dict[str, Any], verb: str = "evaluate") -> None:
    """Evaluate or compress; in a process of its own."""
    found = find_task(task)
    run = {"evaluate": evaluate_checkpoint, "compress": compress}[verb]
    run(found, read_settings(found.settings, config, overrides))


def refused_alike(config: Path, folder: Path) -> None:
    """All processes end with the same error, also those that did not meet the file themselves."""
    with pytest.raises(DataError, match="unreadable file number 3, and skip_bad_images is 2"):
        tolerant("nlvr", config, {"output_dir": folder, "skip_bad_images": 2}, "compress")
