"""Files of version 1, whose keys were `units`, `entries` and `entry`, are read; what is written has today's keys.

`data/version_1` was written by the last commit with those keys (d5154c5): folders of `upop.save`, a plan of the
transformer of timm, and a profile of it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

import upop
from upop.checkpoints.saving.card import Story, write_card
from upop.errors import CheckpointError, PlanError, SettingError
from upop.profiling import read_profile, write_profile
from upop.report.run import read_run

FOLDERS = Path(__file__).parent / "data" / "version_1"
OLD_KEYS = {"units", "entries", "entry"}


def timm_vit() -> nn.Module:
    sizes = {"depth": 2, "img_size": 8, "patch_size": 4, "embed_dim": 16, "num_heads": 2, "num_classes": 3}
    model: nn.Module = timm.create_model("vit_tiny_patch16_224", **sizes).eval()
    return model


def keys(value: Any) -> set[str]:
    """Return all keys of nested JSON."""
    if isinstance(value, list):
        return {key for each in value for key in keys(each)}
    return set(value) | {key for each in value.values() for key in keys(each)} if isinstance(value, dict) else set()


def content(path: Path) -> Any:
    return json.loads(path.read_text())


def assert_same(model: nn.Module, name: str) -> None:
    held: dict[str, Tensor] = load_file(FOLDERS / f"{name}.safetensors")
    expected = held.pop("out")
    with torch.no_grad():
        found = model(**{key.removeprefix("in."): value for key, value in held.items()})
    torch.testing.assert_close(getattr(found, "logits", found), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "timm_vit"])
def test_a_folder_loads_and_is_written_with_the_keys_of_today(name: str, tmp_path: Path) -> None:
    assert keys(content(FOLDERS / name / "upop.json")) >= OLD_KEYS
    model = upop.load(FOLDERS / name)
    assert_same(model, name)
    again = upop.save(model, tmp_path / name)
    written = content(again / "upop.json")
    assert written["format"] == written["plan"]["version"] == 2
    assert not OLD_KEYS & keys(written)
    assert set(written["groups"]) == set(written["layout"]) == set(written["plan"]["groups"])
    assert_same(upop.load(again), name)


def test_transformers_reads_the_record_and_writes_it_anew(tmp_path: Path) -> None:
    assert OLD_KEYS & keys(content(FOLDERS / "llama" / "config.json")["quantization_config"]) == {"entry"}
    model = transformers.LlamaForCausalLM.from_pretrained(FOLDERS / "llama").eval()
    assert_same(model, "llama")
    model.save_pretrained(tmp_path)
    record = content(tmp_path / "config.json")["quantization_config"]
    assert record["format"] == 2 and not OLD_KEYS & keys(record)
    assert_same(transformers.LlamaForCausalLM.from_pretrained(tmp_path).eval(), "llama")


def test_a_folder_is_loaded_into_a_dense_model() -> None:
    assert_same(upop.load_into(timm_vit(), FOLDERS / "timm_vit"), "timm_vit")


def test_a_plan_cuts() -> None:
    text = (FOLDERS / "plan.json").read_text()
    plan = upop.Plan.from_json(text)
    assert dict(plan) == {name: tuple(group["kept"]) for name, group in json.loads(text)["units"].items()}
    model = upop.shrink(timm_vit(), plan)
    assert [group.size for group in upop.find_groups(model)] == [len(kept) for kept in plan.values()]
    written = json.loads(plan.to_json())
    assert written["version"] == 2 and not OLD_KEYS & keys(written)


def test_a_compression_resumes_after_its_cut() -> None:
    state = {"steps_done": 3, "plan": (FOLDERS / "plan.json").read_text(), "pruner": None}
    model = timm_vit()
    example = torch.randn(1, 3, 8, 8)
    compression = upop.Compression(model, ratio=0.5, steps=5, example=example, teacher=False, resume=state)
    assert compression.plan() == upop.Plan.from_json(state["plan"])
    assert model.blocks[0].mlp.fc1.out_features == len(compression.plan()["blocks.0.mlp"])
    compression.close()


def test_a_profile_is_read(tmp_path: Path) -> None:
    profile = read_profile(FOLDERS / "profile.json")
    assert profile.layers[0].groups == ("blocks.0.attn", "blocks.1.attn")
    write_profile(profile, tmp_path / "profile.json")
    written = content(tmp_path / "profile.json")
    assert written["version"] == 2 and not OLD_KEYS & keys(written)
    assert read_profile(tmp_path / "profile.json") == profile


def test_cards_and_pages_of_older_folders(tmp_path: Path) -> None:
    shutil.copytree(FOLDERS / "timm_vit", tmp_path / "best")
    (tmp_path / "settings.yaml").write_text("ratio: 0.5\n")
    (tmp_path / "versions.json").write_text(json.dumps({"task": "deit", "verb": "compress"}))
    shares = {share.name: (share.kept, share.size) for share in read_run(tmp_path).shares}
    layout = content(tmp_path / "best" / "upop.json")["layout"]
    assert shares == {name: (group["entries"], group["of"]) for name, group in layout.items()}
    write_card(tmp_path / "best", Story("UPop 2x", "deit", None, None, {}, (), (), (), "", ""))
    kept, size = (sum(numbers) for numbers in zip(*shares.values(), strict=True))
    assert f"{100 * kept / size:.1f} %" in (tmp_path / "best" / "README.md").read_text()


def later(path: Path, key: str, *within: str) -> None:
    """Raise the version in a file."""
    whole = held = content(path)
    for name in within:
        held = held[name]
    held[key] = 3
    path.write_text(json.dumps(whole))


@pytest.mark.parametrize("places", [("upop.json", "format"), ("upop.json", "version", "plan")])
def test_a_folder_of_a_later_version_is_refused(places: tuple[str, ...], tmp_path: Path) -> None:
    shutil.copytree(FOLDERS / "timm_vit", tmp_path / "model")
    later(tmp_path / "model" / places[0], *places[1:])
    for load in (upop.load, lambda folder: upop.load_into(timm_vit(), folder)):
        with pytest.raises(CheckpointError, match=r"3\b.*Update upop"):
            load(tmp_path / "model")


@pytest.mark.parametrize(
    ("name", "places", "read", "error"),
    [
        ("plan.json", ("version",), lambda path: upop.Plan.from_json(path.read_text()), PlanError),
        ("profile.json", ("version",), read_profile, SettingError),
        (
            "llama/config.json",
            ("format", "quantization_config"),
            lambda path: transformers.LlamaForCausalLM.from_pretrained(path.parent),
            CheckpointError,
        ),
    ],
)
def test_other_files_of_a_later_version_are_refused(
    name: str, places: tuple[str, ...], read: Callable[[Path], Any], error: type[Exception], tmp_path: Path
) -> None:
    shutil.copytree(FOLDERS, tmp_path / "files")
    later(tmp_path / "files" / name, *places)
    with pytest.raises(error, match=r"\b3\b"):
        read(tmp_path / "files" / name)
