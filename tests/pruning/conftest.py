"""Shared by the tests of the method: one thread, one seed, and every family as a parameter."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from pruning.families import FAMILIES, Family
from tiers import mostly_slow


@pytest.fixture(autouse=True)
def _alone_and_repeatable() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


# Variations of others.
_SLOW = {
    *("vit-eager", "vit-registers", "deit-by-name", "deit-distilled", "nlvr-merged-eager", "nlvr-averaged"),
    *("segmenter-linear", "caption"),
}


@pytest.fixture(
    params=mostly_slow(FAMILIES, *(family for family in FAMILIES if family.name not in _SLOW)),
    ids=lambda family: family.name,
)
def family(request: pytest.FixtureRequest) -> Family:
    return request.param
