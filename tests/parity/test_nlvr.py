"""Behaviour recorded from the published NLVR code: outputs, losses, and the search, step by step."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

import upop
from conftest import parity_sets
from upop.models.nlvr import BlipNlvr, NlvrConfig

SETS = parity_sets("nlvr")
if not SETS:
    pytest.skip("the folder of recorded behaviour holds no set for nlvr", allow_module_level=True)


@pytest.fixture(params=SETS, ids=lambda path: path.name, scope="module")
def recorded(request: pytest.FixtureRequest) -> Path:
    return request.param


def settings(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def load(folder: Path, name: str) -> BlipNlvr:
    config = settings(folder)
    model = upop.load_official(
        "nlvr",
        folder / name,
        vision_heads=config["vision"]["heads"],
        text_heads=config["med"]["num_attention_heads"],
        vision_mlp=config["vision"]["mlp_ratio"] * config["vision"]["width"],
        text_mlp=config["med"]["intermediate_size"],
        dropout=0.0,
        drop_path=0.0,
    )
    assert isinstance(model, BlipNlvr)
    return model


def batch(folder: Path, step: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    inputs = load_file(folder / "inputs.safetensors")
    return {
        "images": inputs[f"step{step}/image"].to(dtype),
        "input_ids": inputs[f"step{step}/ids"],
        "attention_mask": inputs[f"step{step}/mask"],
        "labels": inputs[f"step{step}/targets"],
    }


def loss_of(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(model(inputs["images"], inputs["input_ids"], inputs["attention_mask"]), inputs["labels"])


def outputs_of(model: BlipNlvr, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    with torch.no_grad():
        images, text = model.encode(inputs["images"], inputs["input_ids"], inputs["attention_mask"])
        logits = model(inputs["images"], inputs["input_ids"], inputs["attention_mask"])
        loss = F.cross_entropy(logits, inputs["labels"])
    return {"image_embeds": images, "text_hidden": text, "logits": logits, "loss": loss}


def assert_close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    assert found.shape == expected.shape
    assert float((found - expected).abs().max() / expected.abs().max()) < tolerance


def assert_outputs(found: dict[str, Tensor], expected: dict[str, Tensor], prefix: str, tolerance: float) -> None:
    for name, value in found.items():
        assert_close(value, expected[f"{prefix}/{name}"], tolerance)


@pytest.mark.parametrize(("dtype", "name", "tolerance"), [(torch.float32, "f32", 1e-5), (torch.float64, "f64", 1e-10)])
def test_dense_outputs(recorded: Path, dtype: torch.dtype, name: str, tolerance: float) -> None:
    model = load(recorded, "dense.pth").to(dtype)
    expected = load_file(recorded / "dense_out.safetensors")
    inputs = batch(recorded, 0, dtype)
    assert_outputs(outputs_of(model, inputs), expected, f"{name}/eval", tolerance)
    assert_close(loss_of(model.train(), inputs).detach(), expected[f"{name}/train/loss"], tolerance)


def test_published_compressed_checkpoint(recorded: Path) -> None:
    model = load(recorded, "compressed.pth")
    expected = load_file(recorded / "compressed_out.safetensors")
    assert_outputs(outputs_of(model, batch(recorded, 0)), expected, "f32/eval", 1e-5)


def optimizer_of(model: nn.Module, kind: str, config: dict) -> torch.optim.Optimizer:
    if kind == "sgd":
        return torch.optim.SGD(model.parameters(), lr=config["lr_sgd"])
    return torch.optim.AdamW(model.parameters(), lr=config["lr_adamw"], weight_decay=config["weight_decay"])


def assert_scores(pruner: upop.Pruner, expected: dict[str, Tensor], prefix: str, config: dict, steps: int) -> None:
    for unit in pruner.units:
        # The recorded gradients include the sparsity terms, a constant per step that standardising removes.
        weight = config["w_sp_attn"] if unit.kind == "attention" else config["w_sp_mlp"]
        wanted = expected[f"{prefix}/{unit.name}.alpha"].flatten()
        assert_close(pruner.scores[unit.name] + steps * weight, wanted, 1e-8)


def assert_masks(pruner: upop.Pruner, expected: dict[str, Tensor], prefix: str) -> None:
    for unit in pruner.units:
        wanted = expected[f"{prefix}/{unit.name}.alpha"].flatten()
        torch.testing.assert_close(pruner.masks[unit.name], wanted, rtol=0, atol=1e-15)
        assert torch.equal(pruner.masks[unit.name] == 1, wanted == 1)


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_search_step_by_step(recorded: Path, kind: str) -> None:
    config = settings(recorded)
    expected = load_file(recorded / f"search_{kind}.safetensors")
    model = load(recorded, "dense.pth").double().train()
    optimizer = optimizer_of(model, kind, config)
    pruner = upop.Pruner(model, config["p"], config["steps"], interval=1, cost="reference")
    alphas = {key.removeprefix("step0/mask/") for key in expected if key.startswith("step0/mask/")}
    assert {f"{unit.name}.alpha" for unit in pruner.units} == alphas
    for step in range(config["steps"]):
        for name, weighed in (("attn", "attention"), ("mlp", "mlp")):
            assert pruner.mask_sum(weighed) == pytest.approx(float(expected[f"step{step}/sparsity_{name}"]), rel=1e-12)
        loss = loss_of(model, batch(recorded, step, torch.float64))
        assert_close(loss.detach(), expected[f"step{step}/loss_task"], 1e-10)
        optimizer.zero_grad()
        loss.backward()
        pruner.step()
        optimizer.step()
        assert pruner.current_ratio == pytest.approx(float(expected[f"step{step}/pi"]), rel=1e-12)
        assert pruner.threshold == pytest.approx(float(expected[f"step{step}/threshold"]), rel=1e-8)
        assert_scores(pruner, expected, f"step{step}/grad", config, step + 1)
        assert_masks(pruner, expected, f"step{step}/mask")
    pruner.shrink(verify={key: value for key, value in batch(recorded, 0, torch.float64).items() if key != "labels"})


def test_published_update_intervals(recorded: Path) -> None:
    config = settings(recorded)
    expected = load_file(recorded / "official_loop.safetensors")
    model = load(recorded, "dense.pth").double().train()
    optimizer = optimizer_of(model, "adamw", config)
    total = 2 * config["steps"]
    pruner = upop.Pruner(model, config["p"], total, interval=50, cost="reference")
    updates = 0
    for step in range(total):
        before = pruner.masks
        loss = loss_of(model, batch(recorded, step % config["steps"], torch.float64))
        optimizer.zero_grad()
        loss.backward()
        pruner.step()
        optimizer.step()
        if any(not torch.equal(before[name], mask) for name, mask in pruner.masks.items()):
            prefix = f"update{updates}"
            assert pruner.current_ratio == pytest.approx(float(expected[f"{prefix}/pi"]), rel=1e-12)
            assert pruner.threshold == pytest.approx(float(expected[f"{prefix}/threshold"]), rel=1e-8)
            assert_scores(pruner, expected, f"{prefix}/grad", config, step + 1)
            assert_masks(pruner, expected, f"{prefix}/mask_after")
            updates += 1
    assert updates == len({key.split("/")[0] for key in expected if key.startswith("update")})
    assert_masks(pruner, expected, "final_mask")
    for key, norm in expected.items():
        if key.startswith("final_weight_norm/") and not key.endswith("alpha"):
            found = model.get_parameter(key.removeprefix("final_weight_norm/")).detach().norm()
            assert float(found) == pytest.approx(float(norm), rel=1e-7), key  # norms are in float32


def test_our_shrunken_model_keeps_the_searched_function(recorded: Path) -> None:
    final = load_file(recorded / "search_adamw_final.safetensors")
    alphas = {key.removesuffix(".alpha"): value.flatten() for key, value in final.items() if key.endswith(".alpha")}
    model = load(recorded, "dense.pth")
    model.load_state_dict({key: value for key, value in final.items() if not key.endswith(".alpha")})
    upop.shrink(
        model,
        {name: alpha.nonzero().flatten().tolist() for name, alpha in alphas.items()},
        verify={key: value for key, value in batch(recorded, 0).items() if key != "labels"},
    )
    expected = load_file(recorded / "search_out.safetensors")
    assert_outputs(outputs_of(model, batch(recorded, 0)), expected, "f32/eval", 1e-5)


@pytest.mark.parametrize("size", ["base", "large"])
def test_keys_and_shapes_of_the_full_size_models(size: str) -> None:
    published = json.loads((Path(__file__).parent / "data" / "keys" / f"blip_nlvr_vit_{size}.keys.json").read_text())
    with torch.device("meta"):
        model = BlipNlvr(NlvrConfig.vit(size))
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == published["keys"]
    assert upop.count_parameters(model) == published["totals"]["params_total(parameters())"]
