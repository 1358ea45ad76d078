"""Segmenter: sizes, published costs, images of any size, and both decoders' checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

import upop
from pruning.families import difference, outputs_of, randomise, uneven_plan
from upop.checkpoints import save_official
from upop.errors import CheckpointError
from upop.models.segmenter import BACKBONES, Segmenter, SegmenterConfig, resize_grid

TINY: dict[str, Any] = {
    "image_size": 32,
    "patch_size": 8,
    "vision_width": 24,
    "vision_depth": 2,
    "vision_heads": 3,
    "vision_mlp": 40,
    "decoder_width": 32,
    "decoder_depth": 2,
    "decoder_heads": 4,
    "decoder_mlp": 56,
    "classes": 5,
    "encoder_classes": 3,
    "drop_path": 0.0,
    "decoder_dropout": 0.0,
}
HEADS = {name: TINY[name] for name in ("vision_heads", "vision_mlp", "decoder_heads", "decoder_mlp")}


def tiny(dtype: torch.dtype = torch.float64, **sizes: Any) -> Segmenter:
    model = Segmenter(SegmenterConfig(**{**TINY, **sizes}))
    randomise(model, 1)
    return model.to(dtype).eval()


def test_the_published_parameters_and_cost() -> None:
    with torch.device("meta"):
        model = Segmenter(SegmenterConfig())
        images = torch.zeros(1, 3, 512, 512)
    assert upop.count_parameters(model) / 1e6 == pytest.approx(26.4, abs=0.05)
    # The paper's 38.6 count norms and the enlarging of scores too, which are no multiply-adds of layers.
    assert upop.count_macs(model, {"images": images}) / 1e9 == pytest.approx(38.6, rel=0.01)


def test_the_default_is_the_published_backbone() -> None:
    found = SegmenterConfig().model_dump()
    assert BACKBONES["vit_small_patch16_384"].items() <= found.items()
    for sizes in BACKBONES.values():
        SegmenterConfig(**sizes)


def test_encoder_and_decoder_are_pruned_under_one_budget() -> None:
    model = tiny()
    pruner = upop.Pruner(model, 0.4, 2, 1)
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    for _ in range(2):
        model.zero_grad()
        model(images).square().mean().backward()
        pruner.step()
    plan = pruner.plan()
    blocks = [
        f"{part}.blocks.{number}.{kind}"
        for part in ("encoder", "decoder")
        for number in (0, 1)
        for kind in ("attn", "mlp")
    ]
    assert list(plan) == blocks
    left = sum(pruner.costs[name] * len(kept) for name, kept in plan.items())
    whole = sum(pruner.costs[name] * plan.sizes[name] for name in plan)
    assert left / whole == pytest.approx(0.6, abs=0.03)
    pruner.shrink(verify=images)


def test_all_that_gets_no_gradient_says_so() -> None:
    """Data-parallel training waits for every parameter that asks for a gradient."""
    for decoder in ("mask_transformer", "linear"):
        model = tiny(decoder=decoder).train()
        model(torch.randn(1, 3, 32, 40, dtype=torch.float64)).square().sum().backward()
        without = {name for name, value in model.named_parameters() if value.grad is None}
        assert without == {"encoder.head.weight", "encoder.head.bias"}
        assert without == {name for name, value in model.named_parameters() if not value.requires_grad}


@pytest.mark.parametrize("decoder", ["mask_transformer", "linear"])
@pytest.mark.parametrize("size", [(32, 32), (37, 26), (8, 8), (3, 50), (64, 16)])
def test_images_of_any_size(decoder: str, size: tuple[int, int]) -> None:
    model = tiny(decoder=decoder)
    images = torch.randn(2, 3, *size, dtype=torch.float64)
    with torch.no_grad():
        found = model(images)
        assert found.shape == (2, 5, *size)
        whole = torch.zeros(2, 3, *(-(-side // 8) * 8 for side in size), dtype=torch.float64)
        whole[:, :, : size[0], : size[1]] = images
        assert difference(model(whole)[:, :, : size[0], : size[1]], found) < 1e-12


def test_samples_do_not_meet() -> None:
    model, images = tiny(), torch.randn(3, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        assert difference(model(images[1:2]), model(images)[1:2]) < 1e-12


def test_positions_keep_the_class_tokens_and_follow_the_grid() -> None:
    positions = torch.randn(1, 17, 6)
    assert resize_grid(positions, (4, 4)) is positions
    resized = resize_grid(positions, (2, 8))
    assert resized.shape == (1, 17, 6)
    assert torch.equal(resized[:, 0], positions[:, 0])
    rows = torch.arange(4.0).view(4, 1).expand(4, 4).reshape(1, 16, 1)
    grid = resize_grid(torch.cat([torch.zeros(1, 1, 1), rows], dim=1), (8, 4))[0, 1:, 0].view(8, 4)
    assert bool((grid == grid[:, :1]).all())
    assert grid[:, 0].tolist() == sorted(grid[:, 0].tolist())


@pytest.mark.parametrize("decoder", ["mask_transformer", "linear"])
@pytest.mark.parametrize("seed", [None, 0, 1])
def test_checkpoints_there_and_back(tmp_path: Path, decoder: str, seed: int | None) -> None:
    """Dense, and compressed: the published code divides by the root of the dense head_dim."""
    model = tiny(torch.float32, decoder=decoder)
    if seed is not None:
        upop.shrink(model, uneven_plan(upop.find_groups(model), seed))
    path = save_official("segmentation", model, tmp_path / "x.pth")
    found = upop.load_official("segmentation", path, **HEADS)
    inputs = {"images": torch.randn(2, 3, 40, 32)}
    assert difference(outputs_of(found, inputs), outputs_of(model, inputs)) < 2e-5
    assert [group.size for group in upop.find_groups(found)] == [group.size for group in upop.find_groups(model)]
    assert found.config.classes == 5
    again = upop.load(upop.save(found, tmp_path / "ours"))
    assert torch.equal(outputs_of(again, inputs), outputs_of(found, inputs))


def test_another_crop_size_is_asked_for(tmp_path: Path) -> None:
    model = tiny(torch.float32)
    path = save_official("segmentation", model, tmp_path / "x.pth")
    found = upop.load_official("segmenter", path, **HEADS, image_size=48)
    images = {"images": torch.randn(1, 3, 48, 48)}
    assert found.encoder.pos_embed.shape == (1, 37, 24)
    # The dense model resizes its positions for such images in the same way.
    assert difference(outputs_of(found, images), outputs_of(model, images)) < 1e-5


def test_a_plain_vision_transformer_becomes_the_encoder(tmp_path: Path) -> None:
    from upop.checkpoints.official import start_from

    source = tiny(torch.float32)
    plain = {
        key.removeprefix("encoder."): value for key, value in source.state_dict().items() if key.startswith("encoder.")
    }
    torch.save({"model": {**plain, "head.weight": torch.ones(7, 24)}}, tmp_path / "vit.pth")
    model = tiny(torch.float32)
    randomise(model, 9)
    before = model.state_dict()["decoder.cls_emb"].clone()
    lacking = start_from("segmentation", tmp_path / "vit.pth", model)
    assert {key.rpartition(".")[0] for key in lacking} >= {"encoder.head", "decoder.proj_dec"}
    assert all(key.startswith(("decoder.", "encoder.head")) for key in lacking)
    assert torch.equal(model.encoder.blocks[1].mlp.fc1.weight, source.encoder.blocks[1].mlp.fc1.weight)
    assert torch.equal(model.state_dict()["decoder.cls_emb"], before)


def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path) -> None:
    torch.save({"model": {"visual_encoder.cls_token": torch.ones(1, 1, 3)}}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"lacks encoder\.patch_embed\.proj\.weight"):
        upop.load_official("segmentation", tmp_path / "x.pth")


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"vision_heads": 5}, "vision_width"),
        ({"decoder_heads": 5}, "decoder_width"),
        ({"image_size": 4}, "image_size"),
        ({"decoder": "unet"}, "decoder"),
        ({"drop_path": 1.0}, "drop_path"),
        ({"classes": 0}, "classes"),
        ({"class": 3}, "class"),
    ],
)
def test_sizes_that_make_no_sense(sizes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        SegmenterConfig(**{**TINY, **sizes})
