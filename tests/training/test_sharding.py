"""Weights shared out over two processes: the same training as in one, with momentum copies, averages and searches."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from together import run_together
from training import sharding_ranks
from training.sharding_ranks import CASES


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What one process finds, and what each of two finds."""
    folder = tmp_path_factory.mktemp("ranks")
    expected = {name: sharding_ranks.train(case, share=False) for name, case in CASES.items()}
    run_together(sharding_ranks.run, folder)
    return expected, [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("name", list(CASES))
def test_training_is_that_of_one_process(results: tuple[dict[str, Any], list[dict[str, Any]]], name: str) -> None:
    alone, ranks = results
    for rank in ranks:
        found, expected = rank[name][0], alone[name]
        for part in ("norms", "masked", "shrunk"):
            torch.testing.assert_close(found[part], expected[part], rtol=1e-7, atol=1e-9)
        for part in ("scores", "masks", "model", "average"):
            assert set(found[part]) == set(expected[part])
            for key, value in expected[part].items():
                torch.testing.assert_close(found[part][key], value, rtol=1e-7, atol=1e-9, msg=f"{part} {key}")


@pytest.mark.parametrize("name", list(CASES))
def test_training_goes_on_from_whole_states(results: tuple[dict[str, Any], list[dict[str, Any]]], name: str) -> None:
    _, ranks = results
    for rank in ranks:
        straight, resumed = rank[name]
        for part in ("scores", "masks", "model", "average"):
            for key, value in straight[part].items():
                assert torch.equal(resumed[part][key], value), f"{part} {key}"


def test_blocks_that_share_a_weight_are_refused(results: tuple[dict[str, Any], list[dict[str, Any]]]) -> None:
    _, ranks = results
    assert all("blocks.0 and blocks.2 share a weight" in rank["tied"] for rank in ranks)
