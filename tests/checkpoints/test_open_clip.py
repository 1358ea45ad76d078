"""open_clip's models: `upop.load` builds them from what their modules told, and only where that gives the very same."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import upop
from pruning.families import randomise, uneven_plan
from tiers import mostly_slow
from together import run_script
from upop.errors import CheckpointError

open_clip = pytest.importorskip("open_clip")

VISION = {"image_size": 32, "patch_size": 8, "width": 24, "layers": 2, "head_width": 8}
TEXT = {"context_length": 7, "vocab_size": 99, "width": 24, "heads": 3, "layers": 2}
SIGLIP = {"no_causal_mask": True, "proj_bias": True, "pool_type": "last", "norm_kwargs": {"eps": 1e-6}}
POOLED = {"attentional_pool": True, "attn_pooler_queries": 5, "attn_pooler_heads": 4, "ls_init_value": 0.1}


def clip(vision: dict[str, Any] = {}, text: dict[str, Any] = {}, **settings: Any) -> nn.Module:  # noqa: B006
    return open_clip.model.CLIP(16, {**VISION, **vision}, {**TEXT, **text}, **settings)  # type: ignore[no-any-return]


def custom(vision: dict[str, Any] = {}, text: dict[str, Any] = {}, **settings: Any) -> nn.Module:  # noqa: B006
    return open_clip.model.CustomTextCLIP(16, {**VISION, **vision}, {**TEXT, **text}, **settings)  # type: ignore[no-any-return]


def of_timm(**vision: Any) -> dict[str, Any]:
    return {"timm_model_name": "test_vit3", "image_size": 160, **vision}


def inputs(model: Any) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    size = model.visual.image_size
    size = size if isinstance(size, tuple) else (size, size)
    return torch.randn(2, 3, *size, generator=generator), torch.randint(5, 90, (2, 7), generator=generator)


def outputs(model: nn.Module, given: tuple[Tensor, ...]) -> Tensor:
    with torch.no_grad():
        found = model.eval()(*given)
    return torch.cat([part.flatten() for part in (found.values() if isinstance(found, dict) else found)])


def compressed(build: Callable[..., nn.Module], *towers: dict[str, Any], **settings: Any) -> nn.Module:
    torch.manual_seed(0)
    model = build(*towers, **settings).eval()
    randomise(model)
    return upop.shrink(model, uneven_plan(upop.find_groups(model), 2), verify=inputs(model))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "CLIP": lambda: compressed(clip),
    "quick": lambda: compressed(clip, quick_gelu=True),
    "wider MLPs": lambda: compressed(clip, {"mlp_ratio": 3.1}, {"mlp_ratio": 5.0}),
    "mixed precision": lambda: compressed(clip, cast_dtype=torch.bfloat16),
    "no square": lambda: compressed(clip, {"image_size": (32, 16), "patch_dropout": 0.5}, {"pool_type": "eos"}),
    "fixed positions": lambda: compressed(clip, {"pos_embed_type": "sin_cos_2d"}),
    "blocks of its own": lambda: compressed(clip, {"qk_norm": True, "scale_fc": True}, {"scale_heads": True}),
    "ResNet": lambda: compressed(clip, {"layers": [1, 1, 1, 1], "width": 16, "head_width": 16}),
    "CustomTextCLIP": lambda: compressed(custom),
    "SigLIP": lambda: compressed(custom, {"pool_type": "avg", "no_ln_pre": True}, SIGLIP, init_logit_bias=-10.0),
    "pooled": lambda: compressed(custom, POOLED, {"embed_cls": True}, output_dict=True, nonscalar_logit_scale=True),
    "timm": lambda: compressed(custom, of_timm(timm_pool="map", timm_proj="none"), {"width": 16, "heads": 2}),
    "timm, convolutions": lambda: compressed(custom, of_timm(timm_model_name="test_convnext", timm_pool="")),
    "timm, projected": lambda: compressed(clip, of_timm(timm_pool="map", timm_proj="mlp", timm_proj_bias=True)),
}


@pytest.mark.parametrize("name", mostly_slow(MODELS, "CLIP"))
def test_it_comes_back_by_itself(name: str, tmp_path: Path) -> None:
    model = MODELS[name]()
    folder = upop.save(model, tmp_path / "out")
    again = upop.load(folder)
    assert type(again) is type(model)
    assert torch.equal(outputs(again, inputs(model)), outputs(model, inputs(model)))
    sizes = [[group.size for group in upop.find_groups(each)] for each in (again, model)]
    assert sizes[0] == sizes[1]
    # What it was cut to is known too, so it can be saved again.
    saved = json.loads((upop.save(again, tmp_path / "again") / "upop.json").read_text())
    assert saved["plan"] == json.loads((folder / "upop.json").read_text())["plan"]
    assert saved["open_clip"] == json.loads((folder / "upop.json").read_text())["open_clip"]


def test_a_text_tower_of_transformers(tmp_path: Path) -> None:
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40}
    config = transformers.XLMRobertaConfig(**sizes, vocab_size=99, max_position_embeddings=40)
    config.save_pretrained(tmp_path / "config")
    tower = {"hf_model_name": str(tmp_path / "config"), "hf_model_pretrained": False, "hf_proj_type": "mlp"}
    model = compressed(custom, {}, tower)
    folder = upop.save(model, tmp_path / "out")
    (tmp_path / "config" / "config.json").unlink()  # it is not asked for again
    assert torch.equal(outputs(upop.load(folder), inputs(model)), outputs(model, inputs(model)))


def test_a_dense_model_and_its_images_preparation(tmp_path: Path) -> None:
    model = clip().to(torch.bfloat16)
    prepare = {"size": 32, "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.2, 0.2), "interpolation": "bicubic"}
    open_clip.model.set_model_preprocess_cfg(model, prepare)  # as open_clip.create_model does
    again: Any = upop.load(upop.save(model, tmp_path / "out"))
    assert {parameter.dtype for parameter in again.parameters()} == {torch.bfloat16}
    assert again.visual.preprocess_cfg == json.loads(json.dumps(prepare))
    assert again.visual.image_mean == [0.5, 0.4, 0.3]
    image, words = inputs(model)
    given = image.bfloat16(), words
    assert torch.equal(outputs(again, given), outputs(model, given))


FRESH = """
import sys, torch, upop
model = upop.load(sys.argv[1])
given = torch.load(sys.argv[2])
with torch.no_grad():
    torch.save(model(*given["inputs"]), sys.argv[3])
"""


def test_in_a_fresh_process(tmp_path: Path) -> None:
    model = MODELS["SigLIP"]()
    folder, given = upop.save(model, tmp_path / "out"), inputs(model)
    torch.save({"inputs": given}, tmp_path / "in.pt")
    (tmp_path / "fresh.py").write_text(FRESH)
    run_script(tmp_path / "fresh.py", folder, tmp_path / "in.pt", tmp_path / "out.pt", processes=1)
    found = torch.cat([part.flatten() for part in torch.load(tmp_path / "out.pt")])
    torch.testing.assert_close(found, outputs(model, given))


def changed_mask(model: Any) -> None:
    model.attn_mask = torch.zeros_like(model.attn_mask)


def changed_norm(model: Any) -> None:
    model.ln_final.eps = 0.1


def changed_activation(model: Any) -> None:
    model.transformer.resblocks[1].mlp.gelu = nn.ReLU()


def other_projection(model: Any) -> None:
    model.visual.conv1 = nn.Conv2d(3, 24, 8, 8, bias=True)


@pytest.mark.parametrize(
    "change",
    mostly_slow([changed_mask, changed_norm, changed_activation, other_projection], changed_mask, changed_norm),
)
def test_where_its_modules_do_not_say_all_the_dense_model_is_asked_for(
    change: Callable[[Any], None], tmp_path: Path
) -> None:
    dense = clip().eval()
    change(dense)
    folder = upop.save(dense, tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"holds a open_clip\.model\.CLIP.*upop\.load_into"):
        upop.load(folder)
    other = clip()
    change(other)
    given = inputs(dense)
    assert torch.equal(outputs(upop.load_into(other, folder), given), outputs(dense, given))


def _edited(folder: Path, **changes: Any) -> Path:
    description = json.loads((folder / "upop.json").read_text())
    description["open_clip"].update(changes)
    (folder / "upop.json").write_text(json.dumps(description))
    return folder


def test_bad_descriptions_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = upop.save(clip(), tmp_path / "out")
    arguments = json.loads((folder / "upop.json").read_text())["open_clip"]["arguments"]
    with pytest.raises(CheckpointError, match=r"holds open_clip's 'CoCa'.*Update upop"):
        upop.load(_edited(folder, **{"class": "CoCa"}))
    with pytest.raises(CheckpointError, match=r"open_clip\.arguments\.depth: Extra inputs.*found 3"):
        upop.load(_edited(folder, **{"class": "CLIP", "arguments": {**arguments, "depth": 3}}))
    with pytest.raises(CheckpointError, match="cannot build CLIP as described"):
        upop.load(_edited(folder, arguments={**arguments, "vision_cfg": {**arguments["vision_cfg"], "patch_size": 0}}))
    _edited(folder, arguments=arguments)
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(CheckpointError, match="not installed here: pip install open_clip_torch"):
        upop.load(folder)
