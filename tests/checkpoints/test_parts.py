"""Modules of a model that was cut are saved and loaded by themselves, as the model is whose modules were cut."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from torch import Tensor, nn

import upop
from pruning.families import randomise, uneven_plan
from upop.errors import LayoutError

IDS = torch.arange(21).view(3, 7) % 60
TEXT: dict[str, Any] = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 56, "vocab_size": 60}
SIZES = {**TEXT, "num_hidden_layers": 1}


class Classifier(nn.Module):
    """A class of one's own around a model of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.bert = transformers.BertModel(transformers.BertConfig(**SIZES))
        self.head = nn.Linear(32, 3)

    def forward(self, ids: Tensor) -> Tensor:
        states: Tensor = self.bert(ids).last_hidden_state
        return self.head(states.mean(1))  # type: ignore[no-any-return]


class Outer(nn.Module):
    """A module around a module around a model."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Classifier()

    def forward(self, ids: Tensor) -> Tensor:
        return self.net(ids)  # type: ignore[no-any-return]


def made(build: Callable[[], nn.Module]) -> Any:
    torch.manual_seed(0)
    model = build().eval()
    randomise(model)
    return model


def cut(model: nn.Module, seed: int, **settings: Any) -> None:
    upop.shrink(model, uneven_plan(upop.find_groups(model, **settings), seed), verify=False)


def read_back(module: nn.Module, folder: Path, build: Callable[[], nn.Module] | None = None) -> Any:
    """Return what the folder of a module loads as; into a fresh dense one, where it is of one's own class."""
    upop.save(module, folder, overwrite=True)
    return (upop.load(folder) if build is None else upop.load_into(build(), folder)).eval()


@torch.no_grad()
def check(outer: Any, folder: Path) -> None:
    """Compare the modules of `outer` that are no mere pieces with what is read back."""
    net, bert = outer.net, outer.net.bert
    states = bert(IDS).last_hidden_state
    assert torch.equal(read_back(bert, folder / "bert")(IDS).last_hidden_state, states)
    dense = transformers.BertModel(transformers.BertConfig(**SIZES))
    assert torch.equal(read_back(bert, folder / "bert", lambda: dense)(IDS).last_hidden_state, states)
    assert torch.equal(read_back(net, folder / "net", Classifier)(IDS), net(IDS))


def test_a_part_is_saved_by_itself_and_in_the_whole_after_one_cut_and_after_two(tmp_path: Path) -> None:
    outer = made(Outer)
    cut(outer, 1)
    heads = {layer.attention.self.attention_head_size for layer in outer.net.bert.encoder.layer}
    assert heads != {8}
    check(outer, tmp_path / "once")
    cut(outer, 2)
    check(copy.deepcopy(outer), tmp_path / "twice")


def test_a_part_and_the_whole_may_be_cut_in_any_order(tmp_path: Path) -> None:
    outer = made(Outer)
    cut(outer.net.bert, 1)
    check(outer, tmp_path / "part")
    cut(outer, 2)
    cut(outer.net.bert, 4)
    check(outer, tmp_path / "again")
    loaded = upop.load(tmp_path / "again" / "bert")
    other = made(Outer)
    other.net.bert = loaded
    check(other, tmp_path / "put in")


def test_what_holds_only_a_piece_of_a_group_is_refused(tmp_path: Path) -> None:
    outer = made(Outer)
    whole = [*range(8)]
    upop.shrink(outer, {"net.bert.encoder.layer.0.attention.self": whole[2:]}, verify=False)
    layer = outer.net.bert.encoder.layer[0]
    with pytest.raises(LayoutError, match=r"group net\.bert.*Save.*net\.bert\.encoder\."):
        upop.save(layer.attention.self, tmp_path / "piece")
    assert not (tmp_path / "piece").exists()
    hidden = torch.randn(2, 5, 32)
    again = read_back(layer.attention, tmp_path / "attention", lambda: Classifier().bert.encoder.layer[0].attention)
    with torch.no_grad():
        assert torch.equal(again(hidden)[0], layer.attention(hidden)[0])
    upop.save(layer.output, tmp_path / "untouched")


def test_a_model_of_timm_in_a_module_of_ones_own(tmp_path: Path) -> None:
    def trunk() -> nn.Module:
        return timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=5, embed_dim=48, num_heads=3)

    images = torch.randn(2, 3, 32, 32)
    model = made(lambda: nn.Sequential(trunk(), nn.Linear(5, 2)))
    cut(model, 1, example=images)
    cut(model, 2)
    with torch.no_grad():
        expected = model[0](images)
        assert torch.equal(read_back(model[0], tmp_path / "trunk")(images), expected)
        assert torch.equal(read_back(model[0], tmp_path / "trunk", trunk)(images), expected)


def test_a_part_that_merges_tokens_says_that_its_folder_does_not(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 48, "num_heads": 3}
    model = nn.Sequential(made(lambda: timm.create_model("vit_tiny_patch16_224", **sizes)), nn.Identity())
    upop.merge_tokens(model, 2, example=torch.randn(1, 3, 32, 32))
    with pytest.warns(UserWarning, match="VisionTransformer .*merges tokens"):
        upop.save(model[0], tmp_path / "trunk")
