"""OpenAI's names and ours are the same tensors, and what is written as published comes back."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import upop
from models.test_clip import SIZES, both_features, clip, pairs
from pruning.families import NLVR, difference, outputs_of, uneven_plan
from upop.checkpoints import read_weights, save_official
from upop.checkpoints.fitting.fit import resize_positions
from upop.checkpoints.names.clip import from_openai, group_from_openai, is_openai, to_openai
from upop.checkpoints.official import start_from
from upop.errors import CheckpointError, SettingError

KEYS = Path(__file__).parents[1] / "parity" / "data" / "keys" / "clip_vit_l14_336.keys.json"
HEADS = {name: SIZES[name] for name in ("vision_heads", "text_heads", "vision_mlp", "text_mlp")}


def shrunken(seed: int = 0) -> nn.Module:
    model = clip(torch.float32, seed).eval()
    return upop.shrink(model, uneven_plan(upop.find_groups(model), seed))


def test_every_published_name_goes_there_and_back() -> None:
    shapes = json.loads(KEYS.read_text())["keys"]
    state = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    assert is_openai(state)
    ours = from_openai(state)
    assert not is_openai(ours)
    assert not set(ours) & set(shapes) - {"logit_scale", "image_queue", "text_queue", "idx_queue", "ptr_queue"}
    assert {name: list(value.shape) for name, value in to_openai(ours).items()} == shapes


def test_projections_are_packed_in_the_order_of_queries_keys_and_values() -> None:
    state = clip(torch.float32).state_dict()
    packed = to_openai(state)["transformer_m.resblocks.1.attn.in_proj_bias"]
    parts = [state[f"text_model_m.encoder.layers.1.self_attn.{name}_proj.bias"] for name in "qkv"]
    assert torch.equal(packed, torch.cat(parts))


@pytest.mark.parametrize("seed", range(3))
def test_a_compressed_model_is_written_as_published_to_the_last_bit(tmp_path: Path, seed: int) -> None:
    model = shrunken(seed)
    path = save_official("retrieval-clip", model, tmp_path / "x.pth")
    state = read_weights(path)
    assert is_openai(state)
    group = next(group for group in upop.find_groups(model) if group.name == "vision_model.encoder.layers.1.self_attn")
    assert len(state["visual.transformer.resblocks.1.attn.in_proj_weight"]) == 3 * 3 * group.size
    found = upop.load_official("retrieval-clip", path, **HEADS)
    assert all(torch.equal(value, found.state_dict()[name]) for name, value in model.state_dict().items())
    inputs = pairs(dtype=torch.float32)
    assert torch.equal(both_features(found, inputs), both_features(model, inputs))


@pytest.mark.slow
def test_a_compressed_blip_is_written_with_the_published_scale(tmp_path: Path) -> None:
    model = NLVR.build(torch.float32).eval()
    dense = {group.name: group.size for group in upop.find_groups(model)}
    upop.shrink(model, uneven_plan(upop.find_groups(model), 1))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    path = save_official("nlvr", model, tmp_path / "x.pth")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    written = read_weights(path)
    group = next(group for group in upop.find_groups(model) if group.kind == "attention" and group.modality == "vision")
    assert group.size < dense[group.name]
    queries = group.heads * group.size
    name = f"{group.name}.qkv.weight"
    ratio = math.sqrt(dense[group.name] / group.size)
    torch.testing.assert_close(written[name][:queries], ratio * before[name][:queries])
    assert torch.equal(written[name][queries:], before[name][queries:])
    sizes = {"vision_heads": 3, "text_heads": 4, "vision_mlp": 40, "text_mlp": 56}
    found = upop.load_official("nlvr", path, **sizes)
    inputs = NLVR.inputs(2, torch.float32)
    assert difference(outputs_of(found, inputs), outputs_of(model, inputs)) < 1e-5


def test_a_model_of_another_task_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"BlipNlvr.*checkpoint.*'retrieval-clip'"):
        save_official("retrieval-clip", NLVR.build(), tmp_path / "x.pth")
    with pytest.raises(SettingError, match="did you mean 'retrieval-clip'"):
        save_official("retrieval_clip", clip(), tmp_path / "x.pth")
    assert not list(tmp_path.iterdir())


def as_published(folder: Path, state: dict[str, Tensor]) -> Path:
    torch.save({"model": state}, folder / "x.pth")
    return folder / "x.pth"


def test_plain_clip_of_openai_starts_with_copies_and_fresh_queues(tmp_path: Path) -> None:
    model = clip(torch.float32)
    plain = {
        name: value
        for name, value in to_openai(model.state_dict()).items()
        if not name.split(".")[0].endswith("_m") and "queue" not in name
    }
    sizes = {name: torch.tensor(2) for name in ("input_resolution", "context_length", "vocab_size")}
    path = as_published(tmp_path, plain | sizes)
    found = upop.load_official("retrieval-clip", path, **HEADS, queue_size=8)
    assert torch.equal(
        both_features(found, pairs(dtype=torch.float32)), both_features(model.eval(), pairs(dtype=torch.float32))
    )
    assert all(torch.equal(parameter, twin) for parameter, twin in found.momentum_pairs())
    assert found.image_queue.shape == (20, 8)
    started = clip(torch.float32, 5)
    assert start_from("retrieval-clip", path, started) == []
    assert torch.equal(started.logit_scale, model.logit_scale)
    assert torch.equal(started.visual_projection_m.weight, model.visual_projection.weight)


def test_half_precision_becomes_float32(tmp_path: Path) -> None:
    state = {name: v.half() if v.is_floating_point() else v for name, v in to_openai(clip().state_dict()).items()}
    found = upop.load_official("retrieval-clip", as_published(tmp_path, state), **HEADS)
    assert {value.dtype for value in found.state_dict().values()} == {torch.float32, torch.int64}
    assert torch.equal(found.visual_projection.weight.t(), state["visual.proj"].float())


def test_positions_and_queues_take_the_sizes_asked_for(tmp_path: Path) -> None:
    model = clip(torch.float32)
    path = save_official("retrieval-clip", model, tmp_path / "x.pth")
    found = upop.load_official("retrieval-clip", path, **HEADS, image_size=32, queue_size=6)
    name = "vision_model{}.embeddings.position_embedding.weight"
    for twin in ("", "_m"):
        expected = resize_positions(model.get_parameter(name.format(twin)).detach().unsqueeze(0), 17)[0]
        assert torch.equal(found.get_parameter(name.format(twin)), expected)
    assert found.idx_queue.tolist() == [[-100] * 6]
    with torch.no_grad():
        image, _ = found(torch.randn(2, 3, 32, 32), pairs()["input_ids"])
    assert image.isfinite().all()


def test_what_is_no_clip_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"lacks vision_model\.embeddings\.patch_embedding\.weight"):
        upop.load_official("retrieval-clip", as_published(tmp_path, {"conv.weight": torch.ones(3)}))
    state = to_openai(clip(torch.float32).state_dict())
    state["visual.extra"] = torch.ones(1)
    del state["ln_final.bias"]
    with pytest.raises(CheckpointError) as caught:
        upop.load_official("retrieval-clip", as_published(tmp_path, state), **HEADS)
    assert "missing text_model.final_layer_norm.bias" in str(caught.value)
    assert "unknown visual.extra" in str(caught.value)


@pytest.mark.parametrize(
    ("published", "ours"),
    [
        ("visual.transformer.resblocks.11", "vision_model.encoder.layers.11.mlp"),
        ("visual.transformer.resblocks.0.attn", "vision_model.encoder.layers.0.self_attn"),
        ("transformer.resblocks.3", "text_model.encoder.layers.3.mlp"),
        ("transformer.resblocks.3.attn", "text_model.encoder.layers.3.self_attn"),
        ("ln_final", "ln_final"),
    ],
)
def test_groups_are_named_alike(published: str, ours: str) -> None:
    assert group_from_openai(published) == ours
