"""Tests of this folder run on one thread, from one seed."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _alone_and_repeatable() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
