"""Published checkpoints become ready models, and what does not fit is said key by key."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import upop
from pruning.families import NLVR, difference, nlvr, outputs_of, uneven_plan
from upop.checkpoints.fitting.fit import resize_positions
from upop.checkpoints.official import start_from
from upop.errors import CheckpointError, SettingError
from upop.models.caption import BlipCaption, CaptionConfig
from upop.models.nlvr import BlipNlvr, NlvrConfig
from upop.models.vqa import BlipVqa, VqaConfig
from upop.tasks import find_task
from upop.tasks.vqa import VqaSettings

DATA = Path(__file__).parents[1] / "parity" / "data"
EXTRAS = DATA / "extras"
SIZES = {"vision_heads": 3, "text_heads": 4, "vision_mlp": 40, "text_mlp": 56}


SMALL = partial(nlvr, vision_depth=1, text_depth=1, merge_from=0)


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    torch.save({"model": NLVR.build(torch.float32).state_dict()}, tmp_path / "dense.pth")
    return tmp_path / "dense.pth"


def published(model: torch.nn.Module, original: dict[str, int]) -> dict[str, Tensor]:
    """Return a shrunken model's weights as published: there the ViT still divides by its dense head_dim."""
    state = {key: value.clone() for key, value in model.state_dict().items()}
    for group in upop.find_groups(model):
        if group.kind == "attention" and group.modality == "vision":
            factor = math.sqrt(original[group.name] / group.size)
            for part in group.producers:
                state[part.tensor][: group.heads * group.size] *= factor
    return state


def test_a_dense_file(dense: Path) -> None:
    model = upop.load_official("nlvr", dense, **SIZES)
    assert not model.training
    expected = outputs_of(NLVR.build(torch.float32).eval(), NLVR.inputs(2, torch.float32))
    assert torch.equal(outputs_of(model, NLVR.inputs(2, torch.float32)), expected)


@pytest.mark.parametrize("form", ["pth", "safetensors"])
@pytest.mark.parametrize("seed", range(3))
def test_a_compressed_file_computes_what_was_searched(tmp_path: Path, seed: int, form: str) -> None:
    model = NLVR.build(torch.float64).eval()
    original = {group.name: group.size for group in upop.find_groups(model)}
    upop.shrink(model, uneven_plan(upop.find_groups(model), seed))
    state = {key: v.float() if v.is_floating_point() else v for key, v in published(model, original).items()}
    path = tmp_path / f"x.{form}"
    if form == "pth":
        torch.save({"model": state}, path)
    else:
        save_file(state, path)
    found = upop.load_official("nlvr", path, **SIZES)
    assert [group.size for group in upop.find_groups(found)] == [group.size for group in upop.find_groups(model)]
    inputs = NLVR.inputs()
    assert difference(outputs_of(found.double(), inputs), outputs_of(model, inputs)) < 1e-5


def test_positions_are_resized_on_request(tmp_path: Path) -> None:
    dense = tmp_path / "dense.pth"
    torch.save({"model": SMALL().state_dict()}, dense)
    model = upop.load_official("nlvr", dense, **SIZES, image_size=24)
    state = torch.load(dense, weights_only=True)["model"]["visual_encoder.pos_embed"]
    assert torch.equal(model.visual_encoder.pos_embed, resize_positions(state, 10))
    inputs = {**NLVR.inputs(2, torch.float32), "images": torch.randn(4, 3, 24, 24)}
    assert outputs_of(model, inputs).isfinite().all()


@pytest.mark.parametrize("name", ["3to7", "4to6", "6to4"])
def test_resized_positions_are_the_recorded_ones(name: str) -> None:
    recorded = load_file(EXTRAS / "pos_embed.safetensors")
    expected = recorded[f"blip_bicubic/{name}/out"]
    found = resize_positions(recorded[f"blip_bicubic/{name}/in"], expected.shape[1])
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert resize_positions(expected, expected.shape[1]) is expected


@pytest.mark.parametrize(
    ("task", "overrides", "message"),
    [
        ("nlvr2", {}, r"task='nlvr2' is not known \(did you mean 'nlvr'\?\)"),
        ("", {}, "task='' is not known"),
        ("nlvr", {"vision_head": 3}, r"'vision_head' is no field .*did you mean 'vision_heads'"),
        ("nlvr", {"dropout": 2.0}, "dropout"),
        ("nlvr", {"image_size": "big"}, "image_size"),
        ("nlvr", {"image_size": -16}, "image_size"),
    ],
)
def test_settings_that_are_wrong(dense: Path, task: str, overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        upop.load_official(task, dense, **overrides)


@pytest.mark.parametrize("name", ["vision_heads", "text_heads"])
def test_heads_that_do_not_divide_the_width(dense: Path, name: str) -> None:
    with pytest.raises(SettingError, match=name):
        upop.load_official("nlvr", dense, **{**SIZES, name: 5})


def changed(dense: Path, **tensors: Tensor | None) -> Path:
    state = torch.load(dense, weights_only=True)["model"]
    for name, value in tensors.items():
        key = next(key for key in state if key.replace(".", "_") == name)
        if value is None:
            del state[key]
        else:
            state[key] = value
    torch.save({"model": state}, dense)
    return dense


def test_shapes_that_do_not_fit_are_listed(dense: Path) -> None:
    path = changed(
        dense,
        visual_encoder_norm_weight=torch.ones(7),
        cls_head_2_bias=torch.ones(3),
        text_encoder_embeddings_LayerNorm_bias=None,
    )
    with pytest.raises(CheckpointError) as caught:
        upop.load_official("nlvr", path, **SIZES)
    message = str(caught.value)
    assert str(path) in message
    assert "does not fit BlipNlvr (3 misfits)" in message
    assert "visual_encoder.norm.weight has shape (7,), the model (24,)" in message
    assert "cls_head.2.bias has shape (3,), the model (2,)" in message
    assert "missing text_encoder.embeddings.LayerNorm.bias" in message


def test_kept_sizes_that_are_no_number_of_channels(dense: Path) -> None:
    path = changed(dense, visual_encoder_blocks_0_attn_qkv_weight=torch.ones(70, 24))
    with pytest.raises(CheckpointError, match=r"blocks\.0\.attn\.qkv\.weight has 70 rows.* up to 8 for 3 heads"):
        upop.load_official("nlvr", path, **SIZES)


def test_projections_that_disagree_are_listed(dense: Path) -> None:
    path = changed(dense, text_encoder_encoder_layer_0_attention_self_query_weight=torch.ones(4 * 5, 32))
    with pytest.raises(
        CheckpointError, match=r"attention\.self\.key\.weight has shape \(32, 32\), the model \(20, 32\)"
    ):
        upop.load_official("nlvr", path, **SIZES)


def test_the_wrong_number_of_heads_is_noticed_for_compressed_files(tmp_path: Path) -> None:
    model = SMALL()
    upop.shrink(model, {group.name: range(5) for group in upop.find_groups(model)})
    torch.save({"model": model.state_dict()}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"rows.*number of channels"):
        upop.load_official("nlvr", tmp_path / "x.pth", **{**SIZES, "text_heads": 8})


def test_a_checkpoint_of_something_else(tmp_path: Path) -> None:
    torch.save({"model": {"conv.weight": torch.ones(3)}}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"lacks cls_head\.0\.weight.*1 tensors, such as conv\.weight"):
        upop.load_official("nlvr", tmp_path / "x.pth")


def test_starting_from_single_cross_attention_as_recorded() -> None:
    config = json.loads((DATA / "nlvr" / "a" / "config.json").read_text())
    vision, text = config["vision"], config["med"]
    model = BlipNlvr(
        NlvrConfig(
            image_size=48,
            patch_size=vision["patch_size"],
            vision_width=vision["width"],
            vision_depth=vision["depth"],
            vision_heads=vision["heads"],
            vision_mlp=vision["mlp_ratio"] * vision["width"],
            text_width=text["hidden_size"],
            text_depth=text["num_hidden_layers"],
            text_heads=text["num_attention_heads"],
            text_mlp=text["intermediate_size"],
            vocab_size=text["vocab_size"],
            max_positions=text["max_position_embeddings"],
        )
    )
    before = load_file(EXTRAS / "nlvr_from_pretrained_before.safetensors")
    model.load_state_dict(before, strict=False)
    missing = start_from("nlvr", EXTRAS / "nlvr_from_pretrained_in.safetensors", model)
    assert sorted(missing) == sorted(json.loads((EXTRAS / "nlvr_from_pretrained.json").read_text())["missing"])
    after = load_file(EXTRAS / "nlvr_from_pretrained_after.safetensors")
    state = model.state_dict()
    assert set(state) == set(after)
    for key, value in after.items():
        torch.testing.assert_close(state[key], value, rtol=1e-6, atol=1e-6, msg=key)


def test_starting_from_a_file_that_does_not_fit_changes_nothing(dense: Path) -> None:
    path = changed(dense, visual_encoder_norm_weight=torch.ones(7))
    model = nlvr()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"visual_encoder\.norm\.weight has shape"):
        start_from("nlvr", path, model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    with pytest.raises(SettingError, match="did you mean 'nlvr'"):
        start_from("nlv", path, model)


def test_starting_leaves_out_other_heads_but_not_stray_keys(tmp_path: Path) -> None:
    state = NLVR.build(torch.float32).state_dict()
    torch.save({"model": {**state, "itm_head.weight": torch.ones(2, 3)}}, tmp_path / "x.pth")
    assert start_from("nlvr", tmp_path / "x.pth", nlvr()) == []
    torch.save({"model": {**state, "visual_encoder.stray": torch.ones(2)}}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"unknown visual_encoder\.stray"):
        start_from("nlvr", tmp_path / "x.pth", nlvr())


def test_starting_from_a_folder_of_another_task_takes_the_towers_that_both_have(tmp_path: Path) -> None:
    config = NLVR.build(torch.float32).config.model_dump(exclude={"merge_from"})
    config |= {"vision_width": config["text_width"], "vision_heads": config["text_heads"]}
    config |= {"vision_depth": 1, "text_depth": 1}
    captioner = BlipCaption(CaptionConfig(**config))
    upop.save(captioner, tmp_path / "captioner")
    sizes = {key: value for key, value in config.items() if key not in ("image_size", "vocab_size")}
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]))
    settings = VqaSettings(
        tokenizer=str(tmp_path),
        image_size=config["image_size"],
        model={**sizes, "vocab_size": config["vocab_size"]},
    )
    started, lacking = find_task("vqa").start(tmp_path / "captioner", settings)
    taken = captioner.state_dict()
    assert {key.split(".")[0] for key in lacking} == {"text_encoder"}
    for key, value in started.state_dict().items():
        assert key in lacking or torch.equal(value, taken[key]), key


def test_starting_from_a_folder_without_a_common_tower_is_refused(tmp_path: Path) -> None:
    upop.save(torch.nn.Linear(2, 2), tmp_path / "other")
    with pytest.raises(CheckpointError, match="task with published checkpoints"):
        start_from("nlvr", tmp_path / "other" / "model.safetensors", nlvr(), any_towers=True)


def test_twins_become_single_cross_attentions(tmp_path: Path) -> None:
    source = nlvr(merge_from=0).eval()
    for layer in source.text_encoder.encoder.layer:
        layer.crossattention.output.dense1.weight.data.zero_()  # only the first image says anything
    torch.save({"model": source.state_dict()}, tmp_path / "nlvr.pth")
    sizes = source.config.model_dump(exclude={"merge_from"})
    model = BlipVqa(VqaConfig(**sizes)).to(torch.float32).eval()
    lacking = start_from("vqa", tmp_path / "nlvr.pth", model, any_towers=True)
    assert {key.split(".")[0] for key in lacking} == {"text_decoder"}
    images, ids = torch.randn(4, 3, sizes["image_size"], sizes["image_size"]), torch.randint(5, 50, (2, 7))
    expected = source.float().encode(images, ids, torch.ones_like(ids))[1]
    found = model.encode(images[:2], ids, torch.ones_like(ids))[1]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
