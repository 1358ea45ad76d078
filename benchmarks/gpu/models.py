"""The models of the GPU report: of libraries alone, with random weights, at full size or small enough for a CPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, CLIPConfig, CLIPModel, LlamaConfig, LlamaForCausalLM

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Model:
    """One architecture.

    Attributes:
        name: what tables call it.
        build: makes it, on the CPU in float32.
        inputs: number of samples -> keyword arguments of a forward pass.
        labels: how many classes its first output has; 0 where it is not trained here.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int], Batch]
    labels: int = 0

    def batch(self, samples: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Batch:
        """Return so many samples on a device, images in `dtype`."""
        made = self.inputs(samples)
        return {name: value.to(device, dtype if value.is_floating_point() else None) for name, value in made.items()}


class _Logits(nn.Module):
    """A causal language model that gives its logits alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=input_ids, use_cache=False).logits
        return logits


class _Pair(nn.Module):
    """CLIP's two towers, as they are deployed."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        found: Any = self.model(pixel_values=pixel_values, input_ids=input_ids)
        return found.image_embeds, found.text_embeds


def models(small: bool) -> dict[str, Model]:
    """Return the architectures by name: a vision transformer, a pair of towers, an encoder and a decoder of texts.

    Args:
        small: two layers of width 32 to 48, for a run on a CPU.
    """
    vit: dict[str, Any] = {}
    decoder: dict[str, Any]
    seen: dict[str, Any]
    read: dict[str, Any]
    if small:
        vit = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 10}
        texts: dict[str, Any] = {
            "hidden_size": 48,
            "num_attention_heads": 3,
            "num_hidden_layers": 2,
            "intermediate_size": 96,
        }
        side, classes, length, vocabulary = 32, 10, 12, 100
        bert, decoder = BertConfig(**texts, vocab_size=vocabulary), {**texts, "num_key_value_heads": 3, "head_dim": 16}
        tower = {**texts, "projection_dim": 32}
        seen, read = {**tower, "image_size": 32, "patch_size": 8}, {**tower, "vocab_size": vocabulary}
    else:
        side, classes, length, vocabulary = 224, 1000, 77, 32000
        bert = BertConfig(vocab_size=vocabulary)
        decoder = {"hidden_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 8, "num_hidden_layers": 12}
        decoder |= {"intermediate_size": 4096}
        seen = {"hidden_size": 768, "num_attention_heads": 12, "num_hidden_layers": 12, "intermediate_size": 3072}
        seen |= {"image_size": 224, "patch_size": 16}
        read = {"hidden_size": 512, "num_attention_heads": 8, "num_hidden_layers": 12, "intermediate_size": 2048}
        read |= {"vocab_size": vocabulary}
    llama = LlamaConfig(**decoder, vocab_size=vocabulary)
    clip = CLIPConfig(text_config=read, vision_config=seen, projection_dim=seen.get("projection_dim", 512))

    def image(samples: int) -> Tensor:
        return torch.randn(samples, 3, side, side)

    def text(samples: int) -> Tensor:
        return torch.randint(10, vocabulary - 1, (samples, length))

    return {
        model.name: model
        for model in (
            Model(
                "DeiT-S",
                lambda: timm.create_model("deit_small_patch16_224", **vit),
                lambda samples: {"x": image(samples)},
                classes,
            ),
            Model(
                "CLIP B/16",
                lambda: _Pair(CLIPModel(clip)),
                lambda samples: {"pixel_values": image(samples), "input_ids": text(samples)},
            ),
            Model("BERT", lambda: BertModel(bert), lambda samples: {"input_ids": text(samples)}),
            Model(
                "Llama, 8 of 16 key-value heads",
                lambda: _Logits(LlamaForCausalLM(llama)),
                lambda samples: {"input_ids": text(samples)},
            ),
        )
    }
