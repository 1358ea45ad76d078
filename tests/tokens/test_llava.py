"""LLaVA with cross tokens: how many visual tokens it has, what its file may hold, and padding on the left."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from upop.errors import CheckpointError
from upop.models.llava import add_cross_tokens

NAMES = ("model.cross_text", "model.vision_tower.vision_tower.vision_model.encoder.cross_image")


def sized(vision: CLIPVisionConfig) -> LlavaForConditionalGeneration:
    torch.manual_seed(0)
    text = LlamaConfig(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, vocab_size=60)
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=59)
    ).eval()


def tiny() -> LlavaForConditionalGeneration:
    return sized(
        CLIPVisionConfig(
            image_size=32,
            patch_size=8,
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=4,
            intermediate_size=48,
        )
    )


def cross(layers: int = 3, width: int = 32) -> dict[str, Tensor]:
    torch.manual_seed(1)
    return dict(zip(NAMES, (torch.randn(1, 2, 24), torch.randn(1, layers, width)), strict=True))


def test_the_published_model_has_278_visual_tokens() -> None:
    with torch.device("meta"):
        model = sized(
            CLIPVisionConfig(
                image_size=336,
                patch_size=14,
                hidden_size=64,
                num_hidden_layers=24,
                num_attention_heads=4,
                intermediate_size=64,
            )
        )
        assert add_cross_tokens(model, cross(24, 64)) == 278
        features = model.model.get_image_features(torch.randn(1, 3, 336, 336), return_dict=True).pooler_output
    assert features[0].shape == (278, 24)


def test_it_generates_with_fewer_visual_tokens_and_padding_on_the_left_changes_nothing() -> None:
    model = tiny()
    count = add_cross_tokens(model, cross(), removed=3)
    assert count == model.config.image_seq_length == 11
    image = torch.randn(1, 3, 32, 32)
    ids = torch.tensor([[1, 7, *[59] * count, 8, 9]])
    wanted = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    said = model.generate(input_ids=ids, pixel_values=image, attention_mask=torch.ones_like(ids), **wanted)
    padded = torch.nn.functional.pad(ids, (4, 0))
    mask = torch.nn.functional.pad(torch.ones_like(ids), (4, 0))
    again = model.generate(input_ids=padded, pixel_values=image, attention_mask=mask, **wanted)
    assert said[0, -5:].tolist() == again[0, -5:].tolist()


def test_files_of_other_models_are_refused() -> None:
    with pytest.raises(CheckpointError, match="the model needs"):
        add_cross_tokens(tiny(), cross(width=16))
    with pytest.raises(CheckpointError, match=r"cross_tokens\.bin"):
        add_cross_tokens(tiny(), {"model.cross_text": torch.zeros(1, 2, 24)})
