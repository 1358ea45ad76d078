"""`--target`: what is left of the whole model, from a flag or a file, in every output of a run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from upop.errors import SettingError
from upop.settings import read_settings
from upop.tasks.nlvr import NlvrSettings


def written(folder: Path, text: str) -> Path:
    path = folder / "settings.yaml"
    path.write_text(text)
    return path


def test_a_flag_beats_the_other_budget_of_a_file(tmp_path: Path) -> None:
    with_ratio = written(tmp_path, "ratio: 0.7\n")
    settings = read_settings(NlvrSettings, with_ratio, {"target": "params=0.5"})
    assert settings.budget == {"target": "params=0.5"}
    again = written(tmp_path, settings.to_yaml())
    assert read_settings(NlvrSettings, again, {}) == settings
    assert read_settings(NlvrSettings, again, {"ratio": 0.25}).budget == {"ratio": 0.25}
    mapping = written(tmp_path, "target: {macs: 2x, params: 12000000}\n")
    assert read_settings(NlvrSettings, mapping, {}).budget == {"target": "params=12000000,macs=2x"}


@pytest.mark.parametrize(
    ("text", "given", "said"),
    [
        ("", {"ratio": 0.4, "target": "params=0.5"}, r"ratio \(0.4\) and target \(params=0.5\) are both given"),
        ("ratio: 0.4\ntarget: params=0.5\n", {}, "both given"),
        ("target: parms=0.5\n", {}, "did you mean 'params'"),
        ("target: params=0.5\nmethod: reference\ncost: reference\n", {}, "takes a ratio"),
    ],
)
def test_budgets_that_cannot_be_meant_are_refused(tmp_path: Path, text: str, given: dict, said: str) -> None:
    with pytest.raises(SettingError, match=said):
        read_settings(NlvrSettings, written(tmp_path, text or "seed: 1\n"), given)


def test_inspect_previews_a_target(upop_command: Callable[..., tuple[int, str]]) -> None:
    sizes = ["--set", "depth=2", "--set", "img_size=32"]
    code, text = upop_command("inspect", "vit_tiny_patch16_224", *sizes, "--target", "params=0.75", "--json")
    assert code == 0, text
    found = json.loads(text)
    assert 0.74 < found["after"]["parameters"] / found["parameters"] <= 0.75
    code, text = upop_command("inspect", "vit_tiny_patch16_224", *sizes, "--target", "params=0.01")
    assert code != 0
    assert "Ask for params=0." in text
    code, text = upop_command("inspect", "vit_tiny_patch16_224", *sizes, "--target", "macs=2x", "--ratio", "0.5")
    assert code != 0
    assert "Give either ratio=" in text


def test_a_profile_is_measured_from_the_command_line(
    upop_command: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    sizes = ["--set", "depth=1", "--set", "img_size=32", "--set", "embed_dim=24", "--set", "num_heads=3"]
    out = tmp_path / "profile.json"
    few = ["--points", 1, "--repeats", 1, "--batch", 2, "--device", "cpu", "--out", out]
    code, text = upop_command("profile", "vit_tiny_patch16_224", *sizes, *few)
    assert code == 0, text
    assert "1 x mlp of 96" in text
    found = read_settings(NlvrSettings, written(tmp_path, f"target: latency=0.5\nprofile: {out}\n"), {})
    assert [each.size for each in found.budget["profile"].layers] == [8, 96]
    code, text = upop_command("profile", "vit_tiny_patch16_224", *sizes, *few, "--runtime", "onyx")
    assert code != 0
    assert "'onyx' is not known" in text
