"""The residual stream of a tower as a group: masked norms are the cut ones; search, files and teachers follow."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from torch import Tensor, nn

import upop
import upop.checkpoints.configs.uniform_sizes
from tiers import mostly_slow
from upop.checkpoints.loading import load_named
from upop.errors import CheckpointError, LayoutError, SettingError
from upop.pruning.axes.proof import Precise
from upop.pruning.costs import call
from upop.pruning.groups import Group
from upop.pruning.masks import Masks
from upop.pruning.verify import tensors_of
from upop.tokens.encoders import removed_tokens

IMAGES = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
WORDS = torch.arange(36).view(3, 12) % 30
TEXT = {"input_ids": WORDS, "attention_mask": (torch.arange(12) < torch.tensor([[12], [9], [5]])).long()}
WIDE: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 3}
BLOCKS: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 40}


def vit() -> Any:
    sizes: dict[str, Any] = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
    return timm.create_model("vit_tiny_patch16_224", **sizes, init_values=0.5, num_classes=3)


def bert() -> Any:
    config = transformers.BertConfig(vocab_size=30, hidden_size=24, max_position_embeddings=16, **BLOCKS)
    return transformers.BertForSequenceClassification(config)


def llama() -> Any:
    special: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 1, "tie_word_embeddings": True}
    heads: dict[str, Any] = {"num_key_value_heads": 1, "head_dim": 12}
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(vocab_size=400, hidden_size=24, **BLOCKS, **heads, **special)
    )


def clip() -> Any:
    text: dict[str, Any] = {
        "hidden_size": 24,
        "vocab_size": 30,
        "max_position_embeddings": 16,
        "eos_token_id": 29,
        "bos_token_id": 28,
    }
    vision: dict[str, Any] = {"hidden_size": 20, "image_size": 16, "patch_size": 8}
    towers: dict[str, Any] = {"text_config": {**BLOCKS, **text}, "vision_config": {**BLOCKS, **vision}}
    return transformers.CLIPModel(transformers.CLIPConfig(**towers, projection_dim=8))


CASES: dict[str, tuple[Callable[[], Any], Any]] = {
    "vit": (vit, {"x": IMAGES}),
    "bert": (bert, TEXT),
    "llama": (llama, TEXT),
    "clip": (clip, {**TEXT, "pixel_values": IMAGES}),
}


def streams(model: nn.Module) -> list[Group]:
    return [group for group in upop.find_groups(model, width=True) if group.kind == "residual"]


def varied(model: Any) -> Any:
    """Give a model weights that no initialisation has: norms and biases of their own."""
    draws = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=draws))
    return model


def logits(model: nn.Module, inputs: Any) -> Tensor:
    precise = next(model.parameters()).dtype == torch.float64  # many norms compute in float32 whatever the weights are
    with torch.no_grad(), Precise(torch.float64) if precise else nullcontext():
        found = call(model.eval(), inputs)
    return next(value for _, value in tensors_of(found))


class Kept(nn.Module):
    """A norm over some of its channels, written out; it gives 0 for the others."""

    def __init__(self, norm: Any, kept: list[int]) -> None:
        super().__init__()
        self.weight, self.bias = norm.weight, getattr(norm, "bias", None)
        self.eps = getattr(norm, "eps", getattr(norm, "variance_epsilon", 0.0))
        self.mask = torch.zeros(len(norm.weight), dtype=torch.float64)
        self.mask[kept] = 1

    def forward(self, x: Tensor) -> Any:
        count = self.mask.sum()
        mean = 0.0 if self.bias is None else (x * self.mask).sum(-1, keepdim=True) / count  # else an RMS norm
        spread = ((x - mean).square() * self.mask).sum(-1, keepdim=True) / count
        found = (x - mean) / (spread + self.eps).sqrt() * self.weight
        return (found if self.bias is None else found + self.bias) * self.mask


@pytest.mark.parametrize("name", mostly_slow(["vit", "bert", "llama", "clip"], "vit", "llama"))
def test_a_cut_stream_computes_what_norms_over_the_kept_channels_give(name: str) -> None:
    build, inputs = CASES[name]
    model = varied(build()).double().eval()
    inputs = {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}
    found = streams(model)
    assert all(group.proved and group.norms for group in found)
    assert len(found) == (2 if name == "clip" else 1)
    plan = {group.name: sorted(torch.randperm(group.size)[: group.size * 2 // 3].tolist()) for group in found}
    dense = logits(model, inputs)

    written_out = copy.deepcopy(model)  # all that a channel is read by: norms, and weights
    for group in found:
        norms = [(norm, written_out.get_submodule(norm)) for norm in group.norms]
        for path, norm in norms:
            written_out.set_submodule(path, Kept(norm, plan[group.name]))
        gone = [channel for channel in range(group.size) if channel not in plan[group.name]]
        with torch.no_grad():
            for part in group.slices:
                if part.reads and part.tensor not in ("lm_head.weight", "model.embed_tokens.weight"):
                    written_out.get_parameter(part.tensor)[:, gone] = 0
    expected = logits(written_out, inputs)
    assert not torch.allclose(expected, dense, rtol=1e-3, atol=1e-3)

    masks = Masks(model, found)
    masks.set({group.name: torch.zeros(group.size).index_fill(0, torch.tensor(plan[group.name]), 1) for group in found})
    masked = logits(model, inputs)
    masks.remove()
    torch.testing.assert_close(logits(model, inputs), dense, rtol=0, atol=0)
    upop.shrink(model, plan, verify=inputs)
    torch.testing.assert_close(masked, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(logits(model, inputs), expected, rtol=1e-12, atol=1e-12)


def test_the_importance_of_a_channel_is_what_the_loss_would_change_if_nothing_read_it() -> None:
    model = varied(vit()).double().eval()
    (group,) = streams(model)
    model(IMAGES.double()).square().sum().backward()
    read = [
        part.reduce((weight.grad * weight).sum(0))
        for part in group.scored
        for weight in [model.get_parameter(part.tensor)]
    ]
    given = [
        norm.weight.grad * norm.weight + norm.bias.grad * norm.bias
        for norm in (model.get_submodule(path) for path in group.norms)
    ]
    torch.testing.assert_close(torch.stack(read).sum(0), torch.stack(given).sum(0))  # all is read through a norm


def searched(model: nn.Module, inputs: Any, target: Any, *, train: float = 1e-3, **given: Any) -> upop.Plan:
    pruner = upop.Pruner(model, target=target, steps=4, width=True, example=inputs, **given)
    optimizer = torch.optim.SGD(model.parameters(), train)
    for _ in range(4):
        optimizer.zero_grad()
        next(value for _, value in tensors_of(call(model.train(), inputs))).square().mean().backward()
        pruner.step()
        optimizer.step()
    plan = pruner.plan()
    pruner.shrink()  # masked and cut are compared in float64
    return plan


@pytest.mark.parametrize("name", mostly_slow(["vit", "llama"], "llama"))
def test_a_search_cuts_streams_with_branches_to_a_target_of_the_whole_model(name: str, tmp_path: Path) -> None:
    build, inputs = CASES[name]
    model = varied(build())
    dense, macs = upop.count_parameters(model), upop.count_macs(model, inputs)
    plan = searched(model, inputs, {"params": 0.35, "macs": 0.5}, depth=name == "vit")
    left = {kind: each["left"] / each["dense"] for kind, each in plan.settings["reached"].items()}
    assert left["params"] == upop.count_parameters(model) / dense
    assert left["params"] <= 0.35
    assert left["macs"] == upop.count_macs(model, inputs) / macs <= 0.5
    assert left["params"] > 0.32 or left["macs"] > 0.47  # a channel of so narrow a stream is 3 % of the model
    (stream,) = [name for name in plan if name.endswith("residual")]
    assert len(plan[stream]) < 24
    assert plan.settings["width"] is True
    upop.save(model, tmp_path / "cut", plan)
    torch.testing.assert_close(logits(upop.load(tmp_path / "cut"), inputs), logits(model, inputs), rtol=1e-6, atol=1e-6)


def test_tied_embeddings_stay_one_tensor_and_a_uniform_model_is_plain(tmp_path: Path) -> None:
    model = varied(llama())
    plan = searched(model, TEXT, {"params": 0.6}, uniform="tower")
    width = len(plan["model.residual"])
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert (model.lm_head.in_features, model.model.embed_tokens.embedding_dim) == (width, width)
    upop.save(model, tmp_path / "plain", plan)
    config = transformers.AutoConfig.from_pretrained(tmp_path / "plain")
    assert (config.hidden_size, config.head_dim, getattr(config, "quantization_config", None)) == (width, 12, None)
    plain = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "plain")
    torch.testing.assert_close(logits(plain, TEXT), logits(model, TEXT), rtol=1e-6, atol=1e-6)


def test_calibration_corrects_what_reads_a_stream() -> None:
    torch.manual_seed(0)
    model = varied(vit()).eval()
    batches = [torch.randn(8, 3, 16, 16) for _ in range(4)]
    dense, errors = logits(model, batches[0]), {}
    for correct in (True, False):
        cut = copy.deepcopy(model)
        plan = upop.calibrate(cut, batches, target={"params": 0.7135}, include="residual", width=True, correct=correct)
        assert list(plan) == ["residual"]
        errors[correct] = float((logits(cut, batches[0]) - dense).square().mean())
    assert errors[True] < errors[False]


def test_a_teacher_is_compared_on_the_channels_that_stay_and_the_optimizer_follows() -> None:
    torch.manual_seed(0)
    model = varied(vit())
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    with upop.Compression(model, target={"params": 0.5}, steps=4, search_steps=2, width=True) as compression:
        for _ in range(4):
            optimizer.zero_grad()
            loss = compression.loss(model(IMAGES).square().mean())
            assert compression.distillation is not None
            loss.backward()
            compression.step(optimizer)
    width = len(compression.plan()["residual"])
    assert width < 24
    assert optimizer.state[model.norm.weight]["exp_avg"].shape == (width,)


def test_what_upop_has_no_class_for_stays_the_model_of_its_library(tmp_path: Path) -> None:
    model = varied(clip()).eval()
    upop.shrink(model, {"vision_model.residual": range(15)})
    upop.save(model, tmp_path / "narrow")
    kept = load_named(tmp_path / "narrow", own=True)  # as exports read it
    torch.testing.assert_close(logits(kept, CASES["clip"][1]), logits(model, CASES["clip"][1]))
    with pytest.raises(CheckpointError, match=r"was cut with width=True: vision_model.residual"):
        upop.load_official("retrieval-clip", tmp_path / "narrow")


def test_a_stream_of_a_model_that_merges_tokens_is_cut() -> None:
    model, image = varied(timm.create_model("vit_tiny_patch16_224", **WIDE)).eval(), torch.randn(2, 3, 32, 32)
    upop.merge_tokens(model, vision=3)
    dense = logits(model, image)
    (group,) = streams(model)
    assert group.proved
    torch.testing.assert_close(logits(model, image), dense, rtol=0, atol=0)  # it merges on
    assert removed_tokens(model) == [[3, 3]]
    upop.shrink(model, {"residual": range(16)}, verify=image)
    assert removed_tokens(model) == [[3, 3]]


def test_without_width_streams_stay_whole() -> None:
    model = vit()
    assert streams(model)
    pruner = upop.Pruner(model, 0.5, 1)
    assert {group.kind for group in pruner.groups} == {"attention", "mlp"}
    pruner.remove()


class Block(nn.Module):
    """A stream to which one block adds."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(6, 64), norm
        self.up, self.down, self.head = nn.Linear(64, 128), nn.Linear(128, 64), nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Any:
        x = self.embed(x)
        return self.head(x + self.down(torch.relu(self.up(self.norm(x)))))


class Centred(nn.Module):
    """A norm that does more than to normalise: a layer lies in it."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(64, 64, bias=False)

    def forward(self, x: Tensor) -> Any:
        return self.mix(x - x.mean(-1, keepdim=True))


class Lasting(nn.Module):
    """A norm by the largest channel: without some of them it is another one."""

    def forward(self, x: Tensor) -> Tensor:
        return x / x.abs().amax(-1, keepdim=True)


@pytest.mark.parametrize(
    ("model", "inputs", "why"),
    [
        (lambda: Block(Centred()), torch.randn(5, 6), "norm normalises over it, but is not only a norm"),
        (lambda: Block(Lasting()), torch.randn(5, 6), "max is taken over it"),
        (lambda: transformers.BertModel(bert().config), TEXT, "it leaves the model"),
    ],
)
def test_what_forbids_a_stream_is_told(model: Callable[[], nn.Module], inputs: Any, why: str) -> None:
    with pytest.raises(LayoutError, match=f"no residual stream of .* can be cut .*{why}"):
        upop.Pruner(model(), target={"params": 0.9}, steps=1, example=inputs, width=True)


def test_a_stream_of_a_model_of_ones_own_is_cut() -> None:
    model = varied(Block(nn.RMSNorm(64, elementwise_affine=False)))
    plan = searched(model, {"x": torch.randn(5, 6)}, {"params": 0.6})
    assert len(plan["residual"]) < 64


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"ratio": 0.5, "width": True}, "Give a limit for the whole model: target"),
        ({"target": {"params": 0.5}, "width": True, "progress": "soft"}, "needs a search in stages"),
        ({"target": {"params": 0.5}, "width": 3}, "width is True"),
    ],
)
def test_settings_that_width_cannot_have(given: dict[str, Any], why: str) -> None:
    with pytest.raises(SettingError, match=why):
        upop.Pruner(vit(), steps=4, **given)
