"""Every family of models that the method must hold for: one row each, tiny, with random biases and norms.

Zero biases, group norms and equal kept sizes hide mistakes of surgery, so nothing here has them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.func import functional_call
from transformers import CLIPConfig, CLIPModel

import upop
from upop.models.caption import BlipCaption, CaptionConfig
from upop.models.nlvr import BlipNlvr, NlvrConfig
from upop.models.segmenter import Segmenter, SegmenterConfig
from upop.models.vqa import BlipVqa, VqaConfig

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Family:
    """One row: how to build a tiny model and a batch for it."""

    name: str
    make: Callable[[], nn.Module]
    batch: Callable[[int, torch.Generator], Inputs]

    def build(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        model = self.make()
        randomise(model, seed)
        return model.to(dtype)

    def inputs(self, size: int = 2, dtype: torch.dtype = torch.float64, seed: int = 0) -> Inputs:
        batch = self.batch(size, torch.Generator().manual_seed(seed))
        return {name: value.to(dtype) if value.is_floating_point() else value for name, value in batch.items()}


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 0) -> None:
    """Give every parameter random values that keep signals at their size; no bias is 0, no norm is 1.

    What is not trained (tables of sines) stays: libraries compute it again when they load a model.
    """
    generator = torch.Generator().manual_seed(seed)
    for parameter in (each for each in model.parameters() if each.requires_grad):
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() < 2:
            parameter.add_(0.3 * noise)
        else:
            parameter.copy_(noise / math.sqrt(parameter[0].numel()))
    for name, buffer in model.named_buffers():  # norms that a library freezes, of which some begin at 0
        if name.rpartition(".")[2] in ("weight", "bias") and buffer.is_floating_point() and buffer.dim() == 1:
            buffer.add_(0.3 * torch.randn(buffer.shape, generator=generator))


def loss_of(outputs: Any) -> Tensor:
    """Return a smooth loss that weighs every sample alike and every output channel differently."""
    if isinstance(outputs, tuple | list):
        return torch.stack([loss_of(part) for part in outputs]).sum()
    flat = outputs.flatten(1)
    ramp = torch.linspace(-1, 1, flat.shape[1], dtype=flat.dtype)
    return F.softplus(flat * ramp + 0.3 * flat.square()).sum(1).mean()


def rows_of(inputs: Inputs, size: int, rows: slice) -> Inputs:
    """Return some samples of a batch of `size`; NLVR's images come as all first, then all second ones."""
    return {name: torch.cat([part[rows] for part in value.split(size)]) for name, value in inputs.items()}


def outputs_of(model: nn.Module, inputs: Inputs) -> Tensor:
    with torch.no_grad():
        outputs = model(**inputs)
    return torch.cat([part.flatten() for part in outputs]) if isinstance(outputs, tuple) else outputs.flatten()


def difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-300))


def uneven_plan(groups: Sequence[upop.Group], seed: int = 0) -> dict[str, list[int]]:
    """Return random channels to keep: a single one in some groups, all in others, any number in the rest."""
    generator = torch.Generator().manual_seed(seed)
    plan = {}
    for number, group in enumerate(groups):
        count = int(torch.randint(1, group.size + 1, (), generator=generator))
        count = {0: 1, 3: group.size}.get((number + seed) % 5, count)
        plan[group.name] = sorted(torch.randperm(group.size, generator=generator)[:count].tolist())
    return plan


def random_masks(groups: Sequence[upop.Group], seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        group.name: 0.05 + 0.9 * torch.rand(group.size, generator=generator, dtype=torch.float64) for group in groups
    }


def still_pruner(model: nn.Module, masks: dict[str, Tensor] | None = None, **settings: Any) -> upop.Pruner:
    """Return a pruner that only collects scores, with the masks set to given values."""
    pruner = upop.Pruner(model, 0.5, 1000, 1000, progress="soft", update_first_step=False, **settings)
    if masks is not None:
        pruner.load_state_dict({**pruner.state_dict(), "masks": masks})
    return pruner


def finished_pruner(
    model: nn.Module, inputs: Inputs, ratio: float = 0.5, steps: int = 2, **settings: Any
) -> upop.Pruner:
    pruner = upop.Pruner(model, ratio, steps, 1, **settings)
    for _ in range(steps):
        model.zero_grad()
        loss_of(model(**inputs)).backward()
        pruner.step()
    return pruner


def reader_and_inputs(model: nn.Module, batch: Inputs, name: str) -> tuple[Tensor, Tensor]:
    """Return the inputs of a layer with a 1 behind each, and its outputs."""
    seen: list[tuple[Tensor, Tensor]] = []
    layer = model.get_submodule(name)
    hook = layer.register_forward_hook(lambda _, args, output: seen.append((args[0], output)))
    with torch.no_grad():
        model.eval()(**batch)
    hook.remove()
    inputs, outputs = (value.flatten(0, -2) for value in seen[0])
    return torch.cat([inputs, inputs.new_ones(len(inputs), 1)], 1), outputs


def scaled_parameters(
    model: nn.Module, groups: Sequence[upop.Group], masks: dict[str, Tensor], weights: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Return the weights with each produced row multiplied by its mask channel, written out on its own.

    In every family here the rows of a projection are whole runs over the group's channels, one after the other.
    """
    scaled = dict(weights)
    for group in groups:
        for part in group.producers:
            weight = scaled[part.tensor]
            rows = masks[group.name].repeat(weight.shape[0] // group.size)
            scaled[part.tensor] = weight * (rows.unsqueeze(1) if weight.dim() > 1 else rows)
    return scaled


def masked_outputs(model: nn.Module, groups: Sequence[upop.Group], masks: dict[str, Tensor], inputs: Inputs) -> Tensor:
    """Return what the plain model computes with masked weights."""
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    same = {name: mask.to(next(iter(weights.values())).dtype) for name, mask in masks.items()}
    with torch.no_grad():
        outputs = functional_call(model, scaled_parameters(model, groups, same, weights), (), inputs)
    return torch.cat([part.flatten() for part in outputs]) if isinstance(outputs, tuple) else outputs.flatten()


def binary(groups: Sequence[upop.Group], plan: dict[str, list[int]]) -> dict[str, Tensor]:
    masks = {}
    for group in groups:
        masks[group.name] = torch.zeros(group.size, dtype=torch.float64)
        masks[group.name][plan[group.name]] = 1
    return masks


def _eager(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    return model


def _vit(**settings: Any) -> nn.Module:
    tiny = {
        "img_size": 16,
        "patch_size": 8,
        "embed_dim": 24,
        "depth": 2,
        "num_heads": 3,
        "mlp_ratio": 2,
        "num_classes": 5,
    }
    return VisionTransformer(**{**tiny, **settings})


def _deit() -> nn.Module:
    return VisionTransformerDistilled(
        img_size=16, patch_size=8, embed_dim=24, depth=2, num_heads=3, mlp_ratio=2, num_classes=5
    )


# Two towers that differ in all: width, depth, heads, MLP.
BLIP_SIZES: dict[str, Any] = {
    "image_size": 16,
    "patch_size": 8,
    "vision_width": 24,
    "vision_depth": 3,
    "vision_heads": 3,
    "vision_mlp": 40,
    "text_width": 32,
    "text_depth": 2,
    "text_heads": 4,
    "text_mlp": 56,
    "vocab_size": 60,
    "max_positions": 12,
    "dropout": 0.0,
    "drop_path": 0.0,
}


def nlvr(**settings: Any) -> nn.Module:
    """Layer 0 averages, layer 1 merges."""
    return BlipNlvr(NlvrConfig(**{**BLIP_SIZES, "merge_from": 1, **settings}))


def _vqa() -> nn.Module:
    """Three towers; the decoder's word embedding is its output layer."""
    return BlipVqa(VqaConfig(**{**BLIP_SIZES, "vision_depth": 1}))


def _caption() -> nn.Module:
    """Its decoder's word embedding is its output layer too."""
    return BlipCaption(CaptionConfig(**BLIP_SIZES))


def _segmenter(**settings: Any) -> nn.Module:
    """Encoder and decoder differ in all, and images are no multiple of the patch."""
    sizes = {name: value for name, value in BLIP_SIZES.items() if name.startswith(("vision", "image", "patch", "drop"))}
    decoder = {"decoder_width": 32, "decoder_depth": 2, "decoder_heads": 4, "decoder_mlp": 56, "decoder_dropout": 0.0}
    return Segmenter(SegmenterConfig(**{**sizes, **decoder, "classes": 5, "encoder_classes": 0, **settings}))


class _Clip(nn.Module):
    """transformers' CLIP, towers that differ in all; features of both, with the temperature on one of them."""

    __module__ = "transformers"  # read without a batch, as models of libraries are

    def __init__(self) -> None:
        super().__init__()
        vision = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 40}
        text = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 56}
        vision |= {"image_size": 16, "patch_size": 8}
        text |= {"vocab_size": 60, "max_position_embeddings": 12, "bos_token_id": 58, "eos_token_id": 59}
        self.clip = CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=20))

    def forward(self, images: Tensor, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        found = self.clip(pixel_values=images, input_ids=input_ids)
        return found.image_embeds * self.clip.logit_scale.exp(), found.text_embeds


def _captioned(size: int, generator: torch.Generator) -> Inputs:
    ids = torch.randint(1, 58, (size, 7), generator=generator)
    ids[:, 0], ids[::2, 6], ids[1::2, 4] = 58, 59, 59
    return {"images": torch.randn(size, 3, 16, 16, generator=generator), "input_ids": ids}


def _images(size: int, generator: torch.Generator) -> Inputs:
    return {"x": torch.randn(size, 3, 16, 16, generator=generator)}


def _scenes(size: int, generator: torch.Generator) -> Inputs:
    return {"images": torch.randn(size, 3, 18, 13, generator=generator)}


def _pairs(size: int, generator: torch.Generator, images: int = 2) -> Inputs:
    mask = torch.ones(size, 7, dtype=torch.long)
    mask[::2, 5:] = 0
    return {
        "images": torch.randn(images * size, 3, 16, 16, generator=generator),
        "input_ids": torch.randint(1, 58, (size, 7), generator=generator),
        "attention_mask": mask,
    }


def _questions(size: int, generator: torch.Generator) -> Inputs:
    """Questions with two answers each, some of both padded."""
    answers, mask = torch.ones(2 * size, 4, dtype=torch.long), torch.ones(size, 7, dtype=torch.long)
    answers[::3, 3:], mask[::2, 5:] = 0, 0
    return {
        "images": torch.randn(size, 3, 16, 16, generator=generator),
        "question_ids": torch.randint(1, 58, (size, 7), generator=generator),
        "question_mask": mask,
        "answer_ids": torch.randint(1, 58, (2 * size, 4), generator=generator),
        "answer_mask": answers,
        "answer_counts": torch.full((size,), 2),
    }


FAMILIES = [
    Family("vit-fused", _vit, _images),
    Family("vit-eager", lambda: _eager(_vit()), _images),
    Family("vit-no-bias", lambda: _vit(embed_dim=16, num_heads=2, depth=3, qkv_bias=False), _images),
    Family(
        "vit-registers",
        lambda: _vit(init_values=0.5, reg_tokens=2, global_pool="avg", pre_norm=True),
        _images,
    ),
    Family("deit-distilled", _deit, _images),
    Family(
        "deit-by-name",
        lambda: timm.create_model("deit_tiny_patch16_224", img_size=16, depth=1, embed_dim=48, num_classes=3),
        _images,
    ),
    Family("nlvr", nlvr, _pairs),
    Family("nlvr-merged-eager", lambda: _eager(nlvr(merge_from=0, vision_depth=1, text_depth=2)), _pairs),
    Family("segmenter", _segmenter, _scenes),
    Family("segmenter-linear", lambda: _segmenter(decoder="linear"), _scenes),
    Family("clip", _Clip, _captioned),
    Family("vqa", _vqa, _questions),
    Family("caption", _caption, lambda size, generator: _pairs(size, generator, images=1)),
    Family("nlvr-averaged", lambda: nlvr(merge_from=9, vision_depth=1, text_depth=2, text_width=16), _pairs),
]
BY_NAME = {family.name: family for family in FAMILIES}
VIT, NLVR = BY_NAME["vit-fused"], BY_NAME["nlvr"]


class Split(nn.Module):
    """Takes queries, keys and values apart by a size, which names no number of parts where it is 0."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out, self.size = nn.Linear(16, 48), nn.Linear(16, 16), 16

    def forward(self, tokens: Tensor) -> Tensor:
        query, key, value = self.qkv(tokens).split(self.size, dim=-1)
        attention = (query @ key.transpose(-1, -2) / max(1, self.size) ** 0.5).softmax(-1)
        found: Tensor = tokens + self.out(attention @ value)
        return found
