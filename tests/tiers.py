"""Which cases `make test` runs, which it leaves to `make test-all` (more of what the others of a test show), and which
need a newer library than the oldest that upop takes."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import metadata
from typing import Any

import pytest
from packaging.version import Version


def mostly_slow(cases: Iterable[Any], *quick: Any) -> list[Any]:
    """Return the cases of a parametrized test, of which all but `quick` are marked slow; tuples are several values."""
    every = list(cases)
    assert quick and all(case in every for case in quick), "no such case"
    return [
        case if case in quick else pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow)
        for case in every
    ]


def since(library: str, version: str, why: str) -> pytest.MarkDecorator:
    """Skip a test where a library is older than what it is about, as in `make test-lowest`."""
    installed = metadata.version(library)
    return pytest.mark.skipif(Version(installed) < Version(version), reason=f"{library} {installed}: {why}")
