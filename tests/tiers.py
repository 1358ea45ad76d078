"""Which cases `make test` runs, and which it leaves to `make test-all`: more of what the others of a test show."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def mostly_slow(cases: Iterable[Any], *quick: Any) -> list[Any]:
    """Return the cases of a parametrized test, of which all but `quick` are marked slow; tuples are several values."""
    every = list(cases)
    assert quick and all(case in every for case in quick), "no such case"
    return [
        case if case in quick else pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow)
        for case in every
    ]
