"""How methods share out their epochs, and the learning rates of search and retraining."""

from __future__ import annotations

from typing import Any

import pytest

from upop.errors import SettingError
from upop.runs.schedules import Phases, check_epochs, compression_rates, decay, phases
from upop.settings import RunSettings


def settings(**given: Any) -> RunSettings:
    return RunSettings(**{"search_epochs": 10, "max_epoch": 10, "init_lr": 1.0, **given})


def test_all_methods_take_equally_many_epochs() -> None:
    assert phases(settings(method="reference", search_epochs=4), 100) == Phases(400, 4, 10)
    assert phases(settings(method="magnitude", search_epochs=4), 100) == Phases(0, 0, 14)
    assert phases(settings(search_epochs=4), 100) == Phases(140, 0, 14)


def test_epochs_are_all_epochs_and_the_published_names_say_how_the_reference_shares_them() -> None:
    assert phases(settings(epochs=30), 100) == Phases(300, 0, 30)
    assert phases(settings(method="magnitude", epochs=30), 100) == Phases(0, 0, 30)
    assert phases(settings(method="reference", epochs=30), 100) == Phases(1500, 15, 15)
    assert phases(settings(method="reference", epochs=30, search_epochs=5), 100) == Phases(1000, 10, 20)
    assert phases(settings(method="reference", epochs=2, search_epochs=1), 100) == Phases(100, 1, 1)
    assert settings(epochs=30).training_epochs == 30


def test_too_few_epochs_are_refused() -> None:
    check_epochs(settings(epochs=1, method="magnitude"))
    check_epochs(settings(epochs=2))
    for method in ("upop", "reference"):
        with pytest.raises(SettingError, match="--epochs 2"):
            check_epochs(settings(epochs=1, method=method))


@pytest.mark.parametrize(
    ("given", "steps_per_epoch", "expected"),
    [
        ({}, 100, Phases(200, 0, 20)),  # a tenth of 2000 steps
        ({"search_share": 0.11}, 100, Phases(220, 0, 20)),
        ({}, 5, Phases(16, 0, 20)),  # a tenth of 100 steps would be 10
        ({"search_epochs": 1, "max_epoch": 1}, 12, Phases(8, 0, 2)),  # 16 would be two thirds of all
        ({"search_share": 0.9, "search_epochs": 1, "max_epoch": 1}, 100, Phases(100, 0, 2)),  # one epoch is left
        ({"search_epochs": 1, "max_epoch": 1}, 1, Phases(1, 0, 2)),
    ],
)
def test_the_search_takes_a_share_of_all_steps(given: dict[str, Any], steps_per_epoch: int, expected: Phases) -> None:
    assert phases(settings(**given), steps_per_epoch) == expected


@pytest.mark.parametrize("method", ["upop", "magnitude"])
@pytest.mark.parametrize("schedule", ["epoch", "step", "polynomial"])
def test_one_schedule_warms_up_and_falls_over_search_and_retraining(method: str, schedule: str) -> None:
    given = settings(method=method, schedule=schedule, search_lr=0.2)
    assert phases(given, 10).search == 0
    rates = [compression_rates(given, 1.0, 10)[1](step) for step in range(200)]
    plain = decay(settings(schedule=schedule), 1.0, 20, 10)
    assert rates[10:] == [pytest.approx(plain(step)) for step in range(10, 200)]
    assert rates[:10] == [pytest.approx(plain(step) * (step + 1) / 10) for step in range(10)]  # 5 % of 200 steps


def test_the_published_recipe_has_a_schedule_for_each_phase() -> None:
    given = settings(method="reference", schedule="step", search_lr=0.2)
    search, retrain = compression_rates(given, 1.0, 10)
    assert {search(step) for step in range(100)} == {0.2}
    assert [retrain(step) for step in (0, 50)] == [1.0, pytest.approx(0.5)]
    search, _ = compression_rates(settings(method="reference"), 1.0, 10)
    assert search(99) == 1.0


@pytest.mark.parametrize(
    ("given", "climbing"),
    [({"warmup_steps": 0}, 0), ({"warmup_steps": 7}, 7), ({"warmup_epochs": 2}, 20), ({}, 10)],
)
def test_a_warm_up_that_is_given_takes_the_place_of_the_usual_one(given: dict[str, Any], climbing: int) -> None:
    _, rate = compression_rates(settings(schedule="epoch", **given), 1.0, 10)
    _, plain = compression_rates(settings(schedule="epoch", warmup_steps=0), 1.0, 10)
    below = sum(rate(step) < plain(step) for step in range(20))
    assert below == max(0, climbing - 1)  # the last step of the warm-up has the whole rate
    assert rate(20) == plain(20)


def test_training_and_the_published_recipe_warm_up_only_where_they_are_told_to() -> None:
    assert decay(settings(), 1.0, 10, 10)(0) == 1.0
    assert compression_rates(settings(method="reference"), 1.0, 10)[1](0) == 1.0
    assert compression_rates(settings(method="reference", warmup_steps=4), 1.0, 10)[1](0) == 0.25


@pytest.mark.parametrize("given", [{"search_share": 0.2}, {"importance": "squared"}, {"correct": False}], ids=str)
def test_what_another_method_takes_is_refused(given: dict[str, Any]) -> None:
    settings(**given)
    for method in ("reference", "magnitude"):
        with pytest.raises(ValueError, match=f"method: {method} does not use {next(iter(given))}"):
            settings(method=method, **given)
