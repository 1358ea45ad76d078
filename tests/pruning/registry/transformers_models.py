"""transformers: towers, language models, and what joins them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from pruning.registry.architecture import Architecture, Inputs
from pruning.registry.tiny_configs import tiny_config


def _build(kind: str, head: str, **overrides: Any) -> nn.Module:
    config = tiny_config(kind, **overrides)
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"  # a kernel takes no float64, and sizes in multiples of 16 bytes alone
    model = getattr(transformers, head)
    result = model.from_config(config) if head.startswith("Auto") else model(config)
    assert isinstance(result, nn.Module)
    return result


def _words(generator: torch.Generator, length: int = 7) -> Tensor:
    return torch.randint(5, 90, (2, length), generator=generator)


def _image(generator: torch.Generator, size: int = 32) -> Tensor:
    return torch.randn(2, 3, size, size, generator=generator)


def _text(_model: nn.Module, generator: torch.Generator) -> Inputs:
    return {"input_ids": _words(generator)}


def _both_texts(_model: nn.Module, generator: torch.Generator) -> Inputs:
    return {"input_ids": _words(generator), "decoder_input_ids": _words(generator, 5)}


def _pixels(_model: nn.Module, generator: torch.Generator) -> Inputs:
    return {"pixel_values": _image(generator)}


def _image_and_text(_model: nn.Module, generator: torch.Generator) -> Inputs:
    return {"input_ids": _words(generator), "pixel_values": _image(generator)}


def _image_in_text(
    pieces: int, image: Callable[[torch.Generator], Inputs] = lambda generator: {"pixel_values": _image(generator)}
) -> Callable[[nn.Module, torch.Generator], Inputs]:
    """Return inputs in which some words stand for the pieces of an image."""

    def make(model: nn.Module, generator: torch.Generator) -> Inputs:
        config: Any = model.config
        word = getattr(config, "image_token_id", None) or config.image_token_index
        words = torch.cat([torch.full((2, pieces), word), _words(generator)], 1)
        inputs = {"input_ids": words, "attention_mask": torch.ones_like(words), **image(generator)}
        if "image_grid_thw" in inputs:
            inputs["mm_token_type_ids"] = (words == word).int()
        return inputs

    return make


def _one_image_each(generator: torch.Generator) -> Inputs:
    return {"pixel_values": _image(generator).unsqueeze(1)}


def _patches(generator: torch.Generator) -> Inputs:
    """Return images as Qwen takes them: 4 x 4 patches of 2 frames each, and the grids."""
    return {
        "pixel_values": torch.randn(2 * 16, 3 * 2 * 8 * 8, generator=generator),
        "image_grid_thw": torch.tensor([[1, 4, 4], [1, 4, 4]]),
    }


def _flat_patches(_model: nn.Module, generator: torch.Generator) -> Inputs:
    """Return images as SigLIP 2 takes them, beside texts: 4 x 4 flat patches."""
    return {
        "input_ids": _words(generator),
        "pixel_values": torch.randn(2, 16, 3 * 8 * 8, generator=generator),
        "pixel_attention_mask": torch.ones(2, 16, dtype=torch.long),
        "spatial_shapes": torch.tensor([[4, 4], [4, 4]]),
    }


def _points(_model: nn.Module, generator: torch.Generator) -> Inputs:
    return {"pixel_values": _image(generator), "input_points": 32 * torch.rand(2, 1, 3, 2, generator=generator)}


def _sound(_model: nn.Module, generator: torch.Generator) -> Inputs:
    return {"input_values": torch.randn(2, 1200, generator=generator)}


def _row(
    kind: str,
    head: str = "AutoModel",
    inputs: Callable[[nn.Module, torch.Generator], Inputs] = _text,
    *,
    generates: bool = False,
    exact: bool = True,
    **overrides: Any,
) -> Architecture:
    make = partial(_build, kind, head, **overrides)
    return Architecture("transformers", kind, make, inputs, generates, exact)


_VISION = (
    *("vit", "deit", "beit", "dinov2", "dinov2_with_registers", "dinov3_vit", "data2vec-vision", "ijepa"),
    *("vit_mae", "vit_msn", "yolos", "siglip_vision_model", "clip_vision_model", "dpt", "mlcd_vision_model", "pixio"),
)
_ENCODERS = (
    *("bert", "roberta", "albert", "electra", "camembert", "xlm-roberta", "xlm-roberta-xl", "roberta-prelayernorm"),
    *("data2vec-text", "ernie", "mpnet", "distilbert", "megatron-bert", "rembert", "roc_bert", "layoutlm", "markuplm"),
    *("nystromformer", "splinter", "modernbert", "nomic_bert", "eurobert", "xlm", "flaubert"),
    *("bert-generation", "fnet", "gte"),
)
_DECODERS = (
    *("gpt2", "llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3_text", "phi", "phi3", "olmo", "olmo2"),
    *("starcoder2", "stablelm", "cohere", "granite", "gpt_neox", "opt", "bloom", "mpt", "biogpt", "helium"),
    *("smollm3", "glm", "glm4", "exaone4", "persimmon", "arcee", "seed_oss", "ernie4_5", "diffllama", "nanochat"),
    *("openai-gpt", "gpt_bigcode", "internlm3", "vaultgemma", "falcon", "cohere2", "cwm", "ctrl"),
)
_TRANSLATORS = ("mt5", "umt5", "bart", "mbart", "pegasus", "marian", "m2m_100", "blenderbot", "plbart", "mvp")
_PAIRS = ("clip", "metaclip_2", "chinese_clip", "altclip", "owlvit", "owlv2", "groupvit", "flava", "clipseg", "aimv2")

_FLORENCE = {
    "depths": [1, 1, 2, 1],
    "embed_dim": [16, 16, 32, 32],
    "num_heads": [2, 2, 4, 4],
    "num_groups": [2, 2, 4, 4],
}
_LATENT = {
    "head_dim": 4,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "qk_head_dim": 12,
    "v_head_dim": 8,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "num_key_value_heads": 4,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
}
_WINDOWS = {"depths": [2, 2], "num_heads": [2, 4], "patch_size": 4, "window_size": 4}

TRANSFORMERS: tuple[Architecture, ...] = (
    *(_row(kind, inputs=_pixels) for kind in _VISION),
    *(_row(kind) for kind in _ENCODERS),
    *(_row(kind, "AutoModelForCausalLM", generates=True) for kind in _DECODERS),
    *(_row(kind, "AutoModelForSeq2SeqLM", _both_texts, generates=True) for kind in _TRANSLATORS),
    *(_row(kind, inputs=_image_and_text) for kind in _PAIRS),
    _row("t5", "AutoModelForSeq2SeqLM", _both_texts, generates=True, decoder_start_token_id=0),
    _row("xglm", exact=False),
    _row("siglip", inputs=_image_and_text, text_config={"projection_size": 32}),
    _row("siglip2", inputs=_flat_patches, text_config={"projection_size": 32}, vision_config={"num_patches": 16}),
    _row("vilt", inputs=_image_and_text),
    _row(
        "bridgetower",
        inputs=_image_and_text,
        hidden_size=64,
        text_config={"hidden_size": 64},
        vision_config={"hidden_size": 64},
    ),
    _row("detr", inputs=_pixels, backbone_config={"backbone": "resnet10t"}),
    _row(
        "sam",
        inputs=_points,
        vision_config={"num_pos_feats": 16, "output_channels": 32},
        prompt_encoder_config={"image_embedding_size": 4},
    ),
    _row("git", "AutoModelForCausalLM", _image_and_text, generates=True),
    _row("blip", "BlipForConditionalGeneration", _image_and_text),
    _row("blip-2", "AutoModelForImageTextToText", _image_in_text(5), generates=True, image_token_index=3),
    _row("llava", "AutoModelForImageTextToText", _image_in_text(16), generates=True),
    _row("paligemma", "AutoModelForImageTextToText", _image_in_text(16), generates=True),
    *(
        _row(kind, "AutoModelForImageTextToText", _image_in_text(4, _one_image_each), generates=True)
        for kind in ("idefics3", "smolvlm")
    ),
    _row(
        "qwen2_5_vl",
        "AutoModelForImageTextToText",
        _image_in_text(4, _patches),
        generates=True,
        text_config={"rope_parameters": {"mrope_section": [2, 1, 1]}},
    ),
    _row(
        "qwen3_vl",
        "AutoModelForImageTextToText",
        _image_in_text(4, _patches),
        generates=True,
        vision_config={"deepstack_visual_indexes": [0]},
    ),
    _row("florence2", "AutoModelForImageTextToText", _image_in_text(2), vision_config=_FLORENCE),
    _row("gptj", "AutoModelForCausalLM", generates=True, rotary_dim=4),
    *(_row(kind, "AutoModelForCausalLM", generates=True) for kind in ("mixtral", "qwen3_moe", "gpt_oss")),
    _row("deepseek_v3", "AutoModelForCausalLM", generates=True, **_LATENT),
    _row("imagegpt", "ImageGPTForCausalImageModeling"),
    _row("swin", inputs=_pixels, **_WINDOWS),
    _row("donut-swin", inputs=_pixels, **_WINDOWS),
    _row("swinv2", inputs=_pixels, **_WINDOWS),
    *(_row(kind, inputs=_sound) for kind in ("wav2vec2", "hubert", "wavlm", "data2vec-audio")),
)
