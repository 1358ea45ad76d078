"""What a folder from outside may make happen: nothing is fetched, nobody is asked, no code of it runs, nothing is read
that lies elsewhere."""

from __future__ import annotations

import builtins
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

import upop
from upop.checkpoints.convert import read_model
from upop.errors import CheckpointError

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
VISION = {**SIZES, "image_size": 16, "patch_size": 8}


@pytest.fixture(autouse=True)
def _nothing_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The machine is online as far as the libraries know, and a person would agree to everything."""
    asked: list[str] = []

    def refuse(*what: Any, **_options: Any) -> Any:
        asked.append(f"network: {what[1:]}")
        raise OSError("no network")

    def agree(prompt: str = "") -> str:
        asked.append(prompt)
        return "y"

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(builtins, "input", agree)
    yield
    assert not asked
    assert not hasattr(builtins, "upop_test_ran")


def evil(place: Path, **config: Any) -> Path:
    """Write a folder of transformers whose own code, if it ran, would leave a trace."""
    place.mkdir()
    code = {"AutoConfig": "code.C", "AutoModel": "code.M", "AutoModelForCausalLM": "code.M"}
    (place / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": code, **config}))
    (place / "code.py").write_text(
        "import builtins\nbuiltins.upop_test_ran = True\nfrom transformers import PretrainedConfig as C\n"
    )
    return place


def edited(folder: Path, name: str, change: Callable[[dict[str, Any]], Any]) -> Path:
    content = json.loads((folder / name).read_text())
    change(content)
    (folder / name).write_text(json.dumps(content))
    return folder


def of_transformers(place: Path, model: Any = None) -> Path:
    if model is None:
        model = transformers.ViTForImageClassification(transformers.ViTConfig(**VISION))
    model.save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def of_open_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    open_clip = pytest.importorskip("open_clip")
    vision = {"image_size": 16, "patch_size": 8, "width": 16, "layers": 1, "head_width": 8}
    text = {"context_length": 6, "vocab_size": 40, "width": 16, "heads": 2, "layers": 1}
    return upop.save(open_clip.model.CustomTextCLIP(8, vision, text), tmp_path_factory.mktemp("clip") / "m")


TOWERS: dict[str, Callable[[Path], Mapping[str, Mapping[str, Any]]]] = {
    "a text tower in another folder": lambda place: {"text_cfg": {"hf_model_name": str(evil(place))}},
    "a text tower of the hub": lambda _place: {"text_cfg": {"hf_model_name": "owner/name", "hf_proj_type": "mlp"}},
    "pretrained text": lambda _place: {"text_cfg": {"hf_model_pretrained": True}},
    "a tokenizer": lambda _place: {"text_cfg": {"hf_tokenizer_name": "owner/name"}},
    "a configuration with code": lambda place: {
        "text_cfg": {"hf_config": json.loads((evil(place, model_type="bert") / "config.json").read_text())}
    },
    "an unknown configuration": lambda _place: {"text_cfg": {"hf_config": {"model_type": "evil"}}},
    "a vision tower of the hub": lambda _place: {"vision_cfg": {"timm_model_name": "hf-hub:owner/name"}},
    "a vision tower in another folder": lambda place: {"vision_cfg": {"timm_model_name": f"local-dir:{evil(place)}"}},
    "pretrained vision": lambda _place: {"vision_cfg": {"timm_model_name": "test_vit", "timm_model_pretrained": True}},
}


@pytest.mark.parametrize("what", TOWERS)
def test_towers_of_open_clip(what: str, of_open_clip: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(of_open_clip, tmp_path / "m"))
    changes = TOWERS[what](tmp_path / "evil")

    def change(described: dict[str, Any]) -> None:
        for tower, values in changes.items():
            described["open_clip"]["arguments"][tower].update(values)

    with pytest.raises(CheckpointError, match=r"upop\.json|open_clip"):
        upop.load(edited(folder, "upop.json", change))


def test_code_that_a_configuration_names_is_passed_over(tmp_path: Path) -> None:
    folder = of_transformers(tmp_path / "m")
    state = {name: value.clone() for name, value in upop.load(folder).state_dict().items()}
    shutil.copy(evil(tmp_path / "evil") / "code.py", folder)
    code = {"AutoConfig": f"{tmp_path / 'evil'}--code.C", "AutoModelForImageClassification": "code.M"}
    edited(folder, "config.json", lambda described: described.update(auto_map=code, _name_or_path="owner/name"))
    (folder / "custom_generate").mkdir()
    shutil.copy(folder / "code.py", folder / "custom_generate" / "generate.py")
    again = upop.load(folder).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in state.items())
    with pytest.raises(CheckpointError, match="does not have"):
        upop.load(
            edited(folder, "config.json", lambda described: described.update(architectures=["Evil"], model_type="evil"))
        )


def test_code_in_a_part_of_a_configuration_is_passed_over(tmp_path: Path) -> None:
    text = transformers.LlamaConfig(**SIZES, vocab_size=40)
    vision = transformers.CLIPVisionConfig(**VISION)
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=39)
    folder = of_transformers(tmp_path / "m", transformers.LlavaForConditionalGeneration(config))
    shutil.copy(evil(tmp_path / "evil") / "code.py", folder)
    code = {"AutoModel": "code.M", "AutoConfig": "code.C", "AutoModelForCausalLM": f"{tmp_path / 'evil'}--code.M"}
    for part in ("text_config", "vision_config"):
        edited(folder, "config.json", lambda described, part=part: described[part].update(auto_map=code))  # type: ignore[misc]
    assert type(upop.load(folder)).__name__ == "LlavaForConditionalGeneration"


def timm_wrapper() -> Any:
    config = transformers.TimmWrapperConfig(architecture="test_vit", num_labels=3, model_args={"depth": 1})
    return transformers.TimmWrapperForImageClassification(config)


ELSEWHERE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a model of the hub": lambda described: described.update(architecture="hf-hub:owner/name"),
    "a model in a folder": lambda described: described.update(architecture="local-dir:/somewhere"),
    "a backbone of the hub": lambda described: described.update(backbone="owner/name"),
    "a backbone further in": lambda described: described.update(backbone_config={"backbone": "hf-hub:owner/name"}),
    "a file of weights": lambda described: described["model_args"].update(checkpoint_path="/somewhere/x.pth"),
    "pretrained weights": lambda described: described["model_args"].update(pretrained=True),
    "settings with a place": lambda described: described["model_args"].update(
        pretrained_cfg={"file": "/somewhere/x.pth"}
    ),
    "settings over settings": lambda described: described["model_args"].update(
        pretrained_cfg_overlay={"hf_hub_id": "a/b"}
    ),
    "a part that is quantized": lambda described: described.update(
        more={"quantization_config": {"quant_method": "gptq"}}
    ),
    "a quantization that is a list": lambda described: described.update(quantization_config=[1]),
    "other weights": lambda described: described.update(transformers_weights="adapter_model.bin"),
}


@pytest.mark.parametrize("what", ELSEWHERE)
def test_backbones_and_weights_of_other_places(what: str, tmp_path: Path) -> None:
    folder = of_transformers(tmp_path / "m", timm_wrapper())
    assert upop.load(folder).config.architecture == "test_vit"  # type: ignore[union-attr]
    with pytest.raises(CheckpointError, match=r"config\.json"):
        upop.load(edited(folder, "config.json", ELSEWHERE[what]))


def test_no_kernels_are_fetched_for_attention(tmp_path: Path) -> None:
    folder = of_transformers(tmp_path / "m")
    names = {"attn_implementation": "owner/kernel", "_attn_implementation": "owner/kernel"}
    assert "/" not in str(upop.load(edited(folder, "config.json", lambda described: described.update(names))).config)  # type: ignore[union-attr]


def sharded(place: Path) -> Path:
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**VISION))
    model.save_pretrained(place, max_shard_size="4KB")
    return place


INDICES: dict[str, Callable[[Path, Path], Any]] = {
    "a shard of another folder": lambda folder, other: _point(folder, f"../{other.name}/model.safetensors"),
    "a shard by its whole path": lambda folder, other: _point(folder, str(other / "model.safetensors")),
    "a shard in a folder within": lambda folder, other: _point(folder, "within/model.safetensors"),
    "a pickle": lambda folder, other: _point(folder, "pytorch_model.bin"),
    "a shard that is missing": lambda folder, other: _point(folder, "gone.safetensors"),
    "a number": lambda folder, other: _point(folder, 5),
    "a linked shard": lambda folder, other: _link(folder, other / "model.safetensors"),
    "no names": lambda folder, other: edited(
        folder, "model.safetensors.index.json", lambda described: described.clear()
    ),
}


def _point(folder: Path, name: Any) -> None:
    def change(index: dict[str, Any]) -> None:
        index["weight_map"][next(iter(index["weight_map"]))] = name

    edited(folder, "model.safetensors.index.json", change)


def _link(folder: Path, target: Path) -> None:
    first = min(folder.glob("*.safetensors"))
    first.unlink()
    first.symlink_to(target)


@pytest.mark.parametrize("what", INDICES)
def test_indices_stay_inside_the_folder(what: str, tmp_path: Path) -> None:
    folder, other = sharded(tmp_path / "m"), of_transformers(tmp_path / "other")
    assert len(list(folder.glob("*.safetensors"))) > 2
    assert type(upop.load(folder)).__name__ == "ViTForImageClassification"
    INDICES[what](folder, other)
    with pytest.raises(CheckpointError, match=r"index\.json|lacks gone|is a link to"):
        upop.load(folder)


def test_the_hubs_own_copies_are_links(tmp_path: Path) -> None:
    copies = tmp_path / "models--owner--name"
    place = of_transformers(tmp_path / "m")
    (copies / "blobs").mkdir(parents=True)
    (copies / "snapshots").mkdir()
    folder = Path(shutil.move(place, copies / "snapshots" / "0123"))
    blob = Path(shutil.move(folder / "model.safetensors", copies / "blobs" / "abc"))
    (folder / "model.safetensors").symlink_to(blob)
    assert type(upop.load(folder)).__name__ == "ViTForImageClassification"


def test_adapters_and_parts_of_processes_are_refused(tmp_path: Path) -> None:
    folder = of_transformers(tmp_path / "m")
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/name", "peft_type": "LORA"}')
    with pytest.raises(CheckpointError, match="holds an adapter"):
        upop.load(folder)
    (folder / "adapter_config.json").unlink()
    shutil.copy(folder / "model.safetensors", folder / "shard-00000-model-00001-of-00001.safetensors")
    with pytest.raises(CheckpointError, match="one part per process"):
        upop.load(folder)


def test_pickles_are_not_read_in_the_place_of_safetensors(tmp_path: Path) -> None:
    folder = of_transformers(tmp_path / "m")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    for read in (upop.load, read_model):
        with pytest.raises(CheckpointError, match=r"no model\.safetensors"):
            read(folder)


def test_a_path_is_never_a_name_of_the_hub() -> None:
    with pytest.raises(CheckpointError, match="nothing was found there"):
        upop.load(Path("owner/name"))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 4)


def test_a_device_is_no_file_of_weights(tmp_path: Path) -> None:
    folder = upop.save(Net(), tmp_path / "m")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("/dev/zero")
    with pytest.raises(CheckpointError, match=r"holds no model\.safetensors"):
        upop.load_into(Net(), folder)


def test_a_pipe_beside_the_weights_is_not_waited_for(tmp_path: Path) -> None:
    folder = upop.save(Net(), tmp_path / "m")
    os.mkfifo(folder / "more.safetensors")
    (folder / "endless.safetensors").symlink_to("/dev/zero")
    assert type(upop.load_into(Net(), folder)) is Net


@pytest.mark.parametrize("library", ["timm", "open_clip"])
def test_pickles_in_folders_for_the_hub_are_not_opened(library: str, tmp_path: Path) -> None:
    if library == "timm":
        name, described = "config.json", {"architecture": "vit_tiny_patch16_224", "pretrained_cfg": {}}
    else:
        name, described = "open_clip_config.json", {"model_cfg": {"embed_dim": 8, "vision_cfg": {}, "text_cfg": {}}}
    (tmp_path / name).write_text(json.dumps(described))
    torch.save(Net().state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"holds no .*model\.safetensors, .*pickles.*pytorch_model\.bin"):
        upop.load(tmp_path)
