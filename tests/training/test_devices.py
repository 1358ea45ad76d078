"""What depends on the device that a run computes on."""

from __future__ import annotations

import pytest
import torch

from upop.errors import SettingError
from upop.runs.devices import round_to_for
from upop.settings import RunSettings, read_settings


@pytest.mark.parametrize(
    ("device", "given", "expected"),
    [
        ("cuda", {}, 8),
        ("cpu", {}, 1),
        ("mps", {}, 1),
        ("cuda", {"cost": "reference", "method": "reference"}, 1),
        ("cuda", {"round_to": 4}, 4),
        ("cpu", {"round_to": 16}, 16),
    ],
)
def test_kept_sizes_suit_the_device(device: str, given: dict[str, object], expected: int) -> None:
    assert round_to_for(torch.device(device), read_settings(RunSettings, None, given)) == expected


def test_an_alignment_of_nothing_is_refused() -> None:
    with pytest.raises(SettingError, match=r"round_to: .*whole number of at least 1; found 0"):
        read_settings(RunSettings, None, {"round_to": 0})
