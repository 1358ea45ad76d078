"""Shared by all tests: where recorded behaviour lies."""

from __future__ import annotations

import os
from pathlib import Path

PARITY = Path(os.environ.get("UPOP_PARITY", Path(__file__).parent / "parity" / "data"))


def parity_sets(task: str) -> list[Path]:
    """Return every recorded set of a task: folders that hold a config.json."""
    return sorted(path.parent for path in PARITY.glob(f"{task}/*/config.json"))
