"""Models whose weights `fully_shard` spreads over processes: the same scores, masks, plans and cut models."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import upop
from pruning import sharded_ranks
from pruning.families import NLVR, VIT, finished_pruner, loss_of, outputs_of
from pruning.sharded_ranks import CASES
from pruning.wrapped import of_one_process
from tiers import mostly_slow
from together import run_together
from upop.errors import LayoutError, VerificationError

Results = dict[str, tuple[dict[str, Any], list[dict[str, Any]]]]


QUICK = ("vit", "gpt2", "torch")


def _results(folder: Path, *names: str) -> Results:
    """Return, per case, what one process finds, and what each of two finds."""
    alone = {name: {} if name == "refused" else sharded_ranks.alone(CASES[name]) for name in names}
    run_together(sharded_ranks.run, folder, names)
    found = [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    return {name: (alone[name], [each[name] for each in found]) for name in alone}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return _results(tmp_path_factory.mktemp("ranks"), *QUICK, "refused")


@pytest.fixture(scope="module")
def more_results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return _results(tmp_path_factory.mktemp("ranks"), *(name for name in CASES if name not in QUICK))


@pytest.fixture(params=mostly_slow(CASES, *QUICK))
def case(request: pytest.FixtureRequest) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    found: Results = request.getfixturevalue("results" if request.param in QUICK else "more_results")
    return found[request.param]


def test_scores_and_masks_are_those_of_one_process(case: tuple[dict[str, Any], list[dict[str, Any]]]) -> None:
    expected, ranks = case
    for found in ranks:
        assert found["plan"] == expected["plan"]
        assert found["costs"] == expected["costs"]
        assert found["kept"] == expected["kept"]
        assert found["skipped"] == expected["skipped"] == 1
        for name, importance in expected["scores"].items():
            torch.testing.assert_close(found["scores"][name], importance, rtol=1e-9, atol=1e-11)
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


def test_a_sharded_model_is_cut_where_it_is_and_stays_sharded(
    case: tuple[dict[str, Any], list[dict[str, Any]]],
) -> None:
    expected, ranks = case
    for found in ranks:
        torch.testing.assert_close(found["in place"], expected["shrunk"], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(found["gathered"], expected["shrunk"], rtol=1e-9, atol=1e-9)
        assert found["parts"] == (True, expected["shapes"])


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_compression_of_a_sharded_model_is_that_of_a_plain_one(processes: int, tmp_path: Path) -> None:
    expected = sharded_ranks.compressed(0, 0)
    if processes == 1:
        of_one_process(tmp_path)
        ranks = [sharded_ranks.compressed(0, 1)]
        torch.distributed.destroy_process_group()
    else:
        run_together(sharded_ranks.compress, tmp_path)
        ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(processes)]
    for found in ranks:
        assert found["same"] and found["sharded"] == {True}
        assert found["plan"] == expected["plan"]
        for part in ("weights", "moments"):
            for name, value in expected[part].items():
                torch.testing.assert_close(found[part][name], value, rtol=1e-7, atol=1e-12)


def test_a_cut_of_a_sharded_model_that_fails_leaves_it_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_one_process(tmp_path)
    model: Any = VIT.build()
    for module in (*model.blocks, model):
        fully_shard(module, mesh=init_device_mesh("cpu", (1,)))
    expected, kinds = outputs_of(model, VIT.inputs()), [type(module) for module in model.modules()]
    model.reshard()
    parameters = dict(model.named_parameters())
    plan = {group.name: range(2) for group in upop.find_groups(model)}

    def spoiled(*_: Any, **__: Any) -> None:
        raise VerificationError("No.")

    monkeypatch.setattr(sys.modules["upop.pruning.shrink"], "compare", spoiled)
    with pytest.raises(VerificationError, match="No"):
        upop.shrink(model, plan, verify=VIT.inputs())
    assert torch.equal(outputs_of(model, VIT.inputs()), expected)
    assert [type(module) for module in model.modules()] == kinds
    model.reshard()
    assert all(parameters[name] is each for name, each in model.named_parameters())
    torch.distributed.destroy_process_group()


def test_masks_come_off_a_sharded_model_without_a_trace(case: tuple[dict[str, Any], list[dict[str, Any]]]) -> None:
    _, ranks = case
    for found in ranks:
        assert found["classes"] and found["sharded"] > 2
        torch.testing.assert_close(*found["plain"], rtol=1e-12, atol=1e-12)


def test_what_needs_whole_weights_says_how_to_get_them(case: tuple[dict[str, Any], list[dict[str, Any]]]) -> None:
    _, ranks = case
    for found in ranks:
        assert len(found["refused"]) == 3
        assert all("whole = upop.full_copy(model)" in message for message in found["refused"])


def test_other_ways_of_spreading_weights_are_refused(results: Results) -> None:
    for found in results["refused"][1]:
        assert "flattens weights" in found["flattened"] and "fully_shard" in found["flattened"]
        assert "frozen weights beside trained" in found["frozen"]
        assert "tensor parallelism" in found["cut twice"]


def test_a_plain_model_is_gathered_as_it_is() -> None:
    model = VIT.build()
    pruner = upop.Pruner(model, 0.5, 4)
    whole = upop.full_copy(model, upop.meta_copy(VIT.build(seed=1)))
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
    for name, importance in stayed.scores.items():
        assert torch.equal(pruner.scores[name], importance)
    assert pruner.plan() == stayed.plan()
    assert [type(module) for module in model.modules()] == [type(module) for module in VIT.build().modules()]


def test_a_search_does_not_move_to_another_model() -> None:
    pruner = upop.Pruner(VIT.build(), 0.5, 4)
    with pytest.raises(LayoutError, match="other groups"):
        pruner.move_to(NLVR.build())


def test_gathering_into_another_model_is_refused() -> None:
    with pytest.raises(LayoutError, match=r"34 parameters differ.*\(bias, "):
        upop.full_copy(torch.nn.Linear(2, 2), VIT.build())
