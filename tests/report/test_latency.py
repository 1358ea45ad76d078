"""Latency: every model, in turns, as it would run in use."""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor, nn

from upop.errors import SettingError
from upop.report import measure_latency


class Spy(nn.Module):
    """Notes who ran and how, and takes its time."""

    def __init__(self, name: str, log: list[str], milliseconds: float = 0) -> None:
        super().__init__()
        self.name, self.log, self.milliseconds = name, log, milliseconds
        self.layer = nn.Linear(2, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        self.log.append(self.name)
        assert not self.training
        assert not torch.is_grad_enabled()
        time.sleep(self.milliseconds / 1000)
        result: Tensor = self.layer(inputs)
        return result


def test_models_take_turns_in_evaluation_mode_and_get_their_mode_back() -> None:
    log: list[str] = []
    models = {name: Spy(name, log) for name in "AB"}
    models["A"].train()
    models["B"].eval()
    found = measure_latency(models, torch.zeros(1, 2), repeats=3, warmup=2)
    assert log == ["A", "B"] * 5
    assert set(found) == {"A", "B"}
    assert models["A"].training
    assert not models["B"].training


def test_a_slower_model_takes_longer_in_milliseconds() -> None:
    log: list[str] = []
    found = measure_latency(
        {"slow": Spy("slow", log, 20), "fast": Spy("fast", log)},
        {"inputs": torch.zeros(1, 2)},
        repeats=3,
        warmup=0,
    )
    assert found["slow"] >= 20
    assert found["fast"] < found["slow"]


def test_a_clock_of_the_processor_leaves_out_what_the_model_waits_for_and_the_least_pass_counts() -> None:
    models = {"waits": Spy("waits", [], 20)}
    found = measure_latency(models, torch.zeros(1, 2), repeats=3, warmup=0, clock=time.process_time, summary=min)
    assert 0 < found["waits"] < 20


def test_warmup_is_not_counted() -> None:
    class SlowAtFirst(Spy):
        def forward(self, inputs: Tensor) -> Tensor:
            self.milliseconds = 100 if not self.log else 0
            return super().forward(inputs)

    assert measure_latency({"a": SlowAtFirst("a", [])}, torch.zeros(1, 2), repeats=1, warmup=1)["a"] < 100


@pytest.mark.parametrize(("repeats", "warmup"), [(0, 1), (1, -1)])
def test_numbers_of_passes_that_mean_nothing_are_refused(repeats: int, warmup: int) -> None:
    with pytest.raises(SettingError, match=f"repeats={repeats}, warmup={warmup}"):
        measure_latency({"a": nn.Identity()}, torch.zeros(1), repeats=repeats, warmup=warmup)


def test_no_model_is_refused() -> None:
    with pytest.raises(SettingError, match="no model"):
        measure_latency({}, torch.zeros(1))
