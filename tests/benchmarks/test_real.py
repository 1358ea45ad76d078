"""The ways that are compared on pretrained weights: each finds what it looks for, and cells are not measured twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

import upop
from upop.pruning.costs import channel_costs

ROOT = Path(__file__).parents[2]
SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 20,
    "vocab_size": 40,
}


@pytest.fixture(autouse=True)
def _scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def encoder() -> Any:
    """Return a model whose odd neurons of the first MLP repeat the even ones before them."""
    torch.manual_seed(0)
    model: Any = BertModel(BertConfig(**SIZES, max_position_embeddings=16), add_pooling_layer=False).eval()
    layer = model.encoder.layer[0].intermediate.dense
    with torch.no_grad():
        layer.weight.mul_(20)
        layer.weight[1::2] = layer.weight[::2]
    return model


def decoder() -> Any:
    """Return a model whose second layer adds almost nothing, less in all than any other."""
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=1, use_cache=False)).eval()
    with torch.no_grad():
        for layer in (model.model.layers[1].self_attn.o_proj, model.model.layers[1].mlp.down_proj):
            layer.weight.mul_(1e-6)
    return model


IDS = torch.randint(40, (8, 12), generator=torch.Generator().manual_seed(0))


def states(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    out = model(input_ids=ids)
    found: Tensor = out.logits if hasattr(out, "logits") else out.last_hidden_state
    return found


def loss(model: nn.Module, ids: Tensor) -> Tensor:
    return states(model, ids)[..., :8].square().mean()


def seen(model: nn.Module, stack: Any = ()) -> Any:
    from real.methods import Seen

    groups = upop.find_groups(model)
    batches = IDS.split(2)
    return groups, Seen.of(model, groups, batches, loss, lambda *_: None, stack)


def test_all_ways_lose_the_same() -> None:
    from real.methods import WAYS, cut, kept_by

    model = decoder()
    groups, looks = seen(model)
    costs = dict(channel_costs(model, groups, "params", None))
    whole = sum(costs[group.name] * group.size for group in groups)
    before = sum(each.numel() for each in model.parameters())
    for name, way in WAYS.items():
        small = cut(model, groups, kept_by(way, model, groups, costs, looks, 0.25), looks, way.makes_up)
        biases = sum(each.numel() for name, each in small.named_parameters() if name.endswith("bias"))
        removed = before + biases - sum(each.numel() for each in small.parameters())
        assert abs(removed / whole - 0.25) <= max(costs.values()) / whole, name


def test_the_closed_form_makes_up_for_what_others_repeat() -> None:
    from real.methods import cut

    model = encoder()
    groups, looks = seen(model)
    name = next(group.name for group in groups if group.kind == "mlp")
    kept = {name: list(range(0, 20, 2))}
    with torch.no_grad():
        whole = states(model)
        far = [(states(cut(model, groups, kept, looks, way)) - whole).abs().max() for way in (None, "mean", "ridge")]
    assert far[2] < 0.2 * far[0]
    assert far[2] < 0.2 * far[1]


def test_what_never_changes_goes_first_and_is_in_the_bias() -> None:
    from real.methods import WAYS, cut, kept_by

    model = encoder()
    layer = model.encoder.layer[1].intermediate.dense
    with torch.no_grad():
        layer.weight[:5] = 0
        layer.bias[:5] = 3.0
    groups, looks = seen(model)
    group = [group for group in groups if group.kind == "mlp"][1]
    costs = dict(channel_costs(model, groups, "params", None))
    kept = kept_by(WAYS["variance, mean shift"], model, [group], costs, looks, 0.25)
    assert kept == {group.name: list(range(5, 20))}
    with torch.no_grad():
        shifted, plain = (states(cut(model, groups, kept, looks, way)) for way in ("mean", None))
        torch.testing.assert_close(shifted, states(model), atol=1e-4, rtol=1e-4)
        assert (plain - states(model)).abs().max() > 0.01


def test_layers_that_do_least_go() -> None:
    from real.methods import without_layers

    model = decoder()
    _, looks = seen(model, model.model.layers)
    layer = sum(each.numel() for each in model.model.layers[0].parameters())
    small: Any = without_layers(model, ["model.layers"], looks, 0.34, 3 * layer)
    assert len(small.model.layers) == 2
    with torch.no_grad():
        torch.testing.assert_close(states(small), states(model), atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_cells_are_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from real import compare

    out, model = tmp_path / "cells.json", decoder()

    def subject(folder: Path, every: int) -> Any:
        return compare.Subject(
            "tiny",
            "log of the loss",
            model,
            lambda seed, count: list(IDS.roll(seed, 0).repeat(2, 1)[: 2 * count].split(2)),
            loss,
            lambda model, split: float(loss(model, IDS).detach().log()),
            lambda *_: None,
            calibration=4,
            stack="model.layers",
        )

    monkeypatch.setitem(compare.SUBJECTS, "minilm", subject)
    given = ["compare", "--data", str(tmp_path), "--out", str(out), "--seeds", "0", "--ratios", "0.3", "--ways"]
    monkeypatch.setattr("sys.argv", [*given, "magnitude", "FLAP", compare.OURS])
    compare.main()
    rows = json.loads(out.read_text())["cells"]
    assert [row["way"] for row in rows] == ["dense", "magnitude", "FLAP", compare.OURS]
    marked = [{**row, "seconds": -1} for row in rows if row["way"] != "FLAP"]
    out.write_text(json.dumps({"machine": {}, "cells": marked}))
    monkeypatch.setattr("sys.argv", [*given, "magnitude", "FLAP", compare.OURS, "--steps", "0"])
    compare.main()
    again = json.loads(out.read_text())["cells"]
    assert [(row["way"], row["seconds"] == -1) for row in again] == [
        ("dense", True),
        ("magnitude", True),
        (compare.OURS, True),
        ("FLAP", False),
    ]
    assert {row["way"]: row["quality"] for row in again} == {row["way"]: row["quality"] for row in rows}
    monkeypatch.setattr("sys.argv", [*given, "magnitude", "--steps", "2"])
    compare.main()
    trained, cut_alone = (json.loads(out.read_text())["cells"][number] for number in (-1, 1))
    assert trained["quality"] != cut_alone["quality"]
    assert trained["removed"] == cut_alone["removed"]


def test_a_saliency_model_agrees_with_itself_alone(tmp_path: Path) -> None:
    from PIL import Image
    from transformers import Dinov2Config, Dinov2Model

    from real import dinov2

    for number in range(6):
        pixels = torch.randint(256, (60 + number, 80, 3), generator=torch.Generator().manual_seed(number))
        Image.fromarray(pixels.byte().numpy()).save(tmp_path / f"{number}.png")
    photographs = dinov2.photographs(tmp_path)
    assert {name: len(found) for name, found in photographs.items()} == {"train": 4, "dev": 1, "test": 1}
    images = dinov2.crops(photographs["test"], 2, seed=0)
    assert images.shape == (2, 3, dinov2.SIZE, dinov2.SIZE)
    assert images.equal(dinov2.crops(photographs["test"], 2, seed=0))
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, patch_size=56, image_size=224)
    model = dinov2.Saliency(Dinov2Model(config)).eval()
    maps = dinov2.maps(model, images)
    assert dinov2.agreement(model, images, maps) == pytest.approx(100, abs=1e-3)
    other = dinov2.Saliency(Dinov2Model(config)).eval()
    assert dinov2.agreement(other, images, maps) < 90
    dinov2.loss(model, (images, maps)).backward()
    assert {group.kind for group in upop.find_groups(model, example=images)} == {"attention", "mlp"}


def test_too_few_photographs_are_refused(tmp_path: Path) -> None:
    from real import dinov2

    with pytest.raises(SystemExit, match="0 images; six at least"):
        dinov2.photographs(tmp_path)
