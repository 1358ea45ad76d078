"""Benchmarks on pretrained weights that packages carry; none of the weights or data is in the repository."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path


def folder_of(module: str, package: str) -> Path:
    """Return the folder of a module whose files are wanted, and whose code is neither run nor needed.

    Raises:
        SystemExit: the package that brings it is not installed.
    """
    found = find_spec(module)
    if found is None or not found.submodule_search_locations:
        raise SystemExit(f"{package} is not installed: pip install --no-deps {package}")
    return Path(found.submodule_search_locations[0])


def median_ms(run: Callable[[], object], repeats: int) -> float:
    """Return the median processor time of a call in milliseconds: other processes do not count."""
    found = []
    for _ in range(repeats):
        begun = time.process_time()
        run()
        found.append(1000 * (time.process_time() - begun))
    return statistics.median(found)
