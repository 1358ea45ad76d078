"""Every architecture of the registry: what is cut computes what was masked; docs/coverage.md says what was proved."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest
from transformers.utils import logging as transformers_logging

from pruning.coverage import PAGE, examine, page
from pruning.registry import ARCHITECTURES, Architecture
from tiers import mostly_slow

# One of each way to write a forward; the others are variations, and slow together.
QUICK = {
    *("vit_tiny_patch16_224", "eva02_tiny_patch14_224", "convnext_atto"),
    *("gpt2", "llama", "bart"),
    "TransformerEncoder",
}
# Deprecations inside the libraries are not ours to mend.
pytestmark = pytest.mark.filterwarnings("ignore:::timm|transformers|open_clip|torch")


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Keep transformers' remarks out of the way."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    yield
    transformers_logging.set_verbosity(before)


@pytest.mark.parametrize(
    "architecture",
    mostly_slow(ARCHITECTURES, *(each for each in ARCHITECTURES if each.name in QUICK)),
    ids=lambda each: f"{each.library}-{each.name}",
)
def test_what_is_cut_computes_what_was_masked(architecture: Architecture) -> None:
    examined = examine(architecture)
    assert not examined.idle, "the inputs did not run these groups, so nothing is proved about them"
    assert examined.row(architecture) in PAGE.read_text().splitlines(), (
        "docs/coverage.md is not what this run gives; write it again: PYTHONPATH=tests python -m pruning.coverage"
    )


def test_the_page_lists_the_registry_and_nothing_else() -> None:
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith(("| timm", "| tran", "| tor", "| open"))]
    named = [tuple(cell.strip() for cell in row.split("|")[1:3]) for row in rows]
    known = [(each.library, each.name) for each in ARCHITECTURES]
    if importlib.util.find_spec("open_clip") is None:
        named = [name for name in named if name[0] != "open_clip"]
    assert named == known
    assert len(set(known)) == len(known)
    assert PAGE.read_text() == page(rows)


def test_at_least_120_architectures_are_verified() -> None:
    rows = [line for line in PAGE.read_text().splitlines() if line.endswith("| yes |")]
    assert sum(row.startswith(("| timm |", "| transformers |")) for row in rows) >= 120
