"""Classifiers: any vision transformer of timm by name, in other sizes, with other heads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch

import upop
from pruning.families import randomise
from tiers import mostly_slow
from upop.errors import CheckpointError, SettingError
from upop.models.classifier import ClassifierConfig, architecture_sizes, build_classifier, replace_head
from upop.pruning import count_macs, find_groups, shrink

SIZES: dict[str, Any] = {
    "patch_size": 8,
    "vision_width": 24,
    "vision_depth": 2,
    "vision_heads": 2,
    "vision_mlp": 50,
    "image_size": 32,
    "classes": 5,
}


def tiny(**more: Any) -> Any:
    model = build_classifier(ClassifierConfig(**{**SIZES, **more}))
    randomise(model)
    return model.eval()


def test_the_published_model_has_the_published_size() -> None:
    with torch.device("meta"):
        model = build_classifier(ClassifierConfig())
    assert upop.count_parameters(model) == 22_050_664
    example = torch.zeros(1, 3, 224, 224, device="meta")
    assert round(count_macs(model, example) / 1e9, 1) == 4.6


def test_a_named_architecture_is_timms() -> None:
    config = ClassifierConfig(architecture="vit_tiny_patch16_224.augreg_in21k", image_size=64, classes=7, drop_path=0.2)
    model: Any = build_classifier(config)
    known = timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=7)
    assert {key: value.shape for key, value in model.state_dict().items()} == {
        key: value.shape for key, value in known.state_dict().items()
    }
    assert model.blocks[-1].drop_path1.drop_prob == pytest.approx(0.2)
    assert architecture_sizes("vit_tiny_patch16_224") == {
        "patch_size": 16,
        "vision_width": 192,
        "vision_depth": 12,
        "vision_heads": 3,
        "vision_mlp": 768,
    }


def test_sizes_can_differ_from_the_architectures() -> None:
    model = tiny()
    assert [group.size for group in find_groups(model)] == [12, 50, 12, 50]
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 5)
    assert tiny(dropout=0.3).blocks[0].mlp.drop1.p == 0.3
    only_depth: Any = build_classifier(ClassifierConfig(architecture="deit_tiny_patch16_224", vision_depth=1))
    assert only_depth.blocks[0].mlp.fc1.weight.shape == (768, 192)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"architecture": "deit_smal_patch16_224"}, r"not a model of timm .*did you mean 'deit_small_patch16_224'"),
        ({"architecture": "resnet18"}, "timm cannot build resnet18 .*img_size"),
        (
            {"architecture": "swin_tiny_patch4_window7_224", "vision_width": 48},
            "is a SwinTransformer; sizes can be set",
        ),
    ],
)
def test_what_timm_cannot_build_is_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingError, match=said):
        build_classifier(ClassifierConfig(**fields))


def test_sizes_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(ValueError, match=r"vision_width \(24\).*vision_heads \(5\)"):
        ClassifierConfig(**{**SIZES, "vision_heads": 5})
    with pytest.raises(ValueError, match=r"image_size \(7\) is below patch_size \(8\)"):
        ClassifierConfig(**{**SIZES, "image_size": 7})


def test_a_fresh_head_for_other_classes() -> None:
    model = tiny()
    inputs = torch.randn(2, 3, 32, 32)
    features = model.forward_features(inputs)
    assert replace_head(model, 5) == ["head.weight", "head.bias"]
    assert replace_head(model, 3) == ["head.weight", "head.bias"]
    assert model(inputs).shape == (2, 3)
    assert model.config.classes == 3
    assert torch.equal(model.forward_features(inputs), features)


def shrunken() -> Any:
    model = tiny()
    groups = find_groups(model)
    shrink(model, {group.name: range(1, 4 + 3 * number) for number, group in enumerate(groups)})
    return model


def test_a_compressed_one_is_kept_in_our_folder(tmp_path: Path) -> None:
    model = shrunken()
    again = upop.load(upop.save(model, tmp_path / "x"))
    inputs = torch.randn(2, 3, 32, 32)
    assert torch.equal(model(inputs), again(inputs))
    assert again.config == model.config


@pytest.mark.parametrize("name", ["classification", "deit"])
def test_a_compressed_one_is_kept_as_published(tmp_path: Path, name: str) -> None:
    """Where the softmax still divides by the root of the dense head_dim: queries are stored unfolded."""
    from upop.checkpoints import save_official

    model = shrunken()
    path = save_official(name, model, tmp_path / "x.pth")
    stored = torch.load(path, weights_only=True)["model"]
    queries = model.blocks[0].attn.qkv.weight
    rows = queries.shape[0] // 3
    torch.testing.assert_close(stored["blocks.0.attn.qkv.weight"][:rows], queries[:rows] * (12 / 3) ** 0.5)
    torch.testing.assert_close(stored["blocks.0.attn.qkv.weight"][rows:], queries[rows:])
    again = upop.load_official(name, path, vision_heads=2, vision_mlp=50)
    inputs = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model(inputs), again(inputs), rtol=1e-5, atol=1e-5)
    assert (again.config.classes, again.config.image_size) == (5, 32)


def test_a_named_architecture_tells_the_heads_of_a_checkpoint(tmp_path: Path) -> None:
    """80 per head here, not 64."""
    source = timm.create_model("vit_huge_patch14_224", depth=1, embed_dim=160, num_heads=2, img_size=28, num_classes=3)
    torch.save({"model": source.state_dict()}, tmp_path / "x.pth")
    sizes = {"vision_width": 160, "vision_depth": 1, "vision_heads": 2, "vision_mlp": 640}
    model: Any = upop.load_official("deit", tmp_path / "x.pth", architecture="vit_huge_patch14_224", **sizes)
    inputs = torch.randn(1, 3, 28, 28)
    torch.testing.assert_close(model(inputs), source.eval()(inputs))
    with pytest.raises(CheckpointError, match=r"x\.pth does not fit"):
        deeper = {**sizes, "vision_depth": 2}
        upop.load_official("deit", tmp_path / "x.pth", architecture="vit_huge_patch14_224", **deeper)


@pytest.mark.parametrize(
    "architecture", ["deit_small_distilled_patch16_224", "deit3_small_patch16_224", "vit_base_patch16_siglip_224"]
)
@pytest.mark.parametrize("size", mostly_slow([32, 48], 48))
def test_positions_are_resized_whatever_stands_before_them(tmp_path: Path, architecture: str, size: int) -> None:
    """Two tokens, one that has no position, and none."""
    sizes = {**{name: value for name, value in SIZES.items() if name != "classes"}, "architecture": architecture}
    source = build_classifier(ClassifierConfig(**sizes, classes=4))
    randomise(source)
    torch.save({"model": source.state_dict()}, tmp_path / "x.pth")
    model: Any = upop.load_official("deit", tmp_path / "x.pth", **{**sizes, "image_size": size})
    assert model(torch.zeros(1, 3, size, size)).shape == (1, 4)
    if size == 32:
        inputs = torch.randn(1, 3, 32, 32)
        torch.testing.assert_close(model(inputs), source.eval()(inputs))


def test_a_checkpoint_without_a_head_says_so(tmp_path: Path) -> None:
    state = {key: value for key, value in tiny().state_dict().items() if not key.startswith("head")}
    torch.save({"model": state}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"lacks head\.weight"):
        upop.load_official("classification", tmp_path / "x.pth")
