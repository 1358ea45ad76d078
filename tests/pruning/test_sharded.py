"""Models whose weights `fully_shard` spreads over processes: the same scores, masks, plans and cut models."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import upop
from pruning import sharded_ranks
from pruning.families import NLVR, VIT, finished_pruner, loss_of, outputs_of
from pruning.sharded_ranks import CASES
from together import run_together
from upop.errors import LayoutError

Results = dict[str, tuple[dict[str, Any], list[dict[str, Any]]]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Per case: what one process finds, and what each of two finds."""
    folder = tmp_path_factory.mktemp("ranks")
    expected = {name: sharded_ranks.alone(case) for name, case in CASES.items()}
    run_together(sharded_ranks.run, folder)
    found = [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    alone = {**expected, "refused": {}}
    return {name: (alone[name], [each[name] for each in found]) for name in alone}


@pytest.fixture(params=list(CASES))
def case(request: pytest.FixtureRequest, results: Results) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    return results[request.param]


def test_scores_and_masks_are_those_of_one_process(case: tuple[dict[str, Any], list[dict[str, Any]]]) -> None:
    expected, ranks = case
    for found in ranks:
        assert found["plan"] == expected["plan"]
        assert found["costs"] == expected["costs"]
        assert found["kept"] == expected["kept"]
        assert found["skipped"] == expected["skipped"] == 1
        for name, score in expected["scores"].items():
            torch.testing.assert_close(found["scores"][name], score, rtol=1e-9, atol=1e-11)
            assert torch.equal(found["scores"][name], ranks[0]["scores"][name])
            assert torch.equal(found["masks"][name], expected["masks"][name])


def test_a_gathered_copy_is_cut_as_the_model_in_one_piece_is(case: tuple[dict[str, Any], list[dict[str, Any]]]) -> None:
    expected, ranks = case
    for found in ranks:
        assert found["shapes"] == expected["shapes"]
        assert found["ties"]
        for name in ("masked", "shrunk"):
            torch.testing.assert_close(found[name], expected[name], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(found["copy"], found["masked"], rtol=1e-12, atol=1e-12)


def test_masks_come_off_a_sharded_model_without_a_trace(case: tuple[dict[str, Any], list[dict[str, Any]]]) -> None:
    _, ranks = case
    for found in ranks:
        assert found["classes"] and found["sharded"] > 2
        torch.testing.assert_close(*found["plain"], rtol=1e-12, atol=1e-12)


def test_what_needs_whole_weights_says_how_to_get_them(case: tuple[dict[str, Any], list[dict[str, Any]]]) -> None:
    _, ranks = case
    for found in ranks:
        assert len(found["refused"]) == 5
        assert all("whole = upop.gather(model, like=...)" in message for message in found["refused"])


def test_other_ways_of_spreading_weights_are_refused(results: Results) -> None:
    for found in results["refused"][1]:
        assert "flattens weights" in found["flattened"] and "fully_shard" in found["flattened"]
        assert "Do not combine it with tensor parallelism" in found["cut twice"]


def test_a_plain_model_is_gathered_as_it_is() -> None:
    model = VIT.build()
    pruner = upop.Pruner(model, 0.5, 4)
    whole = upop.gather(model, upop.skeleton(VIT.build(seed=1)))
    pruner.remove()
    assert torch.equal(outputs_of(whole, VIT.inputs()), outputs_of(model, VIT.inputs()))
    assert all(part.device.type == "cpu" for part in whole.parameters())


@pytest.mark.parametrize("progress", ["stages", "soft"])
def test_a_search_moves_to_a_copy_and_on_from_there(progress: Any) -> None:
    inputs = VIT.inputs()
    stayed = finished_pruner(VIT.build(), inputs, steps=4, progress=progress)
    model, copy = VIT.build(), VIT.build()
    pruner = upop.Pruner(model, 0.5, 4, 1, progress=progress)
    for number in range(4):
        here, there = (copy, model) if number % 2 else (model, copy)
        if number:
            here.load_state_dict(there.state_dict())  # readers were corrected there
        pruner.move_to(here)
        here.zero_grad()
        loss_of(here(**inputs)).backward()
        pruner.step()
    for name, score in stayed.scores.items():
        assert torch.equal(pruner.scores[name], score)
    assert pruner.plan() == stayed.plan()
    assert [type(module) for module in model.modules()] == [type(module) for module in VIT.build().modules()]


def test_a_search_does_not_move_to_another_model() -> None:
    pruner = upop.Pruner(VIT.build(), 0.5, 4)
    with pytest.raises(LayoutError, match="has other units than the model that is searched"):
        pruner.move_to(NLVR.build())


def test_gathering_into_another_model_is_refused() -> None:
    with pytest.raises(LayoutError, match=r"34 parameters differ in name or shape \(bias, "):
        upop.gather(torch.nn.Linear(2, 2), VIT.build())
