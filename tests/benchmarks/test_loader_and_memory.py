"""The benchmarks of loading and of memory run, at a small size, and what they write can be read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import runs
from upop.models.classifier import ClassifierConfig, build_classifier

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def test_loading(tmp_path: Path) -> None:
    import loader

    loader.main(["--images", "2", "--turns", "1", "--width", "96", "--height", "80", "--out", str(tmp_path)])
    [file] = tmp_path.glob("loader_*.json")
    found = json.loads(file.read_text())
    assert {"BLIP 384, training", "CLIP 336, training", "DeiT 224, training"} <= set(found["ways"])
    assert all(way["times_plain"] > 0 for way in found["ways"].values())
    differences = [way["largest_difference"] for name, way in found["ways"].items() if name.endswith("evaluation")]
    assert len(differences) == 2
    assert max(differences) < 1e-5  # evaluation sees the very same images
    assert found["machine"]["threads"] == 1


@pytest.mark.slow
def test_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import memory

    def build() -> torch.nn.Module:
        sizes: dict[str, Any] = {**runs.VIT, "architecture": "vit_tiny_patch16_224", "vision_depth": 6}
        return build_classifier(ClassifierConfig(image_size=64, classes=5, **sizes))

    monkeypatch.setattr(memory, "CASES", {"tiny": memory.Case("classification", build, 64, 32, 2)})
    for flags in ([], ["--check"]):
        memory.main(["--models", "tiny", "--out", str(tmp_path), *flags])
    model = json.loads((tmp_path / "memory.json").read_text())["models"]["tiny"]
    weights = sum(parameter.nbytes for parameter in build().parameters())
    expected = {"parameters": weights, "gradients": weights, "optimizer": 2 * weights, "average": weights}
    assert {name: model["fixed"][name] for name in expected} == expected
    per_sample = {way: found["per_record"] for way, found in model["traced"].items()}
    assert per_sample["float32"] > 2 * per_sample["float32, checkpointed"]
    assert per_sample["float32"] > 1.3 * per_sample["bfloat16"]
    fits = model["traced"]["float32"]["batch_that_fits"]
    assert fits["24"] < fits["40"] < fits["80"]
    for found in model["checked"].values():  # real tensors take what fake ones do
        assert found["real"] == pytest.approx(found["traced"], rel=1e-3)
    assert (tmp_path / "memory.md").read_text().count("| tiny |") == 4
