"""What is easily got wrong in a first call: our own errors, which say what was given and what to write instead."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import upop
from pruning.families import VIT, loss_of
from upop.errors import LayoutError, SettingError, StepError


def images(count: int = 4) -> Tensor:
    return VIT.inputs(count)["x"]


def labelled() -> list[tuple[Tensor, Tensor]]:
    return [(images(), torch.arange(4) % 3) for _ in range(2)]


def good(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


class Wrapper:
    """As a Trainer or a pipeline holds its model."""

    def __init__(self) -> None:
        self.model = VIT.build()


MODELS: list[tuple[Any, str]] = [
    ("vit_tiny_patch16_224", r"the text 'vit_tiny_patch16_224'. Load the model first, with timm.create_model"),
    (timm.models.VisionTransformer, r"the class VisionTransformer. Give an instance: model = VisionTransformer\("),
    (VIT.build().state_dict(), r"If it is a state_dict, build the model"),
    ((VIT.build(), None), r"a tuple of 2. Its element 0 is a model"),
    (Wrapper(), r"a Wrapper. Its \.model is a model: give that"),
    (None, "a NoneType"),
]


@pytest.mark.parametrize(("model", "message"), MODELS, ids=[type(model).__name__ for model, _ in MODELS])
def test_what_is_no_model(model: Any, message: str) -> None:
    for call, name in (
        (lambda: upop.Pruner(model, 0.5, 8), "Pruner"),
        (lambda: upop.calibrate(model, labelled(), 0.5, loss=good), r"calibrate\(\)"),
        (lambda: upop.distill(VIT.build(), model), "its teacher"),
        (lambda: upop.distill(model, VIT.build()), r"distill\(\)"),
        (lambda: upop.shrink(model, {}), r"shrink\(\)"),
    ):
        with pytest.raises(SettingError, match=f"{name}.*takes a model .a torch.nn.Module., and was given .*{message}"):
            call()


@pytest.mark.parametrize(
    ("ratio", "message"),
    [
        ("50%", "strictly between 0 and 1; found .*write 0.5 for 50 %"),
        ("0.5", "strictly between 0 and 1; found .*write 0.5"),
        (2, "strictly between 0 and 1; found .*0.5 for 2x smaller"),
        (None, "either ratio=.* or target=.*neither of them was given"),
    ],
)
def test_ratios_in_other_forms(ratio: Any, message: str) -> None:
    for call in (
        lambda: upop.Pruner(VIT.build(), ratio, 8),
        lambda: upop.calibrate(VIT.build(), labelled(), ratio, loss=good),
    ):
        with pytest.raises(SettingError, match=message):
            call()


@pytest.mark.parametrize(
    ("steps", "message"),
    [(100.0, r"found 100\.0: write 100"), (2.5, r"found 2\.5\."), ("8", "found '8'"), (0, "found 0")],
)
def test_steps_that_are_no_number_of_steps(steps: Any, message: str) -> None:
    with pytest.raises(SettingError, match=f"steps.*number.* 1; {message}"):
        upop.Pruner(VIT.build(), 0.5, steps)


def spent() -> Iterator[Any]:
    batches = iter(labelled())
    list(batches)
    return batches


BATCHES: list[tuple[Any, str]] = [
    (images(), r"a single tensor of shape \(4, 3, .*\[batch\]"),
    ({"x": images()}, r"a single dict.*\[batch\]"),
    ("train", "Give a DataLoader"),
    (None, r"None \(NoneType\)"),
    (spent(), "there was none.*A generator that was already consumed is empty"),
    (iter([]), "there was none"),
    (itertools.repeat(labelled()[0]), r"more than 4096.*itertools.islice\(loader, 32\)"),
]


@pytest.mark.parametrize(("batches", "message"), BATCHES, ids=[type(batches).__name__ for batches, _ in BATCHES])
def test_what_are_no_batches(batches: Any, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        upop.calibrate(VIT.build(), batches, 0.5, loss=good)


LOSSES: list[tuple[Any, str]] = [
    (nn.CrossEntropyLoss(), r"CrossEntropyLoss takes outputs and labels.*criterion\(model\(batch\[0\]\), batch\[1\]\)"),
    (nn.MSELoss, "MSELoss takes outputs and labels"),
    (F.cross_entropy, "cross_entropy takes outputs and labels"),
    (lambda batch: batch, r"does not take two arguments \(too many positional arguments\)"),
    (lambda model, inputs, labels: labels, "missing a required argument: 'labels'"),
    ("cross_entropy", "loss is a function of the model and a batch; found 'cross_entropy'"),
]


@pytest.mark.parametrize(("loss", "message"), LOSSES)
def test_what_is_no_loss_of_a_model_and_a_batch(loss: Any, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        upop.calibrate(VIT.build(), labelled(), 0.5, loss=loss)


def test_inputs_and_labels_without_a_loss() -> None:
    """timm's models would take the labels for an attention mask."""
    with pytest.raises(SettingError, match=r"look like inputs and labels.*loss=lambda model, batch: F.cross_entropy"):
        upop.calibrate(VIT.build(), torch.utils.data.DataLoader(list(zip(images(), range(4), strict=True)), 2), 0.5)


RETURNED: list[tuple[Any, str]] = [
    (lambda model, batch: good(model, batch).item(), r"It returned float .*Return the tensor, not its \.item\(\)"),
    (lambda model, batch: model(batch[0]), r"a tensor of shape \(4, .*Return its mean\(\)"),
    (lambda model, batch: good(model, batch).detach(), "a tensor without a gradient"),
    (lambda model, batch: None, "It returned NoneType"),
    (lambda model, batch: good(model, (batch["x"], batch["y"])), r"failed on a batch, a tuple of a tensor of shape"),
    (lambda model, batch: model(batch[0]).loss, r"AttributeError: 'Tensor' object has no attribute 'loss'"),
]


@pytest.mark.parametrize(("loss", "message"), RETURNED)
def test_losses_that_give_no_loss(loss: Any, message: str) -> None:
    model = VIT.build()
    with pytest.raises(StepError, match=message):
        upop.calibrate(model, labelled(), 0.5, loss=loss)
    upop.calibrate(model, labelled(), 0.5, loss=good, stages=1, correct=False, verify=False)  # nothing was changed


def test_batches_that_the_model_does_not_take() -> None:
    with pytest.raises(StepError, match=r"failed.*mapping.* images.*TypeError"):
        upop.calibrate(VIT.build(), [{"images": images()}], 0.5)


def test_without_gradients() -> None:
    model = VIT.build()
    with torch.no_grad():
        upop.calibrate(model, labelled(), 0.3, loss=good)
    with torch.inference_mode(), pytest.raises(StepError, match=r"torch.inference_mode is on"):
        upop.calibrate(model, labelled(), 0.3, loss=good)
    pruner = upop.Pruner(model, 0.3, 4)
    with pytest.raises(StepError, match=r"no gradient.*Call it after loss.backward\(\)"):
        pruner.step()


def test_quantized_weights() -> None:
    model = VIT.build()
    for layer in (each for block in model.blocks for each in block.modules() if isinstance(each, nn.Linear)):
        layer.weight = nn.Parameter(layer.weight.detach().to(torch.int8), requires_grad=False)
    with pytest.raises(LayoutError, match=r"blocks.0.attn.qkv: has quantised weights; prune the model before"):
        upop.Pruner(model, 0.5, 4)


@pytest.mark.parametrize("degenerate", [0.0, float("inf")])
def test_a_teacher_that_explodes_is_said_to_be_degenerate(degenerate: float) -> None:
    model, teacher = VIT.build(), VIT.build(seed=1)
    with torch.no_grad():
        for parameter in teacher.norm.parameters():
            parameter.fill_(degenerate)
    distill = upop.distill(model, teacher)
    with pytest.raises(StepError, match=r"teacher, VisionTransformer.* at norm: .*trained"):
        model.train()(images())
    distill.remove()
    distill = upop.distill(model, VIT.build(seed=1))
    (loss_of(model(images())) + distill.loss()).backward()
