"""Gradient checkpointing: every model keeps its losses, gradients, scores and masks, and less in memory."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import runs
import upop
from tiers import mostly_slow
from upop.errors import SettingError
from upop.models.checkpointing import checkpoint_blocks
from upop.runs.loaders import first_samples, make_loader
from upop.runs.memory import saved_bytes
from upop.runs.task import Task
from upop.runs.verbs import compress
from upop.settings import RunSettings, read_settings
from upop.tasks import find_task


class Trained:
    """A task with its tiny dense model in float64, and a batch of real samples."""

    def __init__(self, name: str, folder: Path) -> None:
        self.task: Task[Any] = find_task(name)
        model = dict(runs.TINY[name]["model"])
        if "dropout" in model:
            model["dropout"] = 0.1  # which must be drawn alike in both passes
        config = runs.make_task(name, folder, model=model, batch_size_train=6)
        self.settings: RunSettings = read_settings(self.task.settings, config, {})
        self.model = self.task.load(Path(str(self.settings.pretrained)), self.settings).double().train()
        batch = first_samples(make_loader(self.task, self.settings, "train"), 6)
        self.batch = {name: _double(value) for name, value in batch.items()}

    def step(self, model: nn.Module) -> Tensor:
        torch.manual_seed(5)
        loss = self.task.loss(model, self.batch, self.settings, 0.5)
        loss.backward()
        return loss.detach()


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


@pytest.fixture(scope="module", params=mostly_slow(sorted(runs.TINY), "classification"))
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    torch.set_num_threads(1)
    return Trained(request.param, tmp_path_factory.mktemp(request.param))


def gradients(model: nn.Module) -> Mapping[str, Tensor]:
    return {name: each.grad for name, each in model.named_parameters() if each.grad is not None}


def same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert set(found) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-9, msg=name)


def test_loss_and_gradients_stay_the_same(trained: Trained) -> None:
    plain, checkpointed = copy.deepcopy(trained.model), copy.deepcopy(trained.model)
    checkpoint_blocks(checkpointed)
    torch.testing.assert_close(trained.step(checkpointed), trained.step(plain), rtol=1e-9, atol=0)
    same(gradients(checkpointed), gradients(plain))
    assert any(value.abs().max() > 0 for value in gradients(plain).values())


def test_groups_scores_and_masks_stay_the_same(trained: Trained) -> None:
    found: list[tuple[Mapping[str, Tensor], Mapping[str, Any], nn.Module]] = []
    for checkpointed in (False, True):
        model = copy.deepcopy(trained.model)
        if checkpointed:
            checkpoint_blocks(model)
        pruner = upop.Pruner(model, ratio=0.5, steps=3, interval=1)
        for _ in range(3):
            trained.step(model)
            pruner.step()
            same_gradients = gradients(model)
            for parameter in model.parameters():
                parameter.grad = None
        scores, plan = {name: score.clone() for name, score in pruner.scores.items()}, pruner.plan()
        found.append((scores, {name: list(kept) for name, kept in plan.items()}, model))
        assert same_gradients
        pruner.shrink()
    same(found[1][0], found[0][0])
    assert found[1][1] == found[0][1]
    # The cut model still computes its activations again, and gives the same gradients.
    torch.testing.assert_close(trained.step(found[1][2]), trained.step(found[0][2]), rtol=1e-9, atol=0)
    same(gradients(found[1][2]), gradients(found[0][2]))


def test_less_is_kept_for_the_backward_pass(trained: Trained) -> None:
    plain, checkpointed = copy.deepcopy(trained.model), copy.deepcopy(trained.model)
    checkpoint_blocks(checkpointed)

    def kept(model: nn.Module) -> int:
        return saved_bytes(lambda: trained.task.loss(model, trained.batch, trained.settings, 0.5), model)

    assert kept(checkpointed) < 0.75 * kept(plain)


def test_it_can_be_asked_for_twice_and_saved(trained: Trained, tmp_path: Path) -> None:
    model = copy.deepcopy(trained.model).float()
    for _ in range(2):
        checkpoint_blocks(model)
    upop.save(model, tmp_path)
    again = upop.load(tmp_path)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in again.state_dict().items())


def test_other_architectures_of_timm_do_it_their_way() -> None:
    model = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=56, num_classes=3, embed_dim=12, num_heads=(1,) * 4
    )
    checkpoint_blocks(model.train())
    assert all(layer.grad_checkpointing for layer in model.layers)
    model(torch.rand(1, 3, 56, 56)).sum().backward()


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(SettingError, match=r"Sequential.*checkpointing"):
        checkpoint_blocks(nn.Sequential(nn.Linear(2, 2)))


@pytest.mark.slow
def test_it_goes_together_with_bf16_and_accumulation(tmp_path: Path) -> None:
    config = runs.make_task("nlvr", tmp_path, accumulate=2, batch_size_train=8, log_every=1, examples=0)
    task, losses = find_task("nlvr"), []
    for grad_checkpointing in (False, True):
        run = tmp_path / str(grad_checkpointing)
        given = {"amp": True, "grad_checkpointing": grad_checkpointing, "output_dir": run}
        assert compress(task, read_settings(task.settings, config, given)) is not None
        losses.append([row["loss"] for row in runs.rows(run) if "loss" in row])
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)
    assert len(losses[0]) == 8
