"""Whatever is read, bad or not: it works or ends in an error of ours, soon, in little memory, and touches nothing else.

The whole is slow, and takes some minutes; about a hundred of its inputs are tried every time. What fails says its
number, with which `python -m fuzz.again` tries it again.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from fuzz.engine import described, tried
from fuzz.readers import READERS

COUNTS: dict[str, int] = {
    "annotations: ": 900,
    "images ": 1500,
    "names of classes": 500,
    "settings: ": 450,
    "recipes": 500,
    "command lines": 2000,
    "published command lines": 1000,
    "folder: ": 300,
    "into ": 500,
    "weights: ": 2500,
    "published: ": 200,
    "checkpoints ": 1500,
    "plans": 1500,
    "report: ": 300,
    "tokenizers: ": 600,
}
"""Beginning of the names of readers -> how many inputs each of them is given."""

AREAS = {start: [name for name in READERS if name.startswith(start)] for start in COUNTS}
QUICK = range(2)
"""Numbers of the inputs that every run of the tests tries, of each reader but those of `REPEATED`."""
REPEATED = {
    *(f"folder: {name}" for name in ("caption", "nlvr", "retrieval-clip", "segmentation", "transformers, BLIP")),
    *(f"published: {name}" for name in ("caption", "retrieval", "retrieval-clip", "segmentation", "vqa")),
}
"""Readers of a format for a further model: making the good inputs would be most of the time."""


def test_there_are_many_inputs() -> None:
    every = [name for names in AREAS.values() for name in names]
    assert sorted(every) == sorted(READERS)
    assert sum(COUNTS[start] * len(names) for start, names in AREAS.items()) >= 30_000


def test_some_bad_inputs(tmp_path: Path) -> None:
    readers = [name for name in READERS if name not in REPEATED]
    assert len(readers) == len(READERS) - len(REPEATED)
    found = tried(dict.fromkeys(readers, QUICK), tmp_path)
    assert sum(one.inputs for one in found) == len(QUICK) * len(readers)
    assert sum(one.refused for one in found) > len(QUICK) * len(readers) / 2
    assert not any(one.failures for one in found), described(found)


@pytest.mark.slow
@pytest.mark.parametrize("area", AREAS)
def test_bad_inputs(tmp_path: Path, area: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = tried(dict.fromkeys(AREAS[area], range(COUNTS[area])), tmp_path)
    with capsys.disabled():
        print(f"\n{described(found)}" if not any(one.failures for one in found) else "")  # noqa: T201
    assert all(one.inputs == COUNTS[area] for one in found)
    assert not any(one.failures for one in found), described(found)
