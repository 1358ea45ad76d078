"""Tiny models of today's vision-language families, random, with tokenizers and processors made here, as folders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as t
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

WORDS = (
    "What colour is this shape ? It is a red green blue circle square triangle . yes no how many are there one two "
    "Describe the image. Same shape in both images User: Assistant: Hello there Be short"
)
TURN = (
    "{% for message in messages %}<|start|>{{ message.role }}\n{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}{% if part.type == 'image' %}IMAGE{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}<|end|>\n{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SIGHT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}


def tokenizer(*more: str, template: str | None = None, **named: str) -> t.PreTrainedTokenizerFast:
    """Return a byte-level tokenizer of few words."""
    special = ["<pad>", "<s>", "</s>", "<unk>", "<|start|>", "<|end|>", *more]
    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        [WORDS] * 4,
        trainers.BpeTrainer(vocab_size=500, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    made.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", 1)])
    found = t.PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens=named,
    )
    found.chat_template = template
    return found


def _sized(words: t.PreTrainedTokenizerFast, **more: Any) -> dict[str, Any]:
    return {**TEXT, "vocab_size": len(words), **more}


def llama(folder: Path, template: str | None = TURN) -> Path:
    words = tokenizer(template=template)
    return _saved(folder, t.LlamaForCausalLM(t.LlamaConfig(**_sized(words))), words)


def smolvlm(folder: Path) -> Path:
    return _tiled(folder, t.SmolVLMForConditionalGeneration, t.SmolVLMConfig, t.SmolVLMVisionConfig)


def idefics3(folder: Path) -> Path:
    return _tiled(folder, t.Idefics3ForConditionalGeneration, t.Idefics3Config, t.Idefics3VisionConfig)


def _tiled(folder: Path, model: Any, config: Any, vision: Any) -> Path:
    marks = ("<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>")
    words = tokenizer(*marks, *(f"<row_{row}_col_{col}>" for row in range(1, 5) for col in range(1, 5)))
    template = TURN.replace("IMAGE", "<image>").replace("<|end|>", "<end_of_utterance>")
    images = t.SmolVLMImageProcessor(
        size={"longest_edge": 64}, max_image_size={"longest_edge": 32}, do_image_splitting=True
    )
    made = t.Idefics3Processor(images, words, image_seq_len=4, chat_template=template)
    found = config(
        vision_config=vision(**SIGHT),
        text_config=t.LlamaConfig(**_sized(words)),
        scale_factor=2,
        image_token_id=words.convert_tokens_to_ids("<image>"),
        pad_token_id=0,
    )
    return _saved(folder, model(found), made)


def llava(folder: Path) -> Path:
    template = (
        "{% for message in messages %}{{ message.role | upper }}: {% for part in message.content %}{% if part.type == "
        "'image' %}<image>\n{% else %}{{ part.text }}{% endif %}{% endfor %} {% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    )
    words = tokenizer("<image>", image_token="<image>")
    images = t.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    made = t.LlavaProcessor(
        images,
        words,
        patch_size=8,
        vision_feature_select_strategy="default",
        chat_template=template,
        num_additional_image_tokens=1,
    )
    config = t.LlavaConfig(
        vision_config=t.CLIPVisionConfig(**SIGHT, projection_dim=32),
        text_config=t.LlamaConfig(**_sized(words)),
        image_token_index=words.convert_tokens_to_ids("<image>"),
        image_token_id=words.convert_tokens_to_ids("<image>"),
    )
    return _saved(folder, t.LlavaForConditionalGeneration(config), made)


def _qwen(folder: Path, model: Any, config: Any, text: Any, vision: Any, processor: Any) -> Path:
    marks = {
        "image_token": "<|image_pad|>",
        "video_token": "<|video_pad|>",
        "vision_bos_token": "<|vision_start|>",
        "vision_eos_token": "<|vision_end|>",
    }
    template = TURN.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
    words = tokenizer(*marks.values(), **marks)
    images = t.Qwen2VLImageProcessor(patch_size=8, merge_size=2, min_pixels=16 * 16, max_pixels=48 * 48)
    videos = t.Qwen3VLVideoProcessor(patch_size=8) if "Qwen3" in processor.__name__ else t.Qwen2VLVideoProcessor()
    made = processor(images, words, videos, chat_template=template)
    numbers = {
        f"{name.removesuffix('_token')}_token_id": words.convert_tokens_to_ids(mark) for name, mark in marks.items()
    }
    found = config(
        vision_config=vision,
        text_config={**_sized(words), **text},
        image_token_id=numbers["image_token_id"],
        video_token_id=numbers["video_token_id"],
        vision_start_token_id=numbers["vision_bos_token_id"],
        vision_end_token_id=numbers["vision_eos_token_id"],
    )
    return _saved(folder, model(found), made)


def qwen2_vl(folder: Path) -> Path:
    text = {"rope_scaling": {"type": "default", "rope_type": "default", "mrope_section": [1, 1, 2]}}
    vision = {
        "depth": 2,
        "embed_dim": 32,
        "hidden_size": 32,
        "mlp_ratio": 2,
        "num_heads": 2,
        "patch_size": 8,
        "spatial_merge_size": 2,
    }
    return _qwen(folder, t.Qwen2VLForConditionalGeneration, t.Qwen2VLConfig, text, vision, t.Qwen2VLProcessor)


def qwen2_5_vl(folder: Path) -> Path:
    text = {"rope_scaling": {"type": "default", "rope_type": "default", "mrope_section": [1, 1, 2]}}
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "patch_size": 8,
        "spatial_merge_size": 2,
        "window_size": 32,
        "out_hidden_size": 32,
        "fullatt_block_indexes": [1],
    }
    kinds = t.Qwen2_5_VLForConditionalGeneration, t.Qwen2_5_VLConfig
    return _qwen(folder, *kinds, text, vision, t.Qwen2_5_VLProcessor)


def qwen3_vl(folder: Path) -> Path:
    text = {"head_dim": 8, "rope_scaling": {"rope_type": "default", "mrope_section": [1, 1, 2]}}
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "patch_size": 8,
        "spatial_merge_size": 2,
        "out_hidden_size": 32,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0],
    }
    return _qwen(folder, t.Qwen3VLForConditionalGeneration, t.Qwen3VLConfig, text, vision, t.Qwen3VLProcessor)


def paligemma(folder: Path) -> Path:
    words = tokenizer("<image>", image_token="<image>")
    images = t.SiglipImageProcessor(size={"height": 32, "width": 32})
    images.image_seq_length = 16
    made = t.PaliGemmaProcessor(images, words)
    config = t.PaliGemmaConfig(
        vision_config={**SIGHT, "model_type": "siglip_vision_model", "projection_dim": 32, "vision_use_head": False},
        text_config={**_sized(made.tokenizer), "model_type": "gemma", "head_dim": 8},
        image_token_index=made.image_token_id,
        image_token_id=made.image_token_id,
        projection_dim=32,
        hidden_size=32,
    )
    config.pad_token_id = 0
    return _saved(folder, t.PaliGemmaForConditionalGeneration(config), made)


def gemma3(folder: Path) -> Path:
    marks = {"boi_token": "<boi>", "eoi_token": "<eoi>", "image_token": "<soft>"}
    words = tokenizer(*marks.values(), template=TURN.replace("IMAGE", "<boi>"), **marks)
    images = t.Gemma3ImageProcessor(size={"height": 32, "width": 32})
    made = t.Gemma3Processor(images, words, chat_template=words.chat_template, image_seq_length=4)
    config = t.Gemma3Config(
        text_config=_sized(words, head_dim=8, sliding_window=64),
        vision_config={**SIGHT, "model_type": "siglip_vision_model", "vision_use_head": False},
        mm_tokens_per_image=4,
        boi_token_index=words.convert_tokens_to_ids("<boi>"),
        eoi_token_index=words.convert_tokens_to_ids("<eoi>"),
        image_token_index=words.convert_tokens_to_ids("<soft>"),
        image_token_id=words.convert_tokens_to_ids("<soft>"),
    )
    return _saved(folder, t.Gemma3ForConditionalGeneration(config), made)


def internvl(folder: Path) -> Path:
    marks = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    template = TURN.replace("IMAGE", "<IMG_CONTEXT>\n")
    words = tokenizer(*marks.values(), **marks)
    images = t.GotOcr2ImageProcessor(size={"height": 32, "width": 32}, max_patches=2, min_patches=1)
    made = t.InternVLProcessor(images, words, t.InternVLVideoProcessor(), image_seq_length=4, chat_template=template)
    config = t.InternVLConfig(
        vision_config={**SIGHT, "image_size": [32, 32], "patch_size": [8, 8]},
        text_config={**_sized(words), "model_type": "qwen2"},
        image_token_id=words.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
        downsample_ratio=0.5,
    )
    return _saved(folder, t.InternVLForConditionalGeneration(config), made)


def florence2(folder: Path) -> Path:
    words = tokenizer("<image>", image_token="<image>")
    images = t.CLIPImageProcessor(size={"height": 32, "width": 32}, do_center_crop=False)
    images.image_seq_length = 17
    made = t.Florence2Processor(images, words)
    text = {
        "vocab_size": len(made.tokenizer),
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 2,
        "forced_eos_token_id": 2,
    }
    vision = {
        "embed_dim": [16, 32],
        "depths": [1, 1],
        "num_heads": [2, 4],
        "num_groups": [2, 4],
        "patch_size": [7, 3],
        "patch_stride": [4, 2],
        "patch_padding": [3, 1],
        "patch_prenorm": [False, True],
        "window_size": 4,
        "projection_dim": 32,
    }
    config = t.Florence2Config(
        text_config=text, vision_config=vision, image_token_id=made.image_token_id, is_encoder_decoder=True
    )
    return _saved(folder, t.Florence2ForConditionalGeneration(config), made)


FAMILIES: dict[str, Callable[[Path], Path]] = {
    each.__name__: each
    for each in (
        llama,
        smolvlm,
        idefics3,
        llava,
        qwen2_vl,
        qwen2_5_vl,
        qwen3_vl,
        paligemma,
        gemma3,
        internvl,
        florence2,
    )
}


def _saved(folder: Path, model: Any, processor: Any) -> Path:
    torch.manual_seed(0)
    model.init_weights()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    model.generation_config.pad_token_id = 0
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
