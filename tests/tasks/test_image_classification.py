"""Image classifiers of transformers: from a model with other classes, or none, to a compressed one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import tiny_dual
import upop
from tiers import mostly_slow
from upop.errors import CheckpointError, DataError
from upop.runs.verbs import compress, evaluate_checkpoint, train
from upop.settings import read_settings
from upop.tasks import find_task

TASK = find_task("image-classification")
_TINY = tiny_dual.IMAGES
_SWIN = {"image_size": 16, "patch_size": 2, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4}
_CONVNEXT = {"hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2, "patch_size": 2}

CONFIGS: dict[str, Callable[[], Any]] = {
    "vit": lambda: transformers.ViTConfig(**_TINY),
    "deit": lambda: transformers.DeiTConfig(**_TINY),
    "dinov2": lambda: transformers.Dinov2Config(**_TINY),
    "beit": lambda: transformers.BeitConfig(**_TINY),
    "swin": lambda: transformers.SwinConfig(**_SWIN),
    "convnext": lambda: transformers.ConvNextConfig(**_CONVNEXT),
}


def settings_of(**given: Any) -> Any:
    usual = {"device": "cpu", "num_workers": 0, "batch_size_train": 8, "init_lr": 2e-3, "log_every": 1, "examples": 2}
    return read_settings(TASK.settings, None, {**usual, **given})


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_dual.write_classes(tmp_path_factory.mktemp("data"))


def save_base(kind: str, folder: Path) -> Path:
    """Save a model without a head, and its processor."""
    tiny_dual.randomise(transformers.AutoModel.from_config(CONFIGS[kind]())).save_pretrained(folder)
    tiny_dual.image_processor("vit").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", mostly_slow(CONFIGS, "vit"))
def test_a_model_without_a_head_is_trained_and_compressed(kind: str, data: Path, tmp_path: Path) -> None:
    base = save_base(kind, tmp_path / "base")
    shared = {"data": str(data), "hold_out": 0.25}
    trained = train(TASK, settings_of(**shared, pretrained=str(base), epochs=1, output_dir=tmp_path / "dense"))
    assert trained is not None
    dense = tmp_path / "dense" / "best"
    names = json.loads((dense / "config.json").read_text())["id2label"]
    assert names == {"0": "blue", "1": "green", "2": "red", "3": "yellow"}
    results = compress(
        TASK, settings_of(**shared, pretrained=str(dense), epochs=2, output_dir=tmp_path / "2x", ratio=0.5)
    )
    assert results is not None
    before, after = results.models
    assert after.parameters < before.parameters
    best = tmp_path / "2x" / "best"
    model = upop.load(best)
    plain = transformers.AutoModelForImageClassification.from_pretrained(best).eval()  # upop is imported
    images = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(model(pixel_values=images).logits, plain(pixel_values=images).logits)
    found = evaluate_checkpoint(TASK, settings_of(test_data=str(data), pretrained=str(best), output_dir=tmp_path / "e"))
    assert found is not None
    assert set(found.models[0].metrics["test"]) == {"acc@1", "loss"}


def test_of_epochs_as_good_as_each_other_the_one_with_the_lowest_loss_is_the_best(data: Path, tmp_path: Path) -> None:
    base, out = save_base("vit", tmp_path / "base"), tmp_path / "out"
    # One row is held out, so that all epochs have an accuracy of 0 or of 100.
    given = {"data": str(data), "hold_out": 0.04, "pretrained": str(base), "epochs": 5, "output_dir": out}
    results = train(TASK, settings_of(**given, init_lr=1e-3, seed=1))
    assert results is not None
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    scores = [(row["acc@1"], row["loss"]) for row in rows if row.get("split") == "val"]
    best = max(scores, key=lambda each: (each[0], -each[1]))
    assert [accuracy for accuracy, _ in scores].index(best[0]) != scores.index(best)  # an earlier epoch was as good
    assert results.models[0].metrics["val"]["loss"] == pytest.approx(best[1])


def test_classes_are_the_models_own_by_their_names(data: Path, tmp_path: Path) -> None:
    """The model's yellow is its number 0, the data's number 3."""
    names = ["yellow", "red", "violet", "green", "blue"]
    config = transformers.ViTConfig(
        **_TINY, id2label=dict(enumerate(names)), label2id={n: i for i, n in enumerate(names)}
    )
    model = tiny_dual.randomise(transformers.ViTForImageClassification(config))
    with torch.no_grad():
        model.classifier.weight.zero_()
        model.classifier.bias.copy_(torch.tensor([5.0, 0, 0, 0, 0]))  # all is yellow
    model.save_pretrained(tmp_path / "vit")
    tiny_dual.image_processor("vit").save_pretrained(tmp_path / "vit")
    found = evaluate_checkpoint(
        TASK, settings_of(test_data=str(data), pretrained=str(tmp_path / "vit"), output_dir=tmp_path / "e")
    )
    assert found is not None
    scores = found.models[0].metrics["test"]
    assert (scores["acc@1"], scores["acc@5"]) == (pytest.approx(25.0), pytest.approx(100.0))
    (data.parent / "other" / "pink").mkdir(parents=True, exist_ok=True)
    (data.parent / "other" / "pink" / "0.png").write_bytes((data / "red" / "0.png").read_bytes())
    (data.parent / "other" / "red").mkdir(exist_ok=True)
    (data.parent / "other" / "red" / "0.png").write_bytes((data / "red" / "0.png").read_bytes())
    with pytest.raises((CheckpointError, DataError), match="pink"):
        evaluate_checkpoint(
            TASK,
            settings_of(
                test_data=str(data.parent / "other"), pretrained=str(tmp_path / "vit"), output_dir=tmp_path / "f"
            ),
        )
