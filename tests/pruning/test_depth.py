"""A branch of which nothing is left: what is cut computes what is masked, its bias stays, and files keep it."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

import upop
from pruning.families import Split, randomise
from upop.errors import VerificationError
from upop.pruning.filled import without_empty
from upop.pruning.masks import Masks

SIZES: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 30}
ENDS = {"bos_token_id": 0, "eos_token_id": 1}
WORDS = torch.arange(2, 10).view(2, 4)


def vit() -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=24, depth=2, num_heads=3)


def bert() -> nn.Module:
    return BertModel(BertConfig(**SIZES, intermediate_size=24))


def llama() -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(**SIZES, **ENDS, num_key_value_heads=2, intermediate_size=24))


def opt() -> nn.Module:
    sizes = {"word_embed_proj_dim": 16, "ffn_dim": 24, "max_position_embeddings": 32}
    return OPTForCausalLM(OPTConfig(**SIZES, **ENDS, **sizes))


IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def outputs(model: nn.Module) -> Tensor:
    inputs = IMAGES if "patch_embed.proj.weight" in dict(model.named_parameters()) else WORDS
    with torch.no_grad():
        found = model(inputs.to(next(model.parameters()).dtype) if inputs is IMAGES else inputs)
    return found if isinstance(found, Tensor) else found[0]


def masked(model: nn.Module, plan: dict[str, list[int]]) -> Tensor:
    masks = Masks(model, upop.find_groups(model))
    for name, kept in plan.items():
        value = torch.zeros_like(masks.values[name])
        value[kept] = 1
        masks.set({name: value})
    found = outputs(model)
    masks.remove()
    return found


@pytest.mark.parametrize("build", [vit, bert, llama, opt])
def test_branches_go_whole_and_what_is_left_is_exact_in_files_too(
    build: Callable[[], nn.Module], tmp_path: Path
) -> None:
    model = build().eval().double()
    randomise(model)
    groups = upop.find_groups(model)
    # the attention of the first layer, the MLP of the second, and a part of another one
    plan = {groups[0].name: [], groups[-1].name: [], groups[1].name: [0, 2]}
    expected = masked(model, plan)
    upop.shrink(model, plan)
    torch.testing.assert_close(outputs(model), expected)
    assert [group.size for group in upop.find_groups(model)] == [0, 2, groups[2].size, 0]
    assert not any(tensor.numel() for part in groups[0].slices for tensor in [_weight(model, part)] if tensor.dim() > 1)
    assert upop.Plan.from_json(upop.Plan.of(groups, plan).to_json())[groups[0].name] == ()
    again = upop.load(upop.save(model, tmp_path / "saved"))
    assert torch.equal(outputs(again.double()), outputs(model))
    assert torch.equal(outputs(copy.deepcopy(model)), outputs(model))
    assert torch.equal(outputs(pickle.loads(pickle.dumps(model))), outputs(model))
    if isinstance(model, BertModel):
        model.save_pretrained(tmp_path / "plain")
        plain = BertModel.from_pretrained(tmp_path / "plain", dtype=torch.float64).eval()
        assert torch.equal(outputs(plain), outputs(model))


@pytest.mark.parametrize("build", [vit, bert, llama, opt])
def test_a_channel_of_zeros_computes_what_no_channel_does_for_runtimes_without_empty_tensors(
    build: Callable[[], nn.Module],
) -> None:
    model = build().eval().double()
    randomise(model)
    groups = upop.find_groups(model)
    upop.shrink(model, {groups[0].name: [], groups[-1].name: []})
    filled = without_empty(model, upop.find_groups(model))
    torch.testing.assert_close(outputs(filled), outputs(model))
    assert [group.size for group in upop.find_groups(filled)] == [1, groups[1].size, groups[2].size, 1]
    assert all(parameter.numel() for parameter in filled.parameters())
    assert without_empty(filled, upop.find_groups(filled)) is filled


@pytest.mark.slow
@pytest.mark.parametrize("format", ["onnx", "openvino", "torch-export"])
def test_a_model_with_empty_branches_is_exported(format: Any, tmp_path: Path) -> None:
    model = vit().eval()
    randomise(model)
    groups = upop.find_groups(model)
    upop.shrink(model, {groups[0].name: [], groups[-1].name: []})
    upop.export(copy.deepcopy(model), tmp_path / "out", format)  # which compares the two


def _weight(model: nn.Module, part: upop.Slice) -> Tensor:
    return model.get_parameter(part.tensor)


@pytest.mark.parametrize("build", [llama, opt])
def test_a_decoder_without_its_first_attention_counts_its_tokens_in_the_cache(build: Callable[[], Any]) -> None:
    model = build().eval()
    randomise(model)
    upop.shrink(model, {upop.find_groups(model)[0].name: []})
    given: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "min_new_tokens": 5}
    # one token after the other, and all of them anew for each
    found = [model.generate(WORDS, use_cache=cached, **given) for cached in (True, False)]
    assert torch.equal(*found)


def test_an_empty_branch_trains_on_and_is_no_part_of_another_search() -> None:
    model = vit()
    groups = upop.find_groups(model)
    upop.shrink(model, {groups[0].name: [], groups[1].name: []})
    bias = model.blocks[0].mlp.fc2.bias
    model(IMAGES).square().mean().backward()
    assert bias.grad is not None
    assert bias.grad.abs().max() > 0
    pruner = upop.Pruner(model, 0.5, 1)
    assert [group.name for group in pruner.groups] == [group.name for group in groups[2:]]
    pruner.step()
    pruner.shrink()
    assert [group.size for group in upop.find_groups(model)][:2] == [0, 0]


def test_torchs_attention_without_channels_gives_weights_and_its_bias() -> None:
    model, tokens = nn.MultiheadAttention(16, 4, batch_first=True).eval(), torch.randn(2, 5, 16)
    nn.init.normal_(model.out_proj.bias)
    (group,) = upop.find_groups(model, (tokens, tokens, tokens))
    upop.shrink(model, {group.name: []})
    for each in (model, copy.deepcopy(model)):
        found, weights = each(tokens, tokens, tokens)
        torch.testing.assert_close(found, model.out_proj.bias.expand_as(found))
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 5))


def test_an_attention_that_cannot_run_empty_is_left_whole() -> None:
    model, tokens = Split(), torch.randn(2, 5, 16)
    (group,) = upop.find_groups(model, tokens)
    with pytest.raises(VerificationError, match=r"masks.*cut"):
        upop.shrink(model, {group.name: []})
    assert model(tokens).shape == tokens.shape
    assert (type(model), model.size, tuple(model.qkv.weight.shape)) == (Split, 16, (48, 16))
