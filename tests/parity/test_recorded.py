"""Behaviour recorded from the published code, task by task: outputs, losses, and the search, step by step."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import upop
from parity.cases import CASES, Recorded, Tensors, all_recorded
from tiers import mostly_slow

KEYS = Path(__file__).parent / "data" / "keys"
SETS = all_recorded()
if not SETS:
    pytest.skip("the folder of recorded behaviour holds no set", allow_module_level=True)


@pytest.fixture(params=SETS, ids=lambda found: f"{found.task}-{found.folder.name}")
def recorded(request: pytest.FixtureRequest) -> Recorded:
    return request.param


def assert_close(found: Tensor, expected: Tensor, tolerance: float, name: str = "") -> None:
    assert found.shape == expected.shape, name
    if not expected.is_floating_point():
        assert torch.equal(found, expected), name
        return
    assert float((found - expected).abs().max() / expected.abs().max()) < tolerance, name


def assert_outputs(
    recorded: Recorded, model: nn.Module, expected: Tensors, tolerance: float, dtype: torch.dtype = torch.float32
) -> None:
    prefix = "f64/eval" if dtype == torch.float64 else "f32/eval"
    wanted = {key.removeprefix(f"{prefix}/") for key in expected if key.startswith(prefix)}
    with torch.no_grad():
        found = recorded.case.found(model.eval(), recorded.batch(0, dtype), wanted)
    compared = 0
    for name, value in found.items():
        if f"{prefix}/{name}" in expected:  # compressed outputs and outputs in float64 leave some out
            assert_close(value, expected[f"{prefix}/{name}"], tolerance, name)
            compared += 1
    assert compared > 1


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_dense_outputs(recorded: Recorded, dtype: torch.dtype, tolerance: float) -> None:
    expected = recorded.read("dense_out")
    assert_outputs(recorded, recorded.load("dense.pth").to(dtype), expected, tolerance, dtype)


def test_every_recorded_output_is_compared(recorded: Recorded) -> None:
    wanted = {key.removeprefix("f32/eval/") for key in recorded.read("dense_out") if key.startswith("f32/eval/")}
    with torch.no_grad():
        found = recorded.case.found(recorded.load("dense.pth").eval(), recorded.batch(0), wanted)
    assert wanted - set(found) <= {"loss_model", "prompt_length"}


@pytest.mark.parametrize("k", [1, 3, 6])
def test_answers_are_ranked_for_the_numbers_that_were_recorded(k: int) -> None:
    for recorded in (found for found in SETS if found.task == "vqa"):
        model, batch = recorded.load("dense.pth").eval(), recorded.batch(0)
        with torch.no_grad():
            outputs = recorded.case.found(model, batch, [f"rank_ids_k{k}", "loss"])
            assert [name for name in outputs if name.startswith("rank")] == [f"rank_ids_k{k}"]
            # All at once, and not in parts.
            states = model.encode(batch["images"], batch["question_ids"], batch["question_mask"])[1]
            words = batch["candidate_ids"], batch["candidate_mask"]
            expected = model.rank(states, batch["question_mask"], *words, k, chunk=1000)
        assert torch.equal(outputs[f"rank_ids_k{k}"], expected)


def test_published_compressed_checkpoint(recorded: Recorded) -> None:
    assert_outputs(recorded, recorded.load("compressed.pth"), recorded.read("compressed_out"), 1e-5)


def optimizer_of(model: nn.Module, kind: str, recorded: Recorded) -> torch.optim.Optimizer:
    config = recorded.config
    parameters = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if kind == "sgd":
        return torch.optim.SGD([parameter for _, parameter in parameters], lr=config["lr_sgd"])
    groups = [
        {"params": [value for name, value in parameters if recorded.case.decayed(name, value) is decayed], **rate}
        for decayed, rate in ((True, {"weight_decay": config["weight_decay"]}), (False, {"weight_decay": 0.0}))
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=config["lr_adamw"])


def recorded_masks(recorded: Recorded, expected: Tensors, prefix: str) -> Tensors:
    """The recorded masks, or scores, by the names of our groups."""
    found = {
        recorded.case.group(key.removeprefix(f"{prefix}/").removesuffix(".alpha")): value.flatten()
        for key, value in expected.items()
        if key.startswith(f"{prefix}/")
    }
    assert found
    return found


def assert_scores(
    pruner: upop.Pruner, recorded: Recorded, expected: Tensors, prefix: str, steps: int, world: int = 1
) -> None:
    wanted = recorded_masks(recorded, expected, prefix)
    for group in pruner.groups:
        # The recorded gradients include the sparsity terms, a constant per step that standardising removes.
        weight = recorded.config["w_sp_attn" if group.kind == "attention" else "w_sp_mlp"] / world
        assert_close(pruner.scores[group.name] + steps * weight, wanted[group.name], 1e-8, group.name)


def assert_masks(pruner: upop.Pruner, recorded: Recorded, expected: Tensors, prefix: str) -> None:
    wanted = recorded_masks(recorded, expected, prefix)
    assert set(wanted) == {group.name for group in pruner.groups}
    for group in pruner.groups:
        torch.testing.assert_close(pruner.masks[group.name], wanted[group.name], rtol=0, atol=1e-15)
        assert torch.equal(pruner.masks[group.name] == 1, wanted[group.name] == 1)


@pytest.mark.parametrize("kind", mostly_slow(["adamw", "sgd"], "adamw"))
def test_search_step_by_step(recorded: Recorded, kind: str) -> None:
    config = recorded.config
    expected = recorded.read(f"search_{kind}")
    model = recorded.load("dense.pth").double().train()
    optimizer = optimizer_of(model, kind, recorded)
    pruner = upop.Pruner(model, config["p"], config["steps"], interval=1, cost="reference")
    for step in range(config["steps"]):
        for name, weighed in (("attn", "attention"), ("mlp", "mlp")):
            assert pruner.mask_sum(weighed) == pytest.approx(float(expected[f"step{step}/sparsity_{name}"]), rel=1e-12)
        batch = recorded.batch(step, torch.float64, expected)
        loss = recorded.case.loss(model, batch)
        assert_close(loss.detach(), expected[f"step{step}/loss_task"], 1e-10)
        optimizer.zero_grad()
        loss.backward()
        pruner.step()
        optimizer.step()
        assert pruner.current_ratio == pytest.approx(float(expected[f"step{step}/pi"]), rel=1e-12)
        assert pruner.threshold == pytest.approx(float(expected[f"step{step}/threshold"]), rel=1e-8)
        assert_scores(pruner, recorded, expected, f"step{step}/grad", step + 1)
        assert_masks(pruner, recorded, expected, f"step{step}/mask")
    pruner.shrink(verify=recorded.case.verify(recorded.batch(0, torch.float64)))


def test_published_update_intervals(recorded: Recorded) -> None:
    config = recorded.config
    expected = recorded.read("official_loop")
    model = recorded.load("dense.pth").double().train()
    optimizer = optimizer_of(model, "adamw", recorded)
    total = 2 * config["steps"]
    interval = config.get("official_loop_interval", recorded.case.interval)
    first = recorded.case.update_first_step
    pruner = upop.Pruner(model, config["p"], total, interval, cost="reference", update_first_step=first)
    updates = 0
    for step in range(total):
        before = pruner.masks
        batch = recorded.batch(step % config["steps"], torch.float64)
        if recorded.case.in_loop is not None:
            batch = recorded.case.in_loop(config, batch, step)
        loss = recorded.case.loss(model, batch)
        optimizer.zero_grad()
        loss.backward()
        pruner.step()
        optimizer.step()
        if any(not torch.equal(before[name], mask) for name, mask in pruner.masks.items()):
            prefix = f"update{updates}"
            assert pruner.current_ratio == pytest.approx(float(expected[f"{prefix}/pi"]), rel=1e-12)
            if not recorded.case.masks_in_optimizer:
                assert pruner.threshold == pytest.approx(float(expected[f"{prefix}/threshold"]), rel=1e-8)
                assert_scores(pruner, recorded, expected, f"{prefix}/grad", step + 1)
                assert_masks(pruner, recorded, expected, f"{prefix}/mask_after")
            updates += 1
    assert updates == len({key.split("/")[0] for key in expected if key.startswith("update")})
    if recorded.case.masks_in_optimizer:
        return
    assert_masks(pruner, recorded, expected, "final_mask")
    norms = {key: norm for key, norm in expected.items() if key.startswith("final_weight_norm/")}
    found = recorded.case.norms(model)
    compared = 0
    for key, norm in norms.items():
        name = key.removeprefix("final_weight_norm/")
        if not name.endswith("alpha"):
            assert found[name] == pytest.approx(float(norm), rel=1e-7), key  # recorded in float32
            compared += 1
    assert compared


def test_our_shrunken_model_keeps_the_searched_function(recorded: Recorded) -> None:
    final = recorded.read("search_adamw_final")
    alphas = {
        recorded.case.group(key.removesuffix(".alpha")): value.flatten()
        for key, value in final.items()
        if key.endswith(".alpha")
    }
    model = recorded.case.searched(recorded, {key: value for key, value in final.items() if not key.endswith(".alpha")})
    upop.shrink(
        model,
        {name: alpha.nonzero().flatten().tolist() for name, alpha in alphas.items()},
        verify=recorded.case.verify(recorded.batch(0)),
    )
    expected = recorded.read("search_out")
    left_out = {f"f32/eval/{name}" for name in recorded.case.not_shrunk}
    assert left_out <= set(expected)
    assert_outputs(recorded, model, {key: expected[key] for key in set(expected) - left_out}, 1e-5)


@pytest.mark.parametrize(("name", "build"), [row for case in CASES.values() for row in case.keys.items()])
def test_keys_and_shapes_of_the_full_size_models(name: str, build) -> None:
    published = json.loads((KEYS / f"{name}.keys.json").read_text())
    with torch.device("meta"):
        model = build()
    exported = next(case.exported for case in CASES.values() if name in case.keys)(model)
    assert {key: list(value.shape) for key, value in exported.items()} == published["keys"]
    assert upop.count_parameters(model) == published["totals"]["params_total(parameters())"]
