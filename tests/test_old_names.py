"""Names of before the renaming: those of Python work for one release with a warning, those in files without one."""

from __future__ import annotations

import copy
import importlib
import pickle
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import upop
import upop.pruning
from upop.cli.app import app
from upop.deprecated import MOVED
from upop.errors import BadImageError, SettingError
from upop.examples import Examples
from upop.pruning.deprecated import NAMES
from upop.runs.bad_images import BadImages
from upop.settings import RunSettings, current_names, read_settings


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide, self.back = nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.back(torch.relu(self.wide(x)))


EXAMPLE = torch.randn(4, 8)


def renamed(call: Callable[[], Any], new: str) -> Any:
    with pytest.warns(DeprecationWarning, match=rf"now called {new}"):
        return call()


def test_public_names() -> None:
    for old, new in NAMES.items():
        for module in (upop, upop.pruning):
            if hasattr(module, new):  # upop itself never had all of them
                found = renamed(lambda module=module, old=old: getattr(module, old), rf"{module.__name__}\.{new}")
                assert found is getattr(module, new)
    find = renamed(lambda: upop.survey, r"upop\.find_prunable")
    found = find(Mlp(), example=EXAMPLE)
    assert renamed(lambda: found.units, "groups") == found.groups
    group = found.groups[0]
    assert renamed(lambda: group.entry, "channel") == group.channel == "neuron"
    assert renamed(lambda: group.slices[0].entries(32), "channels").tolist() == list(range(32))


def test_arguments() -> None:
    compression = renamed(
        lambda: upop.Compression(Mlp(), 0.5, 40, search=8, teacher=False, example=EXAMPLE), "search_steps"
    )
    assert compression.pruner is not None and compression.pruner.steps == 8
    renamed(lambda: upop.Compression(Mlp(), 0.5, 40, share=0.5, teacher=False, example=EXAMPLE), "search_share")
    pruner = renamed(lambda: upop.Pruner(Mlp(), 0.5, 4, align=4, example=EXAMPLE), "round_to")
    assert pruner.round_to == 4 and renamed(lambda: pruner.align, "round_to") == 4
    pruner.remove()
    pruner = renamed(lambda: upop.Pruner(Mlp(), 0.5, 4, score="squared", example=EXAMPLE), "importance")
    assert pruner.importance == "squared"
    pruner = renamed(lambda: upop.Pruner(Mlp(), 0.5, 4, cost="flops", example=EXAMPLE), "cost='macs'")
    assert pruner.cost == "macs"
    state = pruner.state_dict()
    state["settings"] |= {"cost": "flops"}
    pruner.load_state_dict(state)  # of an older version
    pruner.remove()
    plan = renamed(lambda: upop.pruning.plan_by_magnitude(Mlp(), 0.5, cost="flops", example=EXAMPLE), "cost='macs'")
    assert plan.settings["cost"] == "macs"
    with pytest.raises(TypeError, match="both are given"):
        upop.Pruner(Mlp(), 0.5, 4, align=4, round_to=8, example=EXAMPLE)


def test_arguments_of_plans_and_slices() -> None:
    group = upop.find_groups(Mlp(), example=EXAMPLE)[0]
    plan = renamed(lambda: upop.Plan.of(units=[group], kept={group.name: [1, 0]}), "groups")
    assert plan == upop.Plan.of([group], {group.name: [0, 1]})
    rows = renamed(lambda: group.slices[0].expand(entries=torch.arange(32)), "channels")
    assert rows.tolist() == list(range(32))


def test_pickles() -> None:
    """An object that an earlier version pickled has the old names of its class, its module and its fields."""
    group = upop.find_groups(Mlp(), example=EXAMPLE)[0]
    written = pickle.dumps(group, protocol=0)
    for name in (b"Group", b"channel"):
        assert name in written
    written = written.replace(b"cupop.pruning.groups\nGroup", b"cupop.pruning.groups\nUnit")
    written = written.replace(b"Vchannel\n", b"Ventry\n")
    assert renamed(lambda: pickle.loads(written), r"upop\.pruning\.groups\.Group") == group
    assert copy.deepcopy(group) == group


def test_momentum_encoders() -> None:
    class Contrast(nn.Module):
        momentum_twins = {"online": "slow"}  # noqa: RUF012 - read-only

        def __init__(self) -> None:
            super().__init__()
            self.online, self.slow = Mlp(), Mlp()

        def forward(self, x: torch.Tensor) -> Any:
            return self.online(x)

    model = Contrast()
    with pytest.warns(DeprecationWarning, match=r"now called Contrast\.momentum_encoders") as caught:
        found = upop.find_prunable(model, EXAMPLE)
    assert {each.filename for each in caught} == {__file__}
    assert [group.name for group in found.groups] == ["online"]
    upop.shrink(model, {"online": range(20)})
    assert model.online.wide.out_features == model.slow.wide.out_features == 20


def test_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[:2] == ["upop", "training"]]:
        monkeypatch.delitem(sys.modules, name)
    renamed(lambda: importlib.import_module("upop.training"), r"upop\.runs")
    folder = importlib.import_module("upop.runs.folder")
    assert renamed(lambda: importlib.import_module("upop.training.folder"), r"upop\.runs\.folder") is folder
    assert folder.__spec__ is not None and folder.__spec__.name == "upop.runs.folder"


@pytest.mark.slow
@pytest.mark.parametrize("old", MOVED)
def test_every_older_path_of_a_module(old: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, old, raising=False)
    found = renamed(lambda: importlib.import_module(old), MOVED[old].replace(".", r"\."))
    assert found is importlib.import_module(MOVED[old])


def test_errors_of_images() -> None:
    error = renamed(lambda: BadImageError("it is empty", record=3), "sample")
    assert error.sample == renamed(lambda: error.record, "sample") == 3


def test_settings_and_files() -> None:
    settings = read_settings(RunSettings, None, {"align": "attention=8,mlp=128", "score": "squared"})
    assert settings.round_to == {"attention": 8, "mlp": 128} and settings.importance == "squared"
    assert read_settings(RunSettings, None, {"epochs_search": 3}).search_epochs == 3
    assert renamed(lambda: settings.teaching, "distill_weight") == settings.distill_weight == 5
    shown = {"split": "s", "about": "a", "records": [{"pictures": ["a.png"], "answers": {}}]}
    assert Examples.model_validate(shown).samples[0].images == ("a.png",)


def test_round_to_of_settings_names_itself_once() -> None:
    with pytest.raises(SettingError, match=r"8\.5") as caught:
        read_settings(RunSettings, None, {"round_to": 8.5})
    assert str(caught.value).count("round_to") == 1


def test_flags() -> None:
    shown = [
        CliRunner().invoke(app, ["inspect", "vit_tiny_patch16_224", "--ratio", "0.5", flag, "64", "--json"])
        for flag in ("--align", "--round-to")
    ]
    assert shown[0].exit_code == 0 and shown[0].stdout == shown[1].stdout


def test_the_older_cost_in_files_and_in_runs_to_resume() -> None:
    assert current_names({"cost": "flops", "p": 0.5}) == {"cost": "macs", "ratio": 0.5}
    assert RunSettings.model_validate({"cost": "flops"}).cost == "macs"


def test_bad_images_of_earlier_runs() -> None:
    images = BadImages(1)
    images.restore([{"image": "a.png", "file": "rows.json", "record": 3, "reason": "it is empty"}])
    assert images.rows() == [{"image": "a.png", "file": "rows.json", "sample": 3, "reason": "it is empty"}]


def test_states_of_searches() -> None:
    pruner = upop.Pruner(Mlp(), 0.5, 4, round_to=4, example=EXAMPLE)
    state = pruner.state_dict()
    older = {"round_to": "align", "importance": "score"}
    state["settings"] = {older.get(name, name): value for name, value in state["settings"].items()}
    assert "align" in state["settings"]
    pruner.load_state_dict(state)
