"""Weights shared out over two processes: the same training as in one, with momentum copies, averages and searches."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tiers import mostly_slow
from together import run_together
from training import sharding_ranks
from training.sharding_ranks import CASES


@pytest.fixture(scope="module", params=mostly_slow(CASES, "clip"))
def results(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What one process finds, and what each of two finds."""
    folder = tmp_path_factory.mktemp("ranks")
    expected = sharding_ranks.train(CASES[request.param], share=False)
    run_together(sharding_ranks.run, request.param, folder)
    return expected, [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


def test_training_is_that_of_one_process(results: tuple[dict[str, Any], list[dict[str, Any]]]) -> None:
    expected, ranks = results
    for rank in ranks:
        found = rank["runs"][0]
        for part in ("norms", "masked", "shrunk"):
            torch.testing.assert_close(found[part], expected[part], rtol=1e-7, atol=1e-9)
        for part in ("scores", "masks", "model", "average"):
            assert set(found[part]) == set(expected[part])
            for key, value in expected[part].items():
                torch.testing.assert_close(found[part][key], value, rtol=1e-7, atol=1e-9, msg=f"{part} {key}")


def test_training_goes_on_from_whole_states(results: tuple[dict[str, Any], list[dict[str, Any]]]) -> None:
    _, ranks = results
    for rank in ranks:
        straight, resumed = rank["runs"]
        for part in ("scores", "masks", "model", "average"):
            for key, value in straight[part].items():
                assert torch.equal(resumed[part][key], value), f"{part} {key}"


def test_blocks_that_share_a_weight_are_refused(results: tuple[dict[str, Any], list[dict[str, Any]]]) -> None:
    _, ranks = results
    assert all("blocks.0 and blocks.2 share a weight" in rank["tied"] for rank in ranks)
