"""README's few lines run as they stand, with the real libraries."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForImageClassification, TrainingArguments

import upop
from documents import README, blocks


def block(word: str) -> str:
    found = [text for text in blocks(README, "python") if word in text]
    assert len(found) == 1, f"README has {len(found)} blocks with {word}"
    return found[0]


def test_a_loop_of_ones_own(classifier: Any, image_set: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    loader = [*DataLoader(image_set, batch_size=4)] * 4
    names = {
        "model": classifier,
        "dense_model": copy.deepcopy(classifier),
        "optimizer": (optimizer := torch.optim.AdamW(classifier.parameters(), 1e-3)),
        "scheduler": torch.optim.lr_scheduler.ConstantLR(optimizer),
        "criterion": lambda model, batch: model(**batch).loss,
        "loader": loader,
        "total_steps": len(loader),
        "example_inputs": loader[0],
    }
    dense = upop.count_parameters(classifier)
    exec(block("scheduler.step()"), names)
    assert names["model"] is classifier
    small = names["plan"], names["model"].state_dict()
    exec(block("upop.load_into("), names)
    assert upop.count_parameters(names["model"]) < 0.7 * dense
    assert all(torch.equal(value, small[1][name]) for name, value in names["model"].state_dict().items())


def test_the_loop_that_the_page_begins_with(classifier: Any, image_set: Any) -> None:
    dense = upop.count_parameters(classifier)
    names = {
        "upop": upop,
        "model": classifier,
        "optimizer": torch.optim.AdamW(classifier.parameters(), 1e-3),
        "criterion": lambda model, batch: model(**batch).loss,
        "loader": [*DataLoader(image_set, batch_size=4)] * 4,
    }
    exec(block("steps=len(loader)"), names)
    assert upop.count_parameters(classifier) < 0.7 * dense


def test_trainer(classifier: Any, image_set: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    dense = upop.count_parameters(classifier)
    args = TrainingArguments("run", max_steps=4, report_to="none", save_strategy="no", use_cpu=True, disable_tqdm=True)
    names = {"upop": upop, "model": classifier, "args": args, "data": image_set}
    exec(block("TrainerCallback"), names)
    assert upop.count_parameters(classifier) < 0.7 * dense
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    assert upop.count_parameters(again) == upop.count_parameters(classifier)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_lightning(classifier: Any, image_set: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lightning", reason="the extra `integrations` is not installed")
    from integrations.test_lightning import Module

    monkeypatch.chdir(tmp_path)
    dense = upop.count_parameters(classifier)
    names = {"upop": upop, "module": Module(classifier), "loader": DataLoader(image_set, batch_size=8)}
    exec(block("LightningCallback"), names)
    assert upop.count_parameters(classifier) < 0.7 * dense


def test_accelerate(classifier: Any, image_set: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    dense = upop.count_parameters(classifier)
    names = {
        "upop": upop,
        "model": classifier,
        "optimizer": torch.optim.AdamW(classifier.parameters()),
        "loader": DataLoader(image_set, batch_size=4),
        "total_steps": 3,
    }
    exec(block("Accelerator"), names)
    assert upop.count_parameters(names["model"]) < 0.7 * dense
