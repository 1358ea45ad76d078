"""A target in milliseconds: foretold from a table, and ranked by what a millisecond is worth. Nothing here is timed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import upop
from pruning.families import FAMILIES, loss_of
from upop.errors import SettingError
from upop.profiling import profile_model, read_profile, write_profile
from upop.pruning.latency import Latency, Layers, Profile

VIT = next(family for family in FAMILIES if family.name == "vit-fused")


def made_up(model: nn.Module, dense: float = 10.0) -> Profile:
    """A machine on which attention takes nothing that could be saved, and neurons go in steps of 16."""
    groups = upop.find_groups(model)
    attention, mlp = ([group for group in groups if group.kind == kind] for kind in ("attention", "mlp"))
    size = mlp[0].size
    layers = (
        Layers(tuple(group.name for group in attention), attention[0].size, (1, attention[0].size), (0.0, 0.0)),
        Layers(tuple(group.name for group in mlp), size, (1, 16, 17, 32, 33, size), (4.0, 4.0, 2.0, 2.0, 0.0, 0.0)),
    )
    return Profile(dense, layers, {"model": "made up"})


def test_what_lies_between_measured_sizes_lies_on_a_line() -> None:
    layers = Layers(("mlp",), 48, (1, 16, 48), (4.0, 3.0, 0.0))
    assert [layers.at(kept) for kept in (1, 16, 32, 48)] == [4.0, 3.0, 1.5, 0.0]


def searched(model: nn.Module, **settings: Any) -> upop.Plan:
    inputs = VIT.inputs(2)
    pruner = upop.Pruner(model, steps=4, example=inputs, **settings)
    for _ in range(4):
        model.zero_grad()
        loss_of(model(**inputs)).backward()
        pruner.step()
    plan = pruner.plan()
    pruner.shrink()
    return plan


def test_a_search_takes_what_saves_time_and_no_more_than_it_takes() -> None:
    model = VIT.build()
    profile = made_up(model)
    plan = searched(model, target={"latency": "6ms"}, profile=profile)
    sizes = {group.name: group.size for group in upop.find_groups(model)}
    attention = [name for name in sizes if name.endswith("attn")]
    # nothing is saved by attention, so all of it stays; the neurons end on the steps of the machine
    assert {sizes[name] for name in attention} == {8}
    assert sorted(size for name, size in sizes.items() if name not in attention) in ([16, 48], [32, 32])
    assert plan.settings["reached"]["latency"] == {"of": "milliseconds", "dense": 10.0, "left": 6.0, "asked": "6ms"}


def test_other_limits_hold_beside_it() -> None:
    model = VIT.build()
    dense = upop.count_parameters(model)
    plan = searched(model, target={"latency": 0.8, "params": 0.7}, profile=made_up(model))
    assert upop.count_parameters(model) <= 0.7 * dense
    assert plan.settings["reached"]["latency"]["left"] <= 8


@pytest.mark.parametrize(
    ("target", "said"),
    [("latency=0.01", r"the model still has 2 of 10\. Ask for latency=0\.2 "), ("latency=20ms", "removes nothing")],
)
def test_times_that_cannot_be_meant_are_refused(target: str, said: str) -> None:
    model = VIT.build()
    with pytest.raises(SettingError, match=said):
        upop.Pruner(model, steps=1, target=target, profile=made_up(model))


def test_a_profile_is_needed_and_it_is_of_the_model() -> None:
    with pytest.raises(SettingError, match="needs a profile"):
        upop.Pruner(VIT.build(), steps=1, target={"latency": 0.5})
    other = Profile(1.0, (Layers(("elsewhere",), 4, (1, 4), (1.0, 0.0)),), {"model": "Other"})
    with pytest.raises(SettingError, match=r"of another model \(Other\)"):
        upop.Pruner(VIT.build(), steps=1, target={"latency": 0.5}, profile=other)


def test_a_profile_is_measured_kept_and_read_again(tmp_path: Path) -> None:
    model, inputs = VIT.build(torch.float32), VIT.inputs(1, torch.float32)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    said: list[str] = []
    found = profile_model(model, inputs, points=2, repeats=1, notify=said.append)
    assert [(len(each.groups), each.size, each.sizes) for each in found.layers] == [
        (2, 8, (0, 1, 4, 8)),
        (2, 48, (0, 1, 24, 48)),
    ]
    assert found.dense > 0
    assert len(said) == 2
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    write_profile(found, tmp_path / "profile.json")
    assert read_profile(tmp_path / "profile.json") == found
    whole = {group.name: group.size for group in upop.find_groups(model)}
    latency = Latency(found, upop.find_groups(model))
    assert latency.at(whole) == latency.whole == found.dense
    assert latency.at(dict.fromkeys(whole, 1)) <= latency.at(dict.fromkeys(whole, 4)) <= found.dense


def test_noise_makes_no_saving_larger_than_it_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Savings that rise with the size, which only noise does, become their mean: the largest would promise too much."""
    took = iter([{"dense": 10.0, "cut": cut} for cut in (4.0, 6.0, 5.0, 7.0, 9.5, 9.5)])
    monkeypatch.setattr("upop.profiling.measure_latency", lambda *_args, **_kwargs: next(took))
    found = profile_model(VIT.build(torch.float32), VIT.inputs(1, torch.float32), points=2, repeats=1)
    assert [each.saved for each in found.layers] == [(3.0, 2.25, 2.25, 0.0), (1.5, 0.25, 0.25, 0.0)]


@pytest.mark.slow
@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_a_profile_is_of_a_runtime(runtime: str) -> None:
    model = VIT.build(torch.float32)
    found = profile_model(model, VIT.inputs(1, torch.float32), points=1, repeats=1, runtime=runtime)
    assert found.about["runtime"] == runtime
    assert [each.sizes for each in found.layers] == [(0, 1, 8), (0, 1, 48)]


def test_a_runtime_that_is_not_known_is_refused() -> None:
    with pytest.raises(SettingError, match="Use one of 'eager', 'compile', 'onnxruntime', 'openvino'"):
        profile_model(VIT.build(), VIT.inputs(1), runtime="tensorrt")


@pytest.mark.parametrize(
    "change",
    [
        {"version": 3},
        {"dense_ms": 0},
        {"layers": [{"groups": ["a"], "size": 4, "sizes": [4, 1], "saved_ms": [1, 0]}]},
        {"layers": [{"groups": ["a"], "size": 4, "sizes": [1, 4], "saved_ms": [-1, 0]}]},
        {"layers": [{"groups": ["a"], "size": 4, "sizes": [1, 4], "saved_ms": ["x", 0]}]},
        {"layers": 3},
    ],
)
def test_damaged_profiles_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    path = tmp_path / "profile.json"
    path.write_text(json.dumps({**made_up(VIT.build()).to_json(), **change}))
    with pytest.raises(SettingError, match="not a profile of `upop profile`"):
        read_profile(path)
