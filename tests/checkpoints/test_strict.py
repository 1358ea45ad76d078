"""Weights that are missing, unexpected, of another shape, not finite or not those that were saved.

Descriptions that ask for more than there is, and values of other kinds in them.
"""

from __future__ import annotations

import json
import math
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

import upop
from upop.checkpoints.convert import read_model
from upop.checkpoints.inputs import stated_inputs
from upop.errors import CheckpointError
from upop.models.caption import BlipCaption, CaptionConfig

VISION = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "image_size": 16,
    "patch_size": 8,
}
BLIP = {
    "image_size": 32,
    "vision_width": 24,
    "vision_depth": 2,
    "vision_heads": 2,
    "vision_mlp": 40,
    "text_width": 24,
    "text_depth": 1,
    "text_heads": 2,
    "text_mlp": 32,
    "vocab_size": 60,
    "max_positions": 9,
}


def ours() -> nn.Module:
    return BlipCaption(CaptionConfig(**BLIP)).eval()


def of_timm() -> nn.Module:
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 4}
    return timm.create_model("vit_tiny_patch16_224", **sizes).eval()  # type: ignore[no-any-return]


def of_transformers() -> nn.Module:
    return transformers.ViTForImageClassification(transformers.ViTConfig(**VISION, num_labels=3)).eval()


def of_open_clip() -> nn.Module:
    open_clip = pytest.importorskip("open_clip")
    vision = {"image_size": 16, "patch_size": 8, "width": 16, "layers": 1, "head_width": 8}
    text = {"context_length": 6, "vocab_size": 40, "width": 16, "heads": 2, "layers": 1}
    return open_clip.model.CLIP(8, vision, text).eval()  # type: ignore[no-any-return]


MODELS: dict[str, Callable[[], nn.Module]] = {
    "ours": ours,
    "timm": of_timm,
    "transformers": of_transformers,
    "open_clip": of_open_clip,
}
State = dict[str, Tensor]


def first(state: State) -> str:
    """A matrix that no other name stands for."""
    parts = ("mlp", "intermediate")
    return next(name for name in sorted(state) if state[name].dim() == 2 and any(part in name for part in parts))


def _spoilt(number: float) -> Callable[[State], None]:
    def change(state: State) -> None:
        state[first(state)][1, 1] = number

    return change


def _shorter(state: State) -> None:
    norm = next(name for name in sorted(state) if state[name].dim() == 1 and ("norm" in name or "ln_" in name))
    state[norm] = state[norm][:-1].clone()


HARM: dict[str, tuple[Callable[[State], object], str]] = {
    "missing": (lambda state: state.pop(first(state)), r"missing \S*(mlp|intermediate)\S*weight"),
    "unexpected": (lambda state: state.update({"mlp.extra": torch.ones(3)}), r"unknown mlp\.extra"),
    "NaN": (_spoilt(math.nan), r"(mlp|intermediate)\S*weight holds numbers that are not finite"),
    "infinite": (_spoilt(-math.inf), r"(mlp|intermediate)\S*weight holds numbers that are not finite"),
    "kind": (
        lambda state: state.update({first(state): state[first(state)].int()}),
        r"(mlp|intermediate)\S*weight holds no floating-point",
    ),
    "shape": (_shorter, r"(norm|ln_)\S* has shape \(\d+,\), the model \(\d+,\)"),
}


def rewritten(folder: Path, change: Callable[[State], object]) -> Path:
    """Change the weights of a folder, and nothing that is said of them."""
    from safetensors import safe_open

    path = folder / "model.safetensors"
    with safe_open(path, framework="pt") as file:
        notes = file.metadata()
    state = {name: value.clone() for name, value in load_file(path).items()}
    change(state)
    save_file(state, path, metadata=notes)
    return folder


@pytest.mark.parametrize("harm", HARM)
@pytest.mark.parametrize("name", MODELS)
def test_what_does_not_fit_is_listed(name: str, harm: str, tmp_path: Path) -> None:
    model = MODELS[name]()
    change, message = HARM[harm]
    folder = rewritten(upop.save(model, tmp_path / "m"), change)
    with pytest.raises(CheckpointError, match=message):
        upop.load(folder)
    with pytest.raises(CheckpointError, match=message):
        upop.load_into(MODELS[name](), folder)


@pytest.mark.filterwarnings("ignore:.*not the file that was saved")
@pytest.mark.parametrize("harm", ["missing", "unexpected", "NaN"])
@pytest.mark.parametrize("name", MODELS)
def test_strict_false_warns_of_it(name: str, harm: str, tmp_path: Path) -> None:
    model = MODELS[name]()
    change, message = HARM[harm]
    folder = rewritten(upop.save(model, tmp_path / "m"), change)
    for load in (
        lambda: upop.load(folder, strict=False),
        lambda: upop.load_into(MODELS[name](), folder, strict=False),
    ):
        with pytest.warns(UserWarning, match=message):
            found = load().state_dict()
        whole = model.state_dict()
        same = [key for key, value in whole.items() if torch.equal(found[key], value)]
        assert list(found) == list(whole)
        assert len(whole) - 1 <= len(same) <= len(whole)
        assert harm == "NaN" or all(value.isfinite().all() for value in found.values())


@pytest.mark.parametrize("name", MODELS)
def test_weights_that_were_exchanged(name: str, tmp_path: Path) -> None:
    folder = rewritten(upop.save(MODELS[name](), tmp_path / "m"), lambda state: state[first(state)].mul_(2))
    for load in (upop.load, lambda place, **how: upop.load_into(MODELS[name](), place, **how)):
        with pytest.raises(CheckpointError, match="SHA-256"):
            load(folder)
        with pytest.warns(UserWarning, match="SHA-256"):
            load(folder, strict=False)


def test_a_folder_without_digests_loads(tmp_path: Path) -> None:
    folder = rewritten(upop.save(of_timm(), tmp_path / "m"), lambda state: state[first(state)].mul_(2))
    edited(folder, "upop.json", lambda described: described.pop("weights"))  # as upop 0.1.0 wrote it
    assert type(upop.load(folder)).__name__ == "VisionTransformer"


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 4)


class Other(Net):
    pass


class Same(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 4)


def test_another_class_than_the_folders(tmp_path: Path) -> None:
    folder = upop.save(Net(), tmp_path / "m")
    assert type(upop.load_into(Other(), folder)) is Other
    with pytest.raises(CheckpointError, match=r"a Same\. Build a Net"):
        upop.load_into(Same(), folder)
    with pytest.warns(UserWarning, match="loaded into a Same"):
        upop.load_into(Same(), folder, strict=False)


def edited(folder: Path, name: str, change: Callable[[dict[str, Any]], Any]) -> Path:
    content = json.loads((folder / name).read_text())
    change(content)
    (folder / name).write_text(json.dumps(content))
    return folder


def test_a_folder_of_transformers_as_another_class(tmp_path: Path) -> None:
    model: Any = of_transformers()
    model.save_pretrained(tmp_path)
    edited(tmp_path, "config.json", lambda described: described.update(architectures=["BertModel"]))
    with pytest.raises(CheckpointError, match=r"type 'vit', not a BertModel"):
        upop.load(tmp_path)
    edited(tmp_path, "config.json", lambda described: described.update(architectures=["ViTModel"]))
    with pytest.raises(CheckpointError, match=r"unknown classifier\.weight"):
        upop.load(tmp_path)


def test_incomplete_folders_of_transformers(tmp_path: Path) -> None:
    model: Any = of_transformers()
    model.save_pretrained(tmp_path)
    rewritten(tmp_path, lambda state: [state.pop(name) for name in list(state) if ".layer.0." in name])
    assert len(load_file(tmp_path / "model.safetensors")) < len(model.state_dict())
    for read in (upop.load, read_model, lambda path: upop.load_official("classification", path)):
        with pytest.raises(CheckpointError, match=r"missing vit\.layers\.0\."):
            read(tmp_path)


def test_weights_that_are_tied_need_not_be_there(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    for tied in (True, False):
        config = transformers.LlamaConfig(**sizes, vocab_size=40, tie_word_embeddings=tied)
        model = transformers.LlamaForCausalLM(config)
        model.save_pretrained(tmp_path / str(tied))
        assert ("lm_head.weight" in load_file(tmp_path / str(tied) / "model.safetensors")) != tied
        again: Any = upop.load(tmp_path / str(tied))
        assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied
    rewritten(tmp_path / "False", lambda state: state.pop("lm_head.weight"))
    with pytest.raises(CheckpointError, match=r"missing lm_head\.weight"):
        upop.load(tmp_path / "False")


def test_positions_that_older_versions_saved_may_be_there(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    model = transformers.BertForMaskedLM(transformers.BertConfig(**sizes, vocab_size=40))
    model.save_pretrained(tmp_path)
    positions = {"bert.embeddings.position_ids": torch.arange(512).unsqueeze(0)}
    again = upop.load(rewritten(tmp_path, lambda state: state.update(positions)))
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


def compressed(place: Path) -> tuple[Any, Path]:
    model: Any = of_transformers()
    # Layers of different sizes: where all are alike, it is an ordinary model, which transformers loads in its own way.
    kept = {group.name: range(group.size // 2 + at % 3) for at, group in enumerate(upop.find_groups(model))}
    upop.shrink(model, kept)
    model.save_pretrained(place)
    return model, place


def test_from_pretrained_of_a_compressed_model_wants_all_weights(tmp_path: Path) -> None:
    model, folder = compressed(tmp_path)
    kind: type[PreTrainedModel] = type(model)
    rewritten(folder, lambda state: state.pop("vit.encoder.layer.1.intermediate.dense.weight"))
    for load in (kind.from_pretrained, transformers.AutoModelForImageClassification.from_pretrained):
        with pytest.raises(CheckpointError, match=r"missing vit\.layers\.1\.mlp\.fc1\.weight"):
            load(folder)
    with pytest.raises(CheckpointError, match=r"missing layers\.1\.mlp\.fc1\.weight"):
        transformers.AutoModel.from_pretrained(folder)


def test_from_pretrained_of_another_class_may_start_a_head(tmp_path: Path) -> None:
    model, folder = compressed(tmp_path)
    transformers.AutoModel.from_pretrained(folder).save_pretrained(folder / "base")
    again: Any = transformers.ViTForImageClassification.from_pretrained(folder / "base")
    assert torch.equal(again.vit.layers[1].mlp.fc1.weight, model.vit.layers[1].mlp.fc1.weight)


# Sizes ---------------------------------------------------------------------------------------------------------------

HUGE: dict[str, tuple[Callable[[], nn.Module], str, Callable[[dict[str, Any]], Any]]] = {
    **{
        f"our {field} of {value}": (
            ours,
            "upop.json",
            lambda described, f=field, v=value: described["config"].update({f: v}),
        )
        for field, value in (
            ("image_size", 2**24),
            ("vision_width", 3 * 2**12),
            ("vocab_size", 2**24),
            ("vision_mlp", 2**24),
            ("vision_depth", 4096),
            ("text_depth", 4096),
        )
    },
    **{
        f"timm's {field} of {value}": (
            of_timm,
            "upop.json",
            lambda described, f=field, v=value: described["timm"]["arguments"].update({f: v}),
        )
        for field, value in (("depth", 4000), ("embed_dim", 2**20), ("img_size", 2**20), ("num_classes", 2**40))
    },
    **{
        f"open_clip's {tower} {field} of {value}": (
            of_open_clip,
            "upop.json",
            lambda described, t=tower, f=field, v=value: described["open_clip"]["arguments"][t].update({f: v}),
        )
        for tower, field, value in (
            ("text_cfg", "context_length", 2**24),
            ("text_cfg", "vocab_size", 2**40),
            ("vision_cfg", "layers", 4000),
            ("vision_cfg", "image_size", 2**20),
        )
    },
    "fixed positions of open_clip": (
        of_open_clip,
        "upop.json",
        lambda described: described["open_clip"]["arguments"]["vision_cfg"].update(
            image_size=2**20, pos_embed_type="sin_cos_2d"
        ),
    ),
    **{
        f"transformers' {field} of {value}": (
            of_transformers,
            "config.json",
            lambda described, f=field, v=value: described.update({f: v}),
        )
        for field, value in (
            ("num_hidden_layers", 4000),
            ("num_hidden_layers", 2**40),
            ("num_labels", 2**40),
            ("hidden_size", 2**20),
            ("intermediate_size", 2**30),
            ("image_size", 2**20),
            ("num_attention_heads", 2**40),
        )
    },
}


def of_tables() -> nn.Module:
    sizes = {"dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 24, "vocab_size": 40, "max_position_embeddings": 9}
    return transformers.DistilBertModel(transformers.DistilBertConfig(**sizes, sinusoidal_pos_embds=True))


HUGE["a table of positions"] = (
    of_tables,
    "config.json",
    lambda described: described.update(max_position_embeddings=2**40),
)


@pytest.mark.parametrize("what", HUGE)
def test_sizes_beyond_the_weights_are_refused_at_once(what: str, tmp_path: Path) -> None:
    build, name, change = HUGE[what]
    folder = edited(upop.save(build(), tmp_path / "m"), name, change)
    before, most = time.process_time(), _peak()
    with pytest.raises(CheckpointError):
        upop.load(folder)
    assert time.process_time() - before < 10
    assert _peak() - most < 300 * 2**10


def _peak() -> int:
    """KiB that this process has had in memory at most."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@pytest.mark.slow
def test_a_dense_model_far_larger_than_its_file_takes_no_memory(tmp_path: Path) -> None:
    model = BlipCaption(CaptionConfig(**{**BLIP, "vision_mlp": 3 * 2**20})).eval()  # 1.2 GB in two layers
    groups = {
        group.name: [5, 9] for group in upop.find_groups(model) if group.name.startswith("visual") and group.size > 99
    }
    folder = upop.save(upop.shrink(model, groups), tmp_path / "m")
    del model
    threads = torch.get_num_threads()
    before = torch.get_rng_state()
    again: Any = upop.load(folder)
    assert again.visual_encoder.blocks[0].mlp.fc1.weight.shape == (2, 24)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == threads


def test_published_files_that_claim_more_than_they_hold(tmp_path: Path) -> None:
    state = {name: value.clone() for name, value in ours().state_dict().items()}
    torch.save({"model": state}, tmp_path / "fine.pth")
    assert type(upop.load_official("caption", tmp_path / "fine.pth", vision_heads=2, text_heads=2)) is BlipCaption
    position = "visual_encoder.pos_embed"
    torch.save({"model": {**state, position: torch.zeros(1).expand(1, 2**20 + 1, 24)}}, tmp_path / "wide.pth")
    with pytest.raises(CheckpointError, match=r"pos_embed has shape .* .*holds.*numbers"):
        upop.load_official("caption", tmp_path / "wide.pth")
    torch.save({"model": {**state, "visual_encoder.blocks.4000.norm1.weight": torch.ones(24)}}, tmp_path / "deep.pth")
    with pytest.raises(CheckpointError, match=r"more than .* parts, and holds"):
        upop.load_official("caption", tmp_path / "deep.pth")
    packed = tmp_path / "packed.pth"
    with zipfile.ZipFile(tmp_path / "fine.pth") as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
        for record in old.infolist():
            new.writestr(record.filename, old.read(record))
    with pytest.raises(CheckpointError, match="is a compressed archive"):
        upop.load_official("caption", packed)


# Kinds of values -----------------------------------------------------------------------------------------------------

VALUES: list[Any] = [
    None,
    True,
    5,
    -1,
    2**70,
    10**200,
    0.5,
    math.nan,
    math.inf,
    "x",
    "a\x1b[2Jb\n",
    [],
    ["x"],
    [[[]]],
    {},
    {"a": 1},
]


def places(value: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """All places in a JSON value."""
    inside = value.items() if isinstance(value, dict) else enumerate(value[:1]) if isinstance(value, list) else ()
    return (
        [here, *(place for key, each in inside for place in places(each, (*here, key)))]
        if here
        else [place for key, each in inside for place in places(each, (key,))]
    )


def put(content: Any, place: tuple[Any, ...], value: Any) -> Any:
    content = json.loads(json.dumps(content))
    found = content
    for key in place[:-1]:
        found = found[key]
    found[place[-1]] = value
    return content


def _fuzz(folder: Path, name: str, every: int, load: Callable[[Path], object] = upop.load) -> list[str]:
    path = folder / name
    described = json.loads(path.read_text())
    raw, turn = [], 0
    for place in places(described):
        for value in VALUES:
            turn += 1
            if turn % every:
                continue
            path.write_text(json.dumps(put(described, place, value)))
            try:
                load(folder)
            except upop.errors.UPopError as error:
                assert len(str(error)) < 5000
            except BaseException as error:
                raw.append(f"{place} = {value!r}: {type(error).__name__}: {error}")
    path.write_text(json.dumps(described))
    return raw


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("every", [97, pytest.param(1, marks=pytest.mark.slow)])
def test_values_of_other_kinds_are_errors_of_ours(name: str, every: int, tmp_path: Path) -> None:
    model = MODELS[name]()
    upop.shrink(model, {group.name: range(1, group.size) for group in upop.find_groups(model)[:2] if group.size > 1})
    folder = upop.save(model, tmp_path / "m")
    assert _fuzz(folder, "upop.json", every) == []
    if name == "transformers":
        assert _fuzz(upop.save(model, tmp_path / "n"), "config.json", every) == []


def _of_timm_for_the_hub(place: Path) -> tuple[str, str]:
    place.mkdir()
    save_file(of_timm().state_dict(), place / "model.safetensors")
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
    images = {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": 0.9}
    described = {
        "architecture": "vit_tiny_patch16_224",
        "num_classes": 4,
        "model_args": sizes,
        "pretrained_cfg": images,
    }
    (place / "config.json").write_text(json.dumps(described))
    return "config.json", "classification"


def _of_open_clip_for_the_hub(place: Path) -> tuple[str, str]:
    place.mkdir()
    save_file(of_open_clip().state_dict(), place / "open_clip_model.safetensors")
    vision = {"image_size": 16, "patch_size": 8, "width": 16, "layers": 1, "head_width": 8}
    text = {"context_length": 6, "vocab_size": 40, "width": 16, "heads": 2, "layers": 1}
    model = {"embed_dim": 8, "quick_gelu": True, "vision_cfg": vision, "text_cfg": text}
    described = {"model_cfg": model, "preprocess_cfg": {"size": 16, "mean": [0.5] * 3, "std": [0.5] * 3}}
    (place / "open_clip_config.json").write_text(json.dumps(described))
    return "open_clip_config.json", "retrieval-clip"


def _of_transformers_for_the_hub(place: Path) -> tuple[str, str]:
    of_transformers().save_pretrained(place)  # type: ignore[operator]
    return "config.json", "classification"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("write", [_of_timm_for_the_hub, _of_open_clip_for_the_hub, _of_transformers_for_the_hub])
@pytest.mark.parametrize("every", [97, pytest.param(1, marks=pytest.mark.slow)])
def test_values_of_other_kinds_in_folders_of_the_hub(
    write: Callable[[Path], tuple[str, str]], every: int, tmp_path: Path
) -> None:
    name, task = write(tmp_path / "m")
    assert stated_inputs(tmp_path / "m").task == task
    assert isinstance(upop.load_official(task, tmp_path / "m"), nn.Module)
    for read in (stated_inputs, lambda place: upop.load_official(task, place)):
        assert _fuzz(tmp_path / "m", name, every, read) == []
