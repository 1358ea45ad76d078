"""Cross tokens in BLIP: they lead the merging, learn from the other modality, and stay with the model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import runs
import upop
from tiers import mostly_slow
from upop.checkpoints.convert import write_model
from upop.errors import CheckpointError, SettingError
from upop.models.blip_cross import add_cross_tokens, crossing
from upop.models.caption import BlipCaption, CaptionConfig
from upop.runs.verbs import compress, evaluate_checkpoint
from upop.settings import read_settings
from upop.tasks import find_task
from upop.tokens.encoders import removed_tokens


def captioner(*, cross: bool = True) -> Any:
    torch.manual_seed(0)
    sizes = {"image_size": 32, "patch_size": 8, "vision_width": 16, "vision_depth": 2, "vision_heads": 2}
    text = {"vision_mlp": 32, "text_width": 24, "text_depth": 3, "text_heads": 2, "text_mlp": 32, "vocab_size": 40}
    model = BlipCaption(CaptionConfig(**sizes, **text, max_positions=16, dropout=0.0))
    if cross:
        add_cross_tokens(model)
    return upop.merge_tokens(model, [3, 2]).train()


def batch() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(1, 38, (2, 6))
    return {"images": torch.randn(2, 3, 32, 32), "input_ids": ids, "attention_mask": torch.ones_like(ids)}


def test_cross_tokens_go_along_behind_the_others_and_lead_what_is_merged() -> None:
    model = captioner()
    # 17 tokens of the image and the cross token, of which 3 and 2 go.
    assert model.visual_encoder(batch()["images"]).shape[1] == 13
    plain = model.visual_encoder(batch()["images"])
    with torch.no_grad():
        for layer in model.visual_encoder.blocks:
            layer.cross_token.normal_(std=5.0)
    led = model.visual_encoder(batch()["images"])
    assert not torch.allclose(led[:, 0], plain[:, 0])
    model.visual_encoder(batch()["images"])[:, 0, 0].sum().backward()
    assert model.visual_encoder.blocks[0].cross_token.grad.any()


def test_a_copy_of_a_cut_model_with_cross_tokens_is_saved(tmp_path: Path) -> None:
    model = captioner().eval()
    attention = "visual_encoder.blocks.0.attn"
    (size,) = {group.size for group in upop.find_groups(model) if group.name == attention}
    upop.shrink(model, {attention: range(size // 2)})
    upop.save(copy.deepcopy(model), tmp_path / "copy")
    with torch.no_grad():
        torch.testing.assert_close(upop.load(tmp_path / "copy").eval()(**batch()), model(**batch()))


def test_what_can_be_cut_does_not_depend_on_merging() -> None:
    """Cross tokens match by the keys of all heads at once, which ties their dimensions, but only there."""
    led = {(each.name, each.channel, each.size, each.heads) for each in upop.find_groups(captioner())}
    assert led == {
        (each.name, each.channel, each.size, each.heads) for each in upop.find_groups(captioner(cross=False))
    }
    assert ("visual_encoder.blocks.0.attn", "dimension", 8, 2) in led


def test_the_loss_of_cross_tokens_teaches_them_and_nothing_else() -> None:
    model = captioner()
    with crossing(model) as found:
        model(**batch())
    assert [tuple(each.shape) for each in found.images] == [(2, 16)] * 2
    assert [tuple(each.cross.shape) for each in found.texts] == [(2, 24)] * 3
    loss = found.loss()
    assert loss is not None
    loss.backward()
    learn = {name for name, each in model.named_parameters() if each.grad is not None and each.grad.any()}
    assert learn == {name for name, _ in model.named_parameters() if name.endswith("cross_token")}
    before = loss.item()
    torch.optim.SGD((each for each in model.parameters() if each.grad is not None), 0.5).step()
    with crossing(model) as found:
        model(**batch())
    after = found.loss()
    assert after is not None
    assert after.item() < before


@pytest.mark.parametrize("name", mostly_slow(["caption", "nlvr", "retrieval", "vqa"], "caption"))
def test_a_task_learns_cross_tokens_and_keeps_them(name: str, tmp_path: Path) -> None:
    task = find_task(name)
    model = {**runs.TINY[name]["model"], "patch_size": 8}
    config = runs.make_task(name, tmp_path, model=model, examples=0, epochs=2)

    def settings(**given: Any) -> Any:
        return read_settings(task.settings, config, given)

    out = settings(tokens=[3, 2], cross=1.0, init_lr=1e-3, target="macs=0.6", output_dir=tmp_path / "out")
    results = compress(task, out)
    assert results is not None
    best = upop.load(tmp_path / "out" / "best")
    assert removed_tokens(best) == [[3, 2]]
    crosses = {key: value for key, value in best.state_dict().items() if key.endswith("cross_token")}
    assert {key.split(".")[0].removesuffix("_m") for key in crosses} >= {"visual_encoder"}
    assert all(value.any() for value in crosses.values())
    again = evaluate_checkpoint(task, settings(pretrained=str(tmp_path / "out" / "best"), output_dir=tmp_path / "b"))
    assert again is not None
    assert (again.models[0].gmacs, again.models[0].metrics) == (results.models[1].gmacs, results.models[1].metrics)


@pytest.mark.parametrize("more", [{}, {"tokens": 2, "width": True, "target": "params=0.5"}])
def test_cross_tokens_lead_a_merging(more: dict[str, Any]) -> None:
    with pytest.raises(SettingError, match=r"cross=1 leads the merging of tokens.*give tokens, without width"):
        read_settings(find_task("nlvr").settings, None, {"cross": 1.0, **more})


@pytest.mark.parametrize("name", ["model.pth", "folder"])
def test_forms_without_a_place_for_cross_tokens_are_refused(name: str, tmp_path: Path) -> None:
    form: Any = "official" if name.endswith(".pth") else "hugging-face"
    with pytest.raises(CheckpointError, match=r"cross tokens.*BlipCaption"):
        write_model(captioner().eval(), tmp_path / name, form)
    assert not (tmp_path / name).exists()
