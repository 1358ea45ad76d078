"""The callback for Lightning: one fit, the same as a loop by hand, that resumes, and clear refusals."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import upop
from tiers import mostly_slow
from upop.errors import SettingError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("lightning", reason="the extra `integrations` is not installed")
    import lightning.pytorch as pl

from upop.integrations import LightningCallback

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


class Module(pl.LightningModule):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: dict[str, Any], index: int) -> Any:
        return self.model(**batch).loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def fit(model: Any, data: Any, folder: Path, *callbacks: Any, ckpt: str | None = None, **settings: Any) -> None:
    usual: dict[str, Any] = {"max_steps": 6, "accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    trainer = pl.Trainer(
        default_root_dir=folder,
        callbacks=list(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        **{**usual, **settings},
    )
    trainer.fit(Module(model), DataLoader(data, batch_size=4), ckpt_path=ckpt)


def by_hand(model: Any, data: Any, clip: float, accumulate: int) -> upop.Plan:
    model.train()
    compression = upop.Compression(model, 0.5, 6)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    batches = [batch for _ in range(accumulate) for batch in DataLoader(data, batch_size=4)]
    for start in range(0, 6 * accumulate, accumulate):
        for batch in batches[start : start + accumulate]:
            (compression.loss(model(**batch).loss) / accumulate).backward()
        compression.before_step()  # Lightning calls before it clips
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        compression.after_step([optimizer])
        optimizer.zero_grad()
    return compression.plan()


@pytest.mark.parametrize("accumulate", mostly_slow([1, 2], 2))
def test_it_is_the_loop_by_hand(classifier: Any, image_set: Any, tmp_path: Path, accumulate: int) -> None:
    model = copy.deepcopy(classifier)
    expected = by_hand(model, image_set, 0.05, accumulate)
    dense = upop.count_parameters(classifier)
    images = image_set[0]["pixel_values"].unsqueeze(0)
    callback = LightningCallback(ratio=0.5, module="model", verify={"pixel_values": images})
    fit(classifier, image_set, tmp_path, callback, gradient_clip_val=0.05, accumulate_grad_batches=accumulate)
    assert callback.compression is not None
    assert callback.compression.plan() == expected
    assert upop.count_parameters(classifier) < 0.7 * dense
    for name, value in model.state_dict().items():
        torch.testing.assert_close(classifier.state_dict()[name], value, rtol=1e-4, atol=1e-6)
    again = upop.load(upop.save(classifier, tmp_path / "out"))
    with torch.no_grad():
        assert torch.equal(again(images).logits, classifier.eval()(images).logits)


@pytest.mark.parametrize("share", [0.3, 0.9], ids=["after the cut", "before the cut"])
def test_it_goes_on_from_a_checkpoint(classifier: Any, image_set: Any, tmp_path: Path, share: float) -> None:
    other = copy.deepcopy(classifier)
    whole, resumed = (LightningCallback(0.5, module="model", search_share=share) for _ in range(2))
    keep = pl.callbacks.ModelCheckpoint(dirpath=tmp_path, filename="{step}", every_n_train_steps=6, save_top_k=-1)
    # After a whole epoch, since Lightning begins an epoch anew that was broken off.
    fit(classifier, image_set, tmp_path, whole, keep, enable_checkpointing=True, max_steps=12)
    fit(other, image_set, tmp_path, resumed, ckpt=str(tmp_path / "step=6.ckpt"), max_steps=12)
    assert whole.compression is not None and resumed.compression is not None
    assert resumed.compression.plan() == whole.compression.plan()
    for name, value in classifier.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], value, rtol=1e-5, atol=1e-6)


def test_scaled_losses_change_no_choice(classifier: Any, image_set: Any, tmp_path: Path) -> None:
    """Nothing takes the scale off gradients of frozen weights, of which Lightning's optimizer does not know."""
    classifier.vit.layers[0].mlp.fc1.weight.requires_grad_(False)
    found = []
    for scale in (1.0, 64.0):
        callback, scaler = LightningCallback(0.5, module="model"), torch.amp.GradScaler("cpu", init_scale=scale)
        mixed = pl.plugins.MixedPrecision("16-mixed", "cpu", scaler)
        fit(copy.deepcopy(classifier), image_set, tmp_path, callback, plugins=[mixed])
        assert callback.compression is not None
        found.append(callback.compression.plan())
    assert found[0] == found[1]


def test_what_makes_no_sense_is_refused(classifier: Any, image_set: Any, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="strictly between 0 and 1"):
        LightningCallback(ratio=0)
    with pytest.raises(SettingError, match=r"module='net'.*Module"):
        fit(classifier, image_set, tmp_path, LightningCallback(0.5, module="net"))
    with pytest.raises(SettingError, match="the number of optimizer steps"):
        fit(classifier, image_set, tmp_path, LightningCallback(0.5, module="model"), max_steps=-1, max_epochs=-1)


def test_a_fit_that_is_stopped_leaves_what_was_reached(classifier: Any, image_set: Any, tmp_path: Path) -> None:
    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *_rest: Any) -> None:
            trainer.should_stop = trainer.global_step >= 1

    dense = upop.count_parameters(classifier)
    fit(classifier, image_set, tmp_path, Stop(), LightningCallback(0.5, module="model"), min_epochs=0, min_steps=0)
    assert 0.6 * dense < upop.count_parameters(classifier) < dense


def test_a_fit_that_fails_leaves_no_masks(classifier: Any, image_set: Any, tmp_path: Path) -> None:
    class Fail(pl.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fit(classifier, image_set, tmp_path, LightningCallback(0.5, module="model"), Fail())
    pruner = upop.Pruner(classifier, 0.5, 4)  # refused where masks are left
    pruner.remove()
    assert not any(module._forward_hooks for module in classifier.modules())


def test_the_one_model_of_a_module_without_a_forward_is_compressed(image_set: Any, tmp_path: Path) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.layer = nn.Linear(3, 8), layer

        def forward(self, pixel_values: Any, labels: Any) -> Any:
            del labels
            return self.layer(self.embed(pixel_values.flatten(2).mT)).square().mean()

    class Step(Module):
        def training_step(self, batch: dict[str, Any], index: int) -> Any:
            return self.model(**batch)

    callback, trainer = (
        LightningCallback(ratio=0.5),
        pl.Trainer(max_steps=6, accelerator="cpu", logger=False, enable_checkpointing=False, default_root_dir=tmp_path),
    )
    trainer.callbacks.append(callback)
    trainer.fit(Step(Own()), DataLoader(image_set, batch_size=4))
    assert layer.linear1.out_features < 16
