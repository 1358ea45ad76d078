"""Published file, our folder, transformers' class, and back: the outputs stay, softmax scales folded and unfolded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import upop
from checkpoints.test_transformers import bert, blip
from parity.cases import Recorded, all_recorded
from pruning.families import NLVR
from upop.checkpoints.convert import read_model, to_transformers, write_model
from upop.checkpoints.formats.transformers import load_transformers
from upop.errors import CheckpointError, SettingError, VerificationError
from upop.models.classifier import ClassifierConfig, build_classifier

KINDS = {
    "caption": "BlipForConditionalGeneration",
    "vqa": "BlipForQuestionAnswering",
    "retrieval": "BlipForImageTextRetrieval",
    "clip": "CLIPModel",
    "deit": "ViTForImageClassification",
}
QUICK = ("deit",)
SETS = [
    pytest.param(
        *(recorded, name),
        id=f"{recorded.task}-{recorded.folder.name}-{name}",
        marks=[] if name == "compressed" and recorded.task in QUICK else [pytest.mark.slow],
    )
    for recorded in all_recorded()
    if recorded.task in KINDS
    for name in ("dense", "compressed")
]
# Momentum copies, and what is drawn with their help, are no part of transformers' models.
ONLY_HERE = ("_m", "loss")


def check(recorded: Recorded, model: nn.Module, name: str, skip: tuple[str, ...] = ()) -> None:
    """Compare with the outputs recorded from the published code."""
    expected = recorded.read(f"{name}_out")
    with torch.no_grad():
        found = recorded.case.outputs(model.eval(), recorded.batch(0))
    compared = 0
    for key, value in found.items():
        wanted = expected.get(f"f32/eval/{key}", expected.get(key))
        if wanted is None or key.endswith(skip):
            continue
        compared += 1
        if value.is_floating_point():
            scale = float(wanted.abs().max().clamp_min(1e-6))
            torch.testing.assert_close(value / scale, wanted.float() / scale, rtol=0, atol=1e-5)
        else:
            assert torch.equal(value, wanted), key
    assert compared


@pytest.mark.parametrize(("recorded", "name"), SETS)
def test_there_and_back_through_all_forms(recorded: Recorded, name: str, tmp_path: Path) -> None:
    sizes = {**recorded.case.sizes(recorded.config), **recorded.case.undisturbed}
    model = read_model(recorded.folder / f"{name}.pth", **sizes)
    ours = write_model(model, tmp_path / "ours", "upop")
    theirs = write_model(read_model(ours), tmp_path / "theirs", "hugging-face")
    assert type(load_transformers(theirs)).__name__ == KINDS[recorded.task]
    back = read_model(theirs)
    check(recorded, back, name, ONLY_HERE)
    official = write_model(back, tmp_path / "official.pth", "official")
    again = read_model(official, **sizes)
    check(recorded, again, name, ONLY_HERE)
    # Without the detour through transformers nothing at all is lost.
    direct = write_model(read_model(ours), tmp_path / "direct.pth", "official")
    check(recorded, read_model(direct, **sizes), name)


@pytest.mark.parametrize(
    "recorded",
    [pytest.param(found, marks=part.marks) for part in SETS[1::2] for found in part.values[:1]],
    ids=lambda recorded: recorded.task,
)
def test_a_task_starts_from_transformers(recorded: Recorded, tmp_path: Path) -> None:
    sizes = {**recorded.case.sizes(recorded.config), **recorded.case.undisturbed}
    folder = write_model(read_model(recorded.folder / "dense.pth", **sizes), tmp_path / "theirs", "hugging-face")
    task = recorded.case.official or recorded.task
    model = upop.load_official(task, folder)
    check(recorded, model, "dense", ONLY_HERE)


def test_the_softmax_scale_is_unfolded_in_the_published_file(tmp_path: Path) -> None:
    model = build_classifier(
        ClassifierConfig(image_size=32, classes=3, vision_width=48, vision_depth=1, vision_heads=3)
    )
    upop.shrink(model, {"blocks.0.attn": range(4)})
    queries = 3 * 4
    before = model.get_parameter("blocks.0.attn.qkv.weight")[:queries]
    state = torch.load(write_model(model, tmp_path / "x.pth", "official"), weights_only=True)["model"]
    torch.testing.assert_close(state["blocks.0.attn.qkv.weight"][:queries], before * (16 / 4) ** 0.5)
    theirs: Any = to_transformers(model)
    assert torch.equal(theirs.vit.layers[0].attention.q_proj.weight, before)


def test_a_distilled_deit_has_its_own_class(tmp_path: Path) -> None:
    config = ClassifierConfig(
        architecture="deit_tiny_distilled_patch16_224",
        image_size=32,
        classes=4,
        vision_width=48,
        vision_depth=2,
        vision_heads=3,
    )
    torch.manual_seed(0)
    model = build_classifier(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    folder = write_model(model, tmp_path / "theirs", "hugging-face")
    theirs: Any = transformers.DeiTForImageClassificationWithTeacher.from_pretrained(folder)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(theirs(pixel_values=images).logits, model(images), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(read_model(folder)(images), model(images), rtol=1e-5, atol=1e-5)


def test_a_class_that_computes_something_else_is_not_written(tmp_path: Path) -> None:
    config = ClassifierConfig(image_size=32, classes=3, vision_width=48, vision_depth=1, vision_heads=3)
    model: Any = build_classifier(config)
    model.global_pool = "avg"  # transformers' ViT reads the class token
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    with pytest.raises(VerificationError, match=r"does not compute.*VisionTransformer"):
        write_model(model, tmp_path / "theirs", "hugging-face")
    assert not list(tmp_path.iterdir())


def test_what_has_no_counterpart_is_said(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no class.*BlipNlvr: it has BlipForCond"):
        write_model(NLVR.build(torch.float32), tmp_path / "x", "hugging-face")
    bert().save_pretrained(tmp_path / "bert")
    with pytest.raises(CheckpointError, match=r"BertForSequenceClassification .*needs no conversion"):
        read_model(tmp_path / "bert")
    with pytest.raises(CheckpointError, match="has no published form"):
        write_model(nn.Linear(2, 2), tmp_path / "x.pth", "official")
    torch.save({"model": {"conv.weight": torch.ones(2)}}, tmp_path / "y.pth")
    with pytest.raises(CheckpointError, match="known task"):
        read_model(tmp_path / "y.pth")
    with pytest.raises(SettingError, match="did you mean 'caption'"):
        read_model(tmp_path / "y.pth", "captions")


def test_settings_that_our_model_does_not_have_are_said(tmp_path: Path) -> None:
    model: Any = blip()
    model.config.vision_config.hidden_act = "relu"
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"vision_config\.hidden_act='relu'.*computes with 'gelu'"):
        read_model(tmp_path)


def test_norms_of_transformers_are_kept(tmp_path: Path) -> None:
    model = blip()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02)  # small states, on which the norms' epsilon shows
    model.save_pretrained(tmp_path / "theirs")
    ours: Any = read_model(tmp_path / "theirs")
    assert ours.config.vision_eps == 1e-5
    again: Any = upop.load(upop.save(ours, tmp_path / "ours"))
    images = torch.randn(2, 3, 16, 16)
    states: list[Tensor] = []
    with torch.no_grad():
        states = [again.visual_encoder(images), model.eval().vision_model(images).last_hidden_state]
    torch.testing.assert_close(states[0], states[1], rtol=1e-5, atol=1e-6)
