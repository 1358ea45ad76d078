"""Writes folders as `upop.save` of the installed upop does, with inputs and outputs: `python older.py OUT NAME...`.

tests/checkpoints/data/older/ was made so by upop as it was before groups were read off what a model computes (commit
0c1d228), and by transformers 5.5.0 where a name ends in `_5_5`, else 5.24.0; without the model cards.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn

import upop
import upop.models

WORDS = torch.tensor([[1, 5, 9, 3, 2], [1, 7, 4, 8, 2]])
IMAGES = torch.linspace(-1, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16).sin()
TOKENS = torch.linspace(-1, 1, 2 * 5 * 16).view(2, 5, 16).cos()
TOWER = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
VISION = {**TOWER, "image_size": 16, "patch_size": 8}
TEXT = {**TOWER, "vocab_size": 12, "max_position_embeddings": 8}
ENDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
BLIP = {
    "image_size": 32,
    "vision_width": 8,
    "vision_depth": 1,
    "vision_heads": 2,
    "vision_mlp": 12,
    "text_width": 8,
    "text_depth": 2,
    "text_heads": 2,
    "text_mlp": 12,
    "vocab_size": 12,
    "max_positions": 8,
}
LLAMA = {**TEXT, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
DEIT = {"vision_width": 16, "vision_depth": 2, "vision_heads": 2, "vision_mlp": 24}
CLIP = {**BLIP, "image_size": 16, "text_depth": 1}


class Tower(nn.Module):
    """A model of one's own around one of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.body = transformers.ViTModel(transformers.ViTConfig(**VISION), add_pooling_layer=False)
        self.head = nn.Linear(16, 3)

    def forward(self, pixel_values: Tensor) -> Tensor:
        result: Tensor = self.head(self.body(pixel_values=pixel_values).last_hidden_state[:, 0])
        return result


def _encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def _clip() -> nn.Module:
    config = transformers.CLIPConfig(
        text_config={**TEXT, **ENDS}, vision_config={**VISION, "num_hidden_layers": 1}, projection_dim=8
    )
    return transformers.CLIPModel(config)


def _own(kind: str, **sizes: Any) -> nn.Module:
    build, config = upop.models.MODELS[kind]
    model: nn.Module = build(config(**sizes))
    return model


PIXELS = {"pixel_values": IMAGES}
IDS = {"input_ids": WORDS}
MODELS: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "timm_vit": (
        lambda: timm.create_model(
            "vit_tiny_patch16_224",
            img_size=16,
            patch_size=8,
            embed_dim=16,
            depth=2,
            num_heads=2,
            num_classes=3,
        ),
        {"x": IMAGES},
    ),
    "bert": (lambda: transformers.BertForSequenceClassification(transformers.BertConfig(**TEXT)), IDS),
    "vit_5_5": (lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**VISION)), PIXELS),
    "dinov2_5_5": (lambda: transformers.Dinov2Model(transformers.Dinov2Config(**VISION, mlp_ratio=2)), PIXELS),
    "clip_5_5": (_clip, {**IDS, **PIXELS}),
    "llama": (
        lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)),
        IDS,
    ),
    "torch_encoder": (_encoder, {"src": TOKENS}),
    "tower_5_5": (Tower, PIXELS),
    "blip_nlvr": (
        lambda: _own("blip-nlvr", **BLIP, merge_from=1),
        {"images": IMAGES.repeat(2, 1, 2, 2), "input_ids": WORDS, "attention_mask": torch.ones_like(WORDS)},
    ),
    "clip_retrieval": (
        lambda: _own("clip-retrieval", **CLIP, patch_size=8, embed_dim=8, queue_size=4),
        {"images": IMAGES, "input_ids": WORDS},
    ),
    "classifier": (
        lambda: _own("classifier", image_size=16, classes=3, patch_size=8, **DEIT),
        {"x": IMAGES},
    ),
}


def main() -> None:
    """Write the folders that are named, or all of this version of transformers."""
    out = Path(sys.argv[1])
    old = transformers.__version__.startswith("5.5")
    for name in sys.argv[2:] or [each for each in MODELS if each.endswith("_5_5") == old]:
        build, inputs = MODELS[name]
        torch.manual_seed(0)
        model = build().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.3)
        groups = upop.find_groups(model)
        kept = {group.name: range(0, group.size, 2) for group in groups if group.size > 1}
        kept = {each: channels for place, (each, channels) in enumerate(kept.items()) if place != 1}
        upop.shrink(model, kept, verify=inputs)
        upop.save(model, out / name)
        with torch.no_grad():
            answer = model(**inputs)
        answers = first_of(answer)
        given = {f"in.{key}": value.contiguous() for key, value in inputs.items()}
        save_file({**given, "out": answers.contiguous()}, out / f"{name}.safetensors")


def first_of(answer: Any) -> Tensor:
    """Return the first tensor of a model's outputs."""
    while not isinstance(answer, Tensor):
        answer = next(iter(answer.values() if isinstance(answer, dict) else answer))
    return answer


if __name__ == "__main__":
    main()
