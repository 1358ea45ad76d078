"""CoOp's files: towers and prompts in one, without words; read, evaluated, and trained by their prompts alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from upop.checkpoints.coop import accuracy, load_coop
from upop.checkpoints.names.clip import to_openai
from upop.errors import CheckpointError
from upop.models.coop import CoOp, CoOpLosses
from upop.models.crossget import CrossGetConfig

VISION = {
    "image_size": 32,
    "patch_size": 8,
    "vision_width": 32,
    "vision_depth": 3,
    "vision_heads": 4,
    "vision_mlp": 128,
}
TEXT = {"text_width": 24, "text_depth": 3, "text_heads": 2, "text_mlp": 96, "max_positions": 16}
SIZES = {**VISION, **TEXT, "embed_dim": 16}
HEADS = {"vision_heads": 4, "text_heads": 2}


def tiny(**given: Any) -> CoOp:
    """Four classes whose names have one, two, one and three words, with two learned vectors before them."""
    torch.manual_seed(0)
    words, last = torch.randn(60, 24), 59
    rows = torch.zeros(4, 16, dtype=torch.long)
    for row, count in enumerate((1, 2, 1, 3)):
        rows[row, : 4 + count] = torch.tensor([58, 5, 5, *range(7 + row, 7 + row + count), last])
    config = CrossGetConfig(**{**SIZES, "rl": 0, **given})
    return CoOp(config, words[rows[:, :1]], words[rows[:, 3:]], rows.argmax(1), torch.randn(2, 24)).eval()


def written(model: CoOp, path: Path) -> Path:
    """A file as Dassl writes it."""
    towers = {
        (name.replace("visual.", "image_encoder.", 1) if name.startswith("visual.") else f"text_encoder.{name}"): value
        for name, value in to_openai(model.clip.state_dict()).items()
        if name != "logit_scale"
    }
    prompt = {"ctx": model.context, "token_prefix": model.prefix, "token_suffix": model.suffix}
    state = {**{f"prompt_learner.{name}": value for name, value in prompt.items()}, **towers}
    state["logit_scale"] = model.clip.logit_scale
    torch.save({"state_dict": state, "epoch": 200, "val_result": 0.5}, path)
    return path


def images(count: int = 6) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(count, 3, 32, 32)


def test_a_file_is_read_whole_and_evaluated(tmp_path: Path) -> None:
    model = tiny(rv=4)
    found = load_coop(written(model, tmp_path / "model.pth.tar-200"), rv=4, **HEADS)
    assert torch.equal(found.ends, model.ends)
    with torch.no_grad():
        logits = model(images())
        torch.testing.assert_close(found(images()), logits)
    labels = logits.argmax(1)
    labels[:2] = (labels[:2] + 1) % 4
    batches = DataLoader(TensorDataset(images(), labels), batch_size=4)
    assert accuracy(found, batches) == pytest.approx(100 * 4 / 6)


def test_files_without_what_is_asked_for_are_refused(tmp_path: Path) -> None:
    path = written(tiny(cross=False, rv=0), tmp_path / "plain.pth.tar-50")
    assert load_coop(path, **HEADS)(images()).shape == (6, 4)
    with pytest.raises(CheckpointError, match=r"no cross tokens.*rv=0"):
        load_coop(path, rv=4)
    torch.save({"state_dict": {"prompt_learner.ctx": torch.zeros(2, 24)}}, tmp_path / "prompts.pth")
    with pytest.raises(CheckpointError, match="token_prefix"):
        load_coop(tmp_path / "prompts.pth")


def test_prompts_and_cross_tokens_are_all_that_is_trained() -> None:
    model = tiny(rv=4).train()
    for name, each in model.named_parameters():
        each.requires_grad_(name in model.trained)
    optimizer = torch.optim.SGD(model.trained.values(), lr=0.05)
    labels = torch.tensor([0, 1, 2, 3, 0, 1])
    totals = []
    for _ in range(12):
        losses = model(images(), labels)
        assert isinstance(losses, CoOpLosses)
        optimizer.zero_grad()
        losses.total().backward()
        optimizer.step()
        totals.append(float(losses.total().detach()))
    assert totals[-1] < totals[0]
    assert set(model.trained) == {
        "context",
        "clip.vision_model.encoder.cross_image",
        "clip.text_model.encoder.cross_text",
    }
